"""The fast path of the most frequent messages with tensors: a plain dense one, or a flat dict, list or tuple of them.

The pickles of such messages differ only where the *shape* differs: the kind of collection, its keys, and each tensor's
geometry on its block. The numbers of the blocks are not in the pickle. So the writer makes the pickle once for each
shape, and the reader recognises the shape by the message's first bytes and unpickles nothing. What this module does not
know takes the general path, which makes and reads the same bytes.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any, Final

import torch

from .. import _native
from ..memory import recycling, sharing
from ..memory.block import Block, Geometry
from ..memory.block_fields import MAPPED
from ..memory.counts import UNTRACKED
from ..memory.message import Message
from ..memory.packing import SLICE, SMALL, Row, rows_to_bytes
from ..memory.received_blocks import take_tensor, take_tensors
from ..memory.recycling import block_of
from ..memory.slices import aligned, slice_of
from ..memory.storages import bytes_of, geometry
from .local_message import LocalMessage
from .tensors import alias, is_unusual, rebuild, rebuild_packed

#: How many shapes this process remembers, and how many tensors one may have.
_MAX_SHAPES: Final = 1024
_MAX_TENSORS: Final = 64

#: Type of the collection, or ``torch.Tensor``; keys of a dict; geometries of the tensors. If some tensors are packed:
#: where each begins in the last block, -1 for a tensor with a block of its own; else empty.
_Shape = tuple[type, tuple[str, ...], tuple[Geometry, ...], tuple[int, ...]]

#: A tensor's block, its storage, and its geometry.
_Found = tuple[Block, torch.UntypedStorage, Geometry]

#: The first bytes of each shape's messages: the pickle, and the rows of packed tensors.
_prefixes: dict[_Shape, bytes] = {}
#: The same the other way round.
shapes: dict[bytes, _Shape] = {}


class _Tensor:
    """Pickles as a tensor with this geometry on one of its message's blocks, or slices."""

    def __init__(self, rebuild: Any, index: int, geometry: Geometry) -> None:
        self._rebuild = rebuild
        self._index = index
        self._geometry = geometry

    def __reduce__(self) -> Any:
        code, offset, size, stride = self._geometry
        return self._rebuild, (self._index, code, offset, tuple(size), stride)


def _build(shape: _Shape, tensors: Sequence[Any]) -> Any:
    cls, keys, _, _ = shape
    if cls is dict:
        return dict(zip(keys, tensors, strict=True))
    if cls is torch.Tensor:
        return tensors[0]
    return list(tensors) if cls is list else tuple(tensors)


def _prefix_of(shape: _Shape) -> bytes:
    if len(_prefixes) >= _MAX_SHAPES:
        _prefixes.clear()
        shapes.clear()
        if _native.core is not None:
            _native.core.clear_shapes()
    geometries, shifts = shape[2:]
    rows: list[Row] = []
    if shifts:
        tensors = []
        own = 0
        for number, (where, shift) in enumerate(zip(geometries, shifts, strict=True)):
            if shift < 0:
                tensors.append(_Tensor(rebuild, own, where))
                own += 1
            else:
                tensors.append(_Tensor(rebuild_packed, number, where))
                rows.append(Row(SLICE, number, 0, bytes_of(where), shifts.count(-1), shift))
    else:
        tensors = [_Tensor(rebuild, index, where) for index, where in enumerate(geometries)]
    pickled = pickle.dumps(_build(shape, tensors), 5)
    _prefixes[shape] = prefix = b"".join((pickled, *rows_to_bytes(rows))) if rows else pickled
    shapes[prefix] = shape
    if _native.core is not None:
        _native.core.add_shape(*shape, prefix, shape)
    return prefix


def _tensors_in(obj: Any) -> tuple[tuple[str, ...], Sequence[torch.Tensor]] | None:
    """The keys and tensors of a flat collection that contains only tensors; () and the tensor for a tensor alone."""
    cls = type(obj)
    if cls is torch.Tensor:
        return (), [obj]
    if not 0 < len(obj) <= _MAX_TENSORS:
        return None
    values = list(obj.values()) if cls is dict else obj
    for value in values:
        if type(value) is not torch.Tensor:
            return None
    keys = tuple(obj) if cls is dict else ()
    for key in keys:
        if type(key) is not str:
            return None
    return keys, values


def is_candidate(obj: Any) -> bool:
    """Whether ``obj`` is a collection that begins with a tensor."""
    cls = type(obj)
    if cls is tuple or cls is list:
        return bool(obj) and type(obj[0]) is torch.Tensor
    return cls is dict and bool(obj) and type(next(iter(obj.values()))) is torch.Tensor


