"""Tensors by reference: a message has the number of a tensor's block, and the tensor's geometry on it.

Two tensors on one storage keep sharing it, because both refer to one block. This module takes dense CPU tensors apart,
and sparse, nested, conj and neg ones into dense ones. Subclasses and quantized tensors use torch's ``__reduce_ex__``,
which keeps the quantizer and ends at their storages, and so here. CUDA and meta tensors use
``torch.multiprocessing.reductions``. To a peer that shares no memory the values travel in the message.
"""

from __future__ import annotations

import pickle
from typing import Any

import torch
import torch.multiprocessing
from torch.multiprocessing import reductions
from torch.utils.hooks import warn_if_has_hooks

from ..errors import MarshalError
from ..memory import sharing, storages
from ..memory.block import Geometry
from ..memory.packing import max_own_blocks
from ..memory.recycling import block_of
from ..memory.slices import slice_of
from ..memory.storages import geometry
from . import subclass_state
from .reducers import (
    Encoder,
    attached_object,
    inbound_blocks,
    rebuilders,
    register,
    register_family,
    wants_original_tensors,
)


def is_unusual(tensor: torch.Tensor) -> bool:
    """Whether a tensor is anything but a plain dense one on the CPU."""
    return bool(
        tensor.layout is not torch.strided
        or tensor.is_conj()
        or tensor.is_neg()
        or tensor.is_nested
        or tensor.is_quantized
        or not tensor.is_cpu
    )


def _reduce_tensor(encoder: Encoder, tensor: torch.Tensor) -> Any:
    if tensor.requires_grad:
        _refuse_non_leaf(tensor)
        warn_if_has_hooks(tensor)
    if encoder.peer.same_process and encoder.owned_blocks is not None:
        tensor = tensor.detach().clone().requires_grad_(tensor.requires_grad)
    if encoder.peer.same_process:
        where = None if is_unusual(tensor) else (tensor.untyped_storage().data_ptr(), geometry(tensor))
        return _alias, (encoder.attach_object(tensor), type(tensor), tensor.requires_grad, where)
    if is_unusual(tensor):
        return _reduce_unusual(encoder, tensor)
    storage = tensor.untyped_storage()
    block = block_of(storage)
    if sharing.goes_by_value(block, encoder.owned_blocks):
        return _reduce_by_value(encoder, tensor)
    if block is None or not sharing.is_current(block):
        if storage.nbytes() == 0:
            return _reduce_with_storage(tensor, tensor)
        if slice_of(storage) is not None:
            return _refer(tensor, encoder.packing.refer(storage), geometry(tensor), packed=True)
        if sharing.needs_torch_reducer(storage):
            return _reduce_with_storage(tensor, tensor)
        many = encoder.block_count >= max_own_blocks()
        if many and not storage.is_shared() and storages.is_sole_owner(tensor, storage):
            return _refer(tensor, encoder.packing.move(tensor), geometry(tensor), packed=True)
        del storage
        try:
            block = sharing.share(tensor)
        except sharing.IsSlice:
            return _refer(tensor, encoder.packing.refer(tensor.untyped_storage()), geometry(tensor), packed=True)
        if block is None:
            return _reduce_to_copy(tensor)
        storage = tensor.untyped_storage()
    return _refer(tensor, encoder.attach_block(block, storage), geometry(tensor))


def _alias(
    index: int, cls: type[torch.Tensor], requires_grad: bool, where: tuple[int, Geometry] | None
) -> torch.Tensor:
    tensor: torch.Tensor = attached_object(index)
    return tensor if wants_original_tensors() else _as_leaf(alias(tensor, where), cls, requires_grad)


def alias(tensor: torch.Tensor, where: tuple[int, Geometry] | None) -> torch.Tensor:
    """Another tensor on the same memory, as the tensor lay when it was written.

    The reader calls this, and not the writer, so that until then the writer's tensor may be its storage's sole owner.

    Args:
        where: the address of the storage and the geometry then; None for an unusual tensor.
    """
    other = tensor.detach()
    if where is not None and geometry(other) != where[1] and other.untyped_storage().data_ptr() == where[0]:
        return storages.place(other.untyped_storage(), *where[1])
    return other


def _refer(tensor: torch.Tensor, index: int, geometry: Geometry, packed: bool = False) -> Any:
    """Reduce to the block with this index, or to the packed storage."""
    code, offset, size, stride = geometry
    where = index, code, offset, tuple(size), stride
    if type(tensor) is torch.Tensor and not tensor.requires_grad:
        return rebuild_packed if packed else rebuild, where
    return _rebuild_packed_leaf if packed else _rebuild_leaf, (type(tensor), tensor.requires_grad, *where)


