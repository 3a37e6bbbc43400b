"""Tensors by reference: what travels is the descriptor of the shared storage and how the tensor lies on it.

Two tensors on one storage in one message stay so, because pickle meets the same storage object twice. Dense CPU
tensors are taken apart here; what they are made of (and only that) differs for sparse, nested, conj and neg ones.
Subclasses and quantized tensors take torch's own ``__reduce_ex__``, which keeps the quantizer and ends at their
storages, and so here. CUDA and meta tensors go through ``torch.multiprocessing.reductions``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.multiprocessing
from torch.multiprocessing import reductions
from torch.utils.hooks import warn_if_has_hooks

from ..memory import storages
from .reducers import Encoder, inbound_fd, register, register_family


def _reduce_tensor(encoder: Encoder, tensor: torch.Tensor) -> Any:
    _refuse_non_leaf(tensor)
    warn_if_has_hooks(tensor)
    parameter = isinstance(tensor, torch.nn.Parameter)
    if tensor.is_conj():
        return _restore, (_restore_conj, (_without_grad(tensor).conj(),), parameter, tensor.requires_grad)
    if tensor.is_neg():
        bare = storages.negated_view(_without_grad(tensor))
        return _restore, (storages.negated_view, (bare,), parameter, tensor.requires_grad)
    if tensor.is_nested:
        parts = storages.nested_parts(_without_grad(tensor))
        return _restore, (storages.nested_from, (parts,), parameter, tensor.requires_grad)
    if tensor.layout is not torch.strided:
        dense, coalesced = storages.sparse_parts(_without_grad(tensor))
        args = (tensor.layout, dense, tensor.shape, coalesced)
        return _restore, (_rebuild_sparse, args, parameter, tensor.requires_grad)
    if tensor.is_quantized:
        return NotImplemented
    if tensor.device.type != "cpu":
        return reductions.reduce_tensor(tensor)
    storages.move_if_sole_owner(tensor)
    return _rebuild_dense, (
        type(tensor),
        tensor.untyped_storage(),
        tensor.dtype,
        tensor.storage_offset(),
        tuple(tensor.size()),
        tensor.stride(),
        tensor.requires_grad,
    )


def _reduce_subclass(encoder: Encoder, tensor: torch.Tensor) -> Any:
    """A subclass that leaves pickling and dispatch to torch is its memory, its class and its attributes."""
    cls = type(tensor)
    _refuse_non_leaf(tensor)
    plain = cls.__reduce_ex__ in (torch.Tensor.__reduce_ex__, torch.nn.Parameter.__reduce_ex__)
    if not plain or "__torch_dispatch__" in {name for base in _own_bases(cls) for name in vars(base)}:
        return NotImplemented
    bare = torch.Tensor.as_subclass(torch.Tensor.detach(tensor), torch.Tensor)
    return _rebuild_subclass, (cls, bare, tensor.requires_grad, tensor.__dict__)


def _own_bases(cls: type) -> list[type]:
    return [base for base in cls.__mro__ if base not in torch.nn.Parameter.__mro__]


def _rebuild_subclass(cls: Any, bare: torch.Tensor, requires_grad: bool, attributes: dict[str, Any]) -> torch.Tensor:
    tensor: torch.Tensor = bare.as_subclass(cls)
    tensor.requires_grad_(requires_grad)
    tensor.__dict__.update(attributes)
    return tensor


def _refuse_non_leaf(tensor: torch.Tensor) -> None:
    if tensor.requires_grad and not tensor.is_leaf:
        raise RuntimeError(
            "a tensor that requires grad and is not a leaf cannot be sent, because autograd does not cross processes: "
            "send tensor.detach()"
        )


def _without_grad(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach() if tensor.requires_grad else tensor


def _rebuild_dense(
    cls: type[torch.Tensor],
    storage: torch.UntypedStorage,
    dtype: torch.dtype,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool,
) -> torch.Tensor:
    tensor = torch.empty((0,), dtype=dtype, device="cpu").set_(storage, offset, size, stride)
    if cls is torch.nn.Parameter:
        return torch.nn.Parameter(tensor, requires_grad=requires_grad)
    tensor.requires_grad = requires_grad
    return tensor


def _restore(rebuild: Any, args: tuple[Any, ...], parameter: bool, requires_grad: bool) -> torch.Tensor:
    tensor: torch.Tensor = rebuild(*args)
    return torch.nn.Parameter(tensor, requires_grad) if parameter else tensor.requires_grad_(requires_grad)


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
    if storage.device.type != "cpu":
        return reductions.reduce_storage(storage)
    if storage.nbytes() == 0:
        return torch.UntypedStorage, (0,)
    shared_by_name = storage.is_shared() and torch.multiprocessing.get_sharing_strategy() == "file_system"
    if shared_by_name or not storages.CAN_SHARE_FD:
        return reductions.reduce_storage(storage)
    fd, nbytes = storages.share(storage)
    return _open_storage, (encoder.attach(fd, storage), nbytes)


def _open_storage(index: int, nbytes: int) -> torch.UntypedStorage:
    return storages.open_shared(inbound_fd(index), nbytes)


def _reduce_typed(encoder: Encoder, storage: Any) -> Any:
    return _rebuild_typed, (type(storage), storage._untyped_storage, storage.dtype)


def _rebuild_typed(cls: Any, untyped: torch.UntypedStorage, dtype: torch.dtype) -> Any:
    if cls is torch.storage.TypedStorage:
        typed: Any = torch.storage.TypedStorage
        return typed(wrap_storage=untyped, dtype=dtype, _internal=True)
    return cls(wrap_storage=untyped, _internal=True)


register(torch.Tensor, _reduce_tensor)
register(torch.nn.Parameter, _reduce_tensor)
register_family(torch.Tensor, _reduce_subclass)
register(torch.UntypedStorage, _reduce_untyped)
register(torch.storage.TypedStorage, _reduce_typed)
for _cls in torch._storage_classes:  # the legacy FloatStorage and its like
    if _cls is not torch.UntypedStorage:
        register(_cls, _reduce_typed)
