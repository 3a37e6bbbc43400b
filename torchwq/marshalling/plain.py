"""The shortest way for the commonest messages with tensors: plain dense ones, alone or in a flat dict, list or tuple.

Such a message is the same pickle again and again, but for the numbers of the blocks, which are not in the pickle. So
the pickle is made once for each *shape* (what the collection is, and how each tensor lies on its block), and recognised
by its bytes at the reader, which then has nothing to unpickle. What either side does not know takes the general way;
the bytes are those of the general way, too.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Container, Sequence
from typing import Any, Final

import torch

from ..memory import recycling, sharing
from ..memory.arrivals import take_tensor, take_tensors
from ..memory.block import MAPPED, Block, Geometry
from ..memory.ledger import UNTRACKED
from ..memory.parcel import REFERENCES, TRAILER, Parcel
from ..memory.recycling import block_of
from ..memory.storages import geometry
from .letter import Letter
from .payload import COUNT, REFERENCE
from .tensors import alias, is_unusual, rebuild

#: One block's number and bytes, and that it is the only one.
_ONE: Final = struct.Struct("=QQI")
#: How many different pickles are remembered, and how many tensors one may have.
_MOST: Final = 1024
_MOST_TENSORS: Final = 64

#: Type of the collection, its keys if it is a dict, and how its tensors lie. A tensor alone has its own type.
_Shape = tuple[type, tuple[str, ...], tuple[Geometry, ...]]

_pickles: dict[_Shape, bytes] = {}
_shapes: dict[bytes, _Shape] = {}


class _Tensor:
    """Is pickled as a tensor that lies so on one of the blocks of its message."""

    def __init__(self, index: int, geometry: Geometry) -> None:
        self._index = index
        self._geometry = geometry

    def __reduce__(self) -> Any:
        code, offset, size, stride = self._geometry
        return rebuild, (self._index, code, offset, tuple(size), stride)


def _build(shape: _Shape, tensors: Sequence[Any]) -> Any:
    cls, keys, _ = shape
    if cls is dict:
        return dict(zip(keys, tensors, strict=True))
    if cls is torch.Tensor:
        return tensors[0]
    return list(tensors) if cls is list else tuple(tensors)


def _pickle_of(shape: _Shape) -> bytes:
    if len(_pickles) >= _MOST:
        _pickles.clear()
        _shapes.clear()
    tensors = [_Tensor(index, geometry) for index, geometry in enumerate(shape[2])]
    _pickles[shape] = pickled = pickle.dumps(_build(shape, tensors), 5)
    _shapes[pickled] = shape
    return pickled


def _tensors_in(obj: Any) -> tuple[tuple[str, ...], Sequence[torch.Tensor]] | None:
    """Keys and tensors of a flat collection of nothing but tensors."""
    keys: tuple[str, ...] = ()
    values: Any = obj
    if type(obj) is dict:
        values = obj.values()
    if not 0 < len(obj) <= _MOST_TENSORS:
        return None
    for value in values:
        if type(value) is not torch.Tensor:
            return None
    if type(obj) is dict:
        keys, values = tuple(obj), list(values)
        for key in keys:
            if type(key) is not str:
                return None
    return keys, values


def may_be(obj: Any) -> bool:
    """Whether it is worth looking at ``obj``: a tensor, or a collection that begins with one."""
    cls = type(obj)
    if cls is torch.Tensor:
        return True
    if cls is tuple or cls is list:
        return bool(obj) and type(obj[0]) is torch.Tensor
    return cls is dict and bool(obj) and type(next(iter(obj.values()))) is torch.Tensor


class PlainLetter(Letter):
    """The shortest way within a process: such tensors, and what to make of them again."""

    __slots__ = ("_cls", "_keys", "_places")

    def __init__(
        self, cls: type, keys: tuple[str, ...], tensors: Sequence[torch.Tensor], places: Sequence[tuple[int, Geometry]]
    ) -> None:
        super().__init__(b"", tensors)
        self._cls = cls
        self._keys = keys
        self._places = places

    def open(self, *, as_it_is: bool = False) -> Any:
        tensors = (
            self.enclosed if as_it_is else [alias(*each) for each in zip(self.enclosed, self._places, strict=True)]
        )
        return _build((self._cls, self._keys, ()), tensors)

    def copy(self) -> Letter:
        return self  # it is not used up


def encode_here(obj: Any) -> Letter | None:
    """The letter with a tensor, dict, list or tuple; None if it has to take the general way."""
    content = ((), [obj]) if type(obj) is torch.Tensor else _tensors_in(obj)
    if content is None:
        return None
    keys, tensors = content
    places = []
    for tensor in tensors:
        if tensor.requires_grad or is_unusual(tensor):
            return None
        places.append((tensor.untyped_storage().data_ptr(), geometry(tensor)))
    if len(tensors) > 1 and len(set(map(id, tensors))) < len(tensors):
        return None  # the same tensor twice arrives as one
    return PlainLetter(type(obj), keys, list(tensors), places)


def encode(obj: Any, limit: int, fresh: Container[Block] | None = None) -> Parcel | None:
    """The payload of a message with a tensor, dict, list or tuple; None if it has to take the general way.

    The tensors are shared then; or copied, unless they are on a block of ``fresh``, if that is given.
    """
    if type(obj) is torch.Tensor:
        found = _block_for(obj, fresh)
        if found is None:
            return None
        block, storage, where = found
        shape: _Shape = (torch.Tensor, (), (where,))
        data = (_pickles.get(shape) or _pickle_of(shape)) + _ONE.pack(block.number, block.nbytes, 1)
        if len(data) > limit:
            return None
        parcel = Parcel(data, [block.fd], [storage], REFERENCES, (block.number,), True)
        parcel.nbytes += block.nbytes
        return parcel
    content = _tensors_in(obj)
    return None if content is None else _encode_all(type(obj), *content, limit, fresh)


def _encode_all(
    cls: type, keys: tuple[str, ...], tensors: Sequence[torch.Tensor], limit: int, fresh: Container[Block] | None
) -> Parcel | None:
    fds, storages, numbers, places, parts = [], [], [], [], []
    nbytes = 0
    for tensor in tensors:
        found = _block_for(tensor, fresh)
        if found is None:
            return None
        block, storage, where = found
        fds.append(block.fd)
        storages.append(storage)
        numbers.append(block.number)
        places.append(where)
        parts.append(REFERENCE.pack(block.number, block.nbytes))
        nbytes += block.nbytes
    if len(set(fds)) < len(fds):
        return None  # tensors that share a block, or the same tensor twice
    shape = (cls, keys, tuple(places))
    data = b"".join((_pickles.get(shape) or _pickle_of(shape), *parts, COUNT.pack(len(fds))))
    if len(data) > limit:
        return None
    parcel = Parcel(data, fds, storages, REFERENCES, numbers, True)
    parcel.nbytes += nbytes
    return parcel


def _block_for(
    tensor: torch.Tensor, fresh: Container[Block] | None
) -> tuple[Block, torch.UntypedStorage, Geometry] | None:
    """The block that a plain tensor is on now, or has been copied to; None if it is not plain, or has none."""
    if tensor.requires_grad or is_unusual(tensor):
        return None
    storage = tensor.untyped_storage()
    block = block_of(storage)
    if sharing.goes_by_value(block, fresh):
        found = sharing.copy(tensor) if tensor.numel() else None
        if found is None:
            return None
        block, storage, where = found
    else:
        if block is None:
            if storage.nbytes() == 0 or sharing.is_for_torch(storage):
                return None
            del storage
            block = sharing.share(tensor)
            if block is None:
                return None
            storage = tensor.untyped_storage()
        elif block.kind == MAPPED and not sharing.is_current(block):
            return None
        where = geometry(tensor)
    if block.number == UNTRACKED:
        recycling.prepare_to_send(block)
    return block, storage, where


def decode(data: bytes) -> Any:
    """What is in such a message, if its like was here before. Else None, and nothing is taken."""
    end = len(data) - TRAILER - COUNT.size
    (count,) = COUNT.unpack_from(data, end)
    start = end - count * REFERENCE.size
    shape = _shapes.get(data[:start])
    if shape is None:
        return None
    if count == 1:
        number, nbytes = REFERENCE.unpack_from(data, start)
        tensor = take_tensor(number, nbytes, shape[2][0])
        return tensor if tensor is None or shape[0] is torch.Tensor else _build(shape, [tensor])
    tensors = take_tensors(REFERENCE.iter_unpack(data[start:end]), shape[2])
    return None if tensors is None else _build(shape, tensors)


def learn(obj: Any) -> None:
    """Such an object came the general way: know its like the next time."""
    cls = type(obj)
    if cls is torch.Tensor:
        content: Any = (), [obj]
    elif cls in (dict, list, tuple):
        content = _tensors_in(obj)
        if content is None:
            return
    else:
        return
    keys, tensors = content
    if any(tensor.requires_grad or is_unusual(tensor) for tensor in tensors):
        return
    shape = (cls, keys, tuple(geometry(tensor) for tensor in tensors))
    if shape not in _pickles:
        _pickle_of(shape)