def _reduce_with_storage(tensor: torch.Tensor, data: torch.Tensor) -> Any:
    """Reduce to the class of ``tensor`` and the storage of ``data``, which pickle reduces next."""
    code, offset, size, stride = geometry(data)
    where = code, offset, tuple(size), stride
    return _rebuild_dense, (type(tensor), data.untyped_storage(), *where, tensor.requires_grad)


def _reduce_by_value(encoder: Encoder, tensor: torch.Tensor) -> Any:
    if not tensor.numel():
        return _reduce_with_storage(
            tensor, torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")
        )
    bare, span = sharing.dense(tensor)
    return _refer(tensor, encoder.packing.copy(bare, span), geometry(bare), packed=True)


def rebuild(index: int, code: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
    """The tensor with this geometry on block ``index`` of the message being unpickled."""
    return inbound_blocks().tensor(index, (code, offset, size, stride))


def rebuild_packed(group: int, code: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
    """The tensor with this geometry on the packed storage ``group`` of the message being unpickled."""
    return inbound_blocks().packed_tensor(group, (code, offset, size, stride))


def _rebuild_packed_leaf(cls: type[torch.Tensor], requires_grad: bool, *where: Any) -> torch.Tensor:
    return _as_leaf(rebuild_packed(*where), cls, requires_grad)


def _rebuild_leaf(cls: type[torch.Tensor], requires_grad: bool, *where: Any) -> torch.Tensor:
    return _as_leaf(rebuild(*where), cls, requires_grad)


def _as_leaf(tensor: torch.Tensor, cls: type[torch.Tensor], requires_grad: bool) -> torch.Tensor:
    if cls is torch.nn.Parameter:
        return torch.nn.Parameter(tensor, requires_grad=requires_grad)
    return tensor.requires_grad_(requires_grad)


def _reduce_to_copy(tensor: torch.Tensor) -> Any:
    """Send the tensor's values, because this process has no descriptor left for a reference."""
    copy = tensor.detach().clone()
    data = pickle.PickleBuffer(storages.lasting_memory(copy.untyped_storage()))
    code, offset, size, stride = geometry(copy)
    return _rebuild_copy, (type(tensor), tensor.requires_grad, data, code, offset, tuple(size), stride)


def _rebuild_copy(cls: type[torch.Tensor], requires_grad: bool, data: Any, *geometry: Any) -> torch.Tensor:
    return _as_leaf(storages.place(_rebuild_storage(data), *geometry), cls, requires_grad)


def _reduce_unusual(encoder: Encoder, tensor: torch.Tensor) -> Any:
    """Take the tensor apart into dense ones on the CPU, or leave it to torch."""
    if tensor.is_conj():
        return _restore, (_restore_conj, (_without_grad(tensor).conj(),), type(tensor), tensor.requires_grad)
    if tensor.is_neg():
        bare = storages.negated_view(_without_grad(tensor))
        return _restore, (storages.negated_view, (bare,), type(tensor), tensor.requires_grad)
    if tensor.is_nested:
        parts = storages.nested_parts(_without_grad(tensor))
        return _restore, (storages.nested_from, (parts,), type(tensor), tensor.requires_grad)
    if tensor.layout is not torch.strided:
        dense, coalesced = storages.sparse_parts(_without_grad(tensor))
        args = (tensor.layout, dense, tensor.shape, coalesced)
        return _restore, (_rebuild_sparse, args, type(tensor), tensor.requires_grad)
    if tensor.is_quantized:
        return NotImplemented
    _refuse_device(encoder, tensor.device)
    return reductions.reduce_tensor(tensor)


def _reduce_subclass(encoder: Encoder, tensor: torch.Tensor) -> Any:
    """Send a subclass that leaves pickling and dispatch to torch as its memory, its class and its attributes."""
    cls = type(tensor)
    _refuse_non_leaf(tensor)
    torchs_own = cls.__reduce_ex__ in (torch.Tensor.__reduce_ex__, torch.nn.Parameter.__reduce_ex__)
    own_bases = (base for base in cls.__mro__ if base not in torch.nn.Parameter.__mro__)
    if not torchs_own or any("__torch_dispatch__" in vars(base) for base in own_bases):
        return NotImplemented
    bare = torch.Tensor.as_subclass(torch.Tensor.detach(tensor), torch.Tensor)
    return subclass_state.reduced(_rebuild_subclass, (cls, bare, tensor.requires_grad), tensor, torch.Tensor)


def _rebuild_subclass(cls: Any, bare: torch.Tensor, requires_grad: bool) -> torch.Tensor:
    tensor: torch.Tensor = bare.as_subclass(cls)
    tensor.requires_grad_(requires_grad)
    return tensor


def _refuse_non_leaf(tensor: torch.Tensor) -> None:
    if tensor.requires_grad and not tensor.is_leaf:
        raise RuntimeError(
            "a tensor that requires grad and is not a leaf cannot be sent, because autograd does not cross processes: "
            "send tensor.detach()"
        )


def _refuse_device(encoder: Encoder, device: torch.device) -> None:
    """Refuse memory of a device for another machine: torch sends a reference to it. The device "meta" has none."""
    if not encoder.peer.shares_memory and device.type != "meta":
        raise MarshalError(f"a tensor on {device} cannot be sent to another machine: send tensor.cpu()")


def _without_grad(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach() if tensor.requires_grad else tensor


def _rebuild_dense(
    cls: type[torch.Tensor],
    storage: torch.UntypedStorage,
    code: int,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool,
) -> torch.Tensor:
    return _as_leaf(storages.place(storage, code, offset, size, stride), cls, requires_grad)


def _restore(rebuild: Any, args: tuple[Any, ...], cls: type[torch.Tensor], requires_grad: bool) -> torch.Tensor:
    return _as_leaf(rebuild(*args), cls, requires_grad)


def _restore_conj(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.conj()


def _rebuild_sparse(
    layout: torch.layout, parts: list[torch.Tensor], shape: torch.Size, coalesced: bool
) -> torch.Tensor:
    if layout is torch.sparse_coo:
        return torch.sparse_coo_tensor(parts[0], parts[1], shape, is_coalesced=coalesced, device=parts[1].device)
    compressed: Any = torch.sparse_compressed_tensor  # its annotations lack this signature
    tensor: torch.Tensor = compressed(*parts, shape, layout=layout, device=parts[1].device)
    return tensor


def _reduce_untyped(encoder: Encoder, storage: torch.UntypedStorage) -> Any:
    if encoder.peer.same_process:
        return attached_object, (encoder.attach_object(storage),)
    if storage.device.type != "cpu":
        _refuse_device(encoder, storage.device)
        return reductions.reduce_storage(storage)
    if storage.nbytes() == 0:
        return torch.UntypedStorage, (0,)
    if not encoder.peer.shares_memory:
        return _rebuild_storage, (pickle.PickleBuffer(storages.lasting_memory(storage)),)
    block = block_of(storage)
    if sharing.goes_by_value(block, encoder.owned_blocks):
        copied = sharing.copy(storages.place(storage, storages.CODES[torch.uint8], 0, (storage.nbytes(),), (1,)))
        block, storage = (None, storage) if copied is None else copied[:2]
    elif block is None or not sharing.is_current(block):
        if slice_of(storage) is not None:
            return _open_packed, (encoder.packing.refer(storage),)
        if sharing.needs_torch_reducer(storage):
            return reductions.reduce_storage(storage)
        block = sharing.share_storage(storage)
    if block is None:
        return _rebuild_storage, (pickle.PickleBuffer(storages.lasting_memory(storage.clone())),)
    return _open_storage, (encoder.attach_block(block, storage),)


def _rebuild_storage(data: Any) -> torch.UntypedStorage:
    return torch.frombuffer(data, dtype=torch.uint8).untyped_storage()


def _open_storage(index: int) -> torch.UntypedStorage:
    return inbound_blocks().storage(index)


def _open_packed(group: int) -> torch.UntypedStorage:
    return inbound_blocks().packed_storage(group)


def _reduce_typed(encoder: Encoder, storage: Any) -> Any:
    return _rebuild_typed, (type(storage), storage._untyped_storage, storage.dtype)


def _rebuild_typed(cls: Any, untyped: torch.UntypedStorage, dtype: torch.dtype) -> Any:
    if cls is torch.storage.TypedStorage:
        typed: Any = torch.storage.TypedStorage
        return typed(wrap_storage=untyped, dtype=dtype, _internal=True)
    return cls(wrap_storage=untyped, _internal=True)


def _reduce_memory_format(encoder: Encoder, memory_format: torch.memory_format) -> Any:
    """Send its name in ``torch``. torch reduces it to the bare name, which pickle looks up in all modules: after
    ``import multiprocessing`` first in ``__mp_main__``, which is another module in a worker."""
    return _memory_format, (str(memory_format).removeprefix("torch."),)


def _memory_format(name: str) -> torch.memory_format:
    found: torch.memory_format = getattr(torch, name)
    return found


register(torch.memory_format, _reduce_memory_format)
register(torch.Tensor, _reduce_tensor)
register(torch.nn.Parameter, _reduce_tensor)
register_family(torch.Tensor, _reduce_subclass)
register(torch.UntypedStorage, _reduce_untyped)
register(torch.storage.TypedStorage, _reduce_typed)
for _cls in torch._storage_classes:  # the legacy FloatStorage and its like
    if _cls is not torch.UntypedStorage:
        register(_cls, _reduce_typed)
rebuilders.update((_alias, attached_object, rebuild, _rebuild_leaf, rebuild_packed, _rebuild_packed_leaf, _open_packed))
rebuilders.update((_rebuild_copy, _rebuild_dense, _rebuild_subclass, _open_storage, subclass_state.put))