class LocalTensors(LocalMessage):
    """A message for this process with the tensors themselves, and the shape of their collection."""

    __slots__ = ("_cls", "_keys", "_places")

    def __init__(
        self, cls: type, keys: tuple[str, ...], tensors: Sequence[torch.Tensor], places: Sequence[tuple[int, Geometry]]
    ) -> None:
        super().__init__(b"", tensors)
        self._cls = cls
        self._keys = keys
        self._places = places

    def decode(self, *, original_tensors: bool = False) -> Any:
        tensors = self.objects
        if not original_tensors:
            tensors = [alias(*each) for each in zip(tensors, self._places, strict=True)]
        return _build((self._cls, self._keys, (), ()), tensors)

    def copy(self) -> LocalMessage:
        return self  # decoding does not change it


def encode_local(obj: Any) -> LocalMessage | None:
    """The local message of a tensor, dict, list or tuple; None if it must take the general path."""
    content = _tensors_in(obj)
    if content is None:
        return None
    keys, tensors = content
    places = []
    for tensor in tensors:
        if tensor.requires_grad or is_unusual(tensor):
            return None
        places.append((tensor.untyped_storage().data_ptr(), geometry(tensor)))
    if len(tensors) > 1 and len(set(map(id, tensors))) < len(tensors):
        return None  # one tensor that occurs twice arrives as one
    return LocalTensors(type(obj), keys, list(tensors), places)


#: The parts of a message: its first bytes, whether they have rows of packed tensors, its blocks, and their storages.
Prepared = tuple[bytes, bool, list[Block], list[torch.UntypedStorage]]


def prepare_tensor(
    tensor: torch.Tensor, owned_blocks: Container[Block] | None
) -> tuple[bytes, Block, torch.UntypedStorage] | None:
    """The pickle, the block and the storage of a tensor; else as ``prepare``."""
    found = _block_for(tensor, owned_blocks)
    if found is None:
        return None
    block, storage, where = found
    shape: _Shape = (torch.Tensor, (), (where,), ())
    return _prefixes.get(shape) or _prefix_of(shape), block, storage


def prepare(obj: Any, owned_blocks: Container[Block] | None) -> Prepared | None:
    """Share the tensors of a dict, list or tuple for a message. Returns None if it must take the general path.

    If ``owned_blocks`` is given, this copies the tensors that are not on one of these blocks, and shares no others.
    """
    content = _tensors_in(obj)
    if content is None:
        return None
    keys, tensors = content
    if owned_blocks is not None and len(tensors) > 1:
        return _by_value(type(obj), keys, tensors, owned_blocks)
    found_all: list[_Found] = []
    for tensor in tensors:
        found = _block_for(tensor, owned_blocks)
        if found is None:
            return None
        found_all.append(found)
    places = tuple(where for _, _, where in found_all)
    return _parts((type(obj), keys, places, ()), found_all)


def _by_value(
    cls: type, keys: tuple[str, ...], tensors: Sequence[torch.Tensor], owned_blocks: Container[Block]
) -> Prepared | None:
    """Copy the tensors that are not on ``owned_blocks``, all small ones into one block."""
    found_all: list[_Found] = []
    places: list[Geometry] = []
    shifts: list[int] = []
    small: list[tuple[torch.Tensor, int]] = []
    seen, end = set(), 0
    for tensor in tensors:
        if tensor.requires_grad or is_unusual(tensor):
            return None
        storage = tensor.untyped_storage()
        if storage._cdata in seen:
            return None  # views of one storage, or one tensor twice
        seen.add(storage._cdata)
        block = block_of(storage)
        found: _Found | None = None
        if block is not None and not sharing.goes_by_value(block, owned_blocks):
            found = block, storage, geometry(tensor)
        else:
            nbytes = tensor.numel() and sharing.span_bytes(tensor)
            if not nbytes:
                return None
            if nbytes <= SMALL:
                where = geometry(tensor)
                places.append((where[0], 0, where[2], where[3]))
                small.append((tensor, nbytes))
                shifts.append(end)
                end = aligned(end + nbytes)
                continue
            found = sharing.copy(tensor)
            if found is None:
                return None
        found_all.append(found)
        places.append(found[2])
        shifts.append(-1)
    if len(small) == 1:
        found = sharing.copy(small[0][0])
        if found is None:
            return None
        found_all.insert(shifts.index(0), found)
    elif small:
        packed = sharing.copy_all(small)
        if packed is None:
            return None
        found_all.append((*packed, places[-1]))
    for block, _, _ in found_all:
        if block.number == UNTRACKED:
            recycling.prepare_to_send(block)
    return _parts((cls, keys, tuple(places), tuple(shifts) if len(small) > 1 else ()), found_all)


def lay_out(
    cls: type | None, keys: tuple[str, ...], tensors: Sequence[tuple[int, tuple[int, ...]]]
) -> tuple[bytes, tuple[int, ...], int]:
    """How a message has new contiguous tensors, so that all small ones are in one block, as ``_by_value`` does it.

    Args:
        cls: dict or list; None for one tensor alone.
        keys: of a dict.
        tensors: the code of each one's dtype, and its size.

    Returns the first bytes of the message; where each tensor begins in the last block, -1 for one with a block of its
    own; and the bytes of that last block, 0 if no tensors are packed.
    """
    geometries = tuple((code, 0, size, _contiguous(size)) for code, size in tensors)
    nbytes = [bytes_of(each) for each in geometries]
    shifts = [-1] * len(geometries)
    end = 0
    if sum(each <= SMALL for each in nbytes) > 1:
        for index, each in enumerate(nbytes):
            if each <= SMALL:
                shifts[index] = aligned(end)
                end = shifts[index] + each
    shape = (cls or torch.Tensor, keys, geometries, tuple(shifts) if end else ())
    return _prefixes.get(shape) or _prefix_of(shape), tuple(shifts), end


def _contiguous(size: Sequence[int]) -> tuple[int, ...]:
    strides = [1]
    for each in reversed(size[1:]):
        strides.append(strides[-1] * each)
    return tuple(reversed(strides))


def _parts(shape: _Shape, found_all: Sequence[_Found]) -> Prepared | None:
    blocks = [block for block, _, _ in found_all]
    if len(set(blocks)) < len(blocks):
        return None  # tensors that share a block, or one tensor twice
    begin = _prefixes.get(shape) or _prefix_of(shape)
    return begin, bool(shape[3]), blocks, [storage for _, storage, _ in found_all]


def _block_for(tensor: torch.Tensor, owned_blocks: Container[Block] | None) -> _Found | None:
    """The block of a plain tensor after sharing or copying it; None if the tensor is not plain, or gets no block."""
    if tensor.requires_grad or is_unusual(tensor):
        return None
    storage = tensor.untyped_storage()
    block = block_of(storage)
    if sharing.goes_by_value(block, owned_blocks):
        found = sharing.copy(tensor) if tensor.numel() else None
        if found is None:
            return None
        block, storage, where = found
    else:
        if block is None:
            if storage.nbytes() == 0 or sharing.needs_torch_reducer(storage) or slice_of(storage) is not None:
                return None
            del storage
            try:
                block = sharing.share(tensor)
            except sharing.IsSlice:
                return None
            if block is None:
                return None
            storage = tensor.untyped_storage()
        elif block.kind == MAPPED and not sharing.is_current(block):
            return None
        where = geometry(tensor)
    if block.number == UNTRACKED:
        recycling.prepare_to_send(block)
    return block, storage, where


# The native part of this module, and of pickle for what has no tensors.

#: ``encode_plain(obj, limit)`` gives a payload, or None, and then has changed nothing.
encode_plain: Final[Callable[[Any, int], Message | bytes | None] | None] = (
    None if _native.core is None else _native.core.encode_plain
)
#: ``decode_plain(data, fds)`` gives the object, closes ``fds`` and empties the list; or it gives NotImplemented, and
#: then has changed nothing.
decode_plain: Final[Callable[[bytes, list[int]], Any] | None] = (
    None if _native.core is None else _native.core.decode_plain
)
if _native.core is not None:
    _native.core.set_loads(pickle.loads)


def decode_one(shape: _Shape, number: int, nbytes: int) -> Any:
    """The object of that shape on one block; None, and nothing is taken, if this process does not have the block."""
    tensor = take_tensor(number, nbytes, shape[2][0])
    return tensor if tensor is None or shape[0] is torch.Tensor else _build(shape, [tensor])


def decode(shape: _Shape, references: Iterable[tuple[int, int]]) -> Any:
    """The object of that shape on several blocks, or with packed tensors; else as ``decode_one``."""
    geometries, shifts = shape[2:]
    tensors = take_tensors(references, geometries, shifts, shape)
    return None if tensors is None else _build(shape, tensors)


def learn(obj: Any, rows: Sequence[Row]) -> None:
    """Remember the shape of an object that has come by the general path, with these rows of packed tensors."""
    cls = type(obj)
    content = _tensors_in(obj) if cls in (torch.Tensor, dict, list, tuple) else None
    if content is None:
        return
    keys, tensors = content
    if any(tensor.requires_grad or is_unusual(tensor) for tensor in tensors):
        return
    shifts: tuple[int, ...] = ()
    if rows:
        shifts = _shifts(rows, len(tensors))
        if not shifts:
            return
    shape = (cls, keys, tuple(geometry(tensor) for tensor in tensors), shifts)
    if shape not in _prefixes:
        _prefix_of(shape)


def _shifts(rows: Sequence[Row], count: int) -> tuple[int, ...]:
    """Where each of ``count`` tensors begins, for a shape; empty if no shape describes their packing."""
    shifts = [-1] * count
    for row in rows:
        if row.kind != SLICE or row.low or row.group >= count:
            return ()
        shifts[row.group] = row.shift
    return tuple(shifts)
