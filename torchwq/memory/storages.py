"""torch's shared storages. The only module that uses private interfaces of torch.

Checked on torch 2.13.0 (CPU). Used, and what is done where it is missing:

* ``UntypedStorage._share_fd_cpu_()`` moves a storage into shared memory in place, if it is not there yet, and returns
  the descriptor, which stays torch's, and the size. ``UntypedStorage._new_shared_fd_cpu(fd, nbytes)`` maps it in
  another process; it duplicates the descriptor. Both are what ``torch.multiprocessing.reductions`` uses for its
  ``file_descriptor`` strategy; without them tensors go through those reductions.
* ``torch._C._storage_Use_Count(cdata)``: how many owners a storage has. Without it no storage counts as solely
  owned, and torch moves each one into /dev/shm itself.
* ``torch.autograd._unsafe_preserve_version_counter``: moving a tensor changes no value, so a backward pass that
  needs it must not be refused. Without it no tensor is moved here either.
* ``torch._lazy_clone`` and ``Tensor._use_count``: keep the memory that a moved tensor leaves for arrays that point
  into it. Without them such an array must not be used after the move, as after ``share_memory_()``.
* ``torch._neg_view``, ``torch._nested_view_from_buffer``, ``Tensor._nested_tensor_*``, ``Tensor._indices`` and
  ``_values``, ``Tensor._coalesced_``: what torch's own reductions use to take apart and put together such tensors.

Lifetime: a shared storage owns its descriptor and its mapping in each process. It is freed in a process when the last
tensor on it is; the memory itself when no process maps it and no message holds its descriptor.
"""

from __future__ import annotations

import os
import resource
import threading
from typing import Any, Final

import torch

from ..errors import ResourceError
from ..transport.process import reset_in_child
from . import blocks

_private: Any = torch.UntypedStorage

CAN_SHARE_FD: Final = hasattr(torch.UntypedStorage, "_share_fd_cpu_") and hasattr(
    torch.UntypedStorage, "_new_shared_fd_cpu"
)
_use_count: Any = getattr(torch._C, "_storage_Use_Count", None)
_same_version: Any = getattr(torch.autograd, "_unsafe_preserve_version_counter", None)
_lazy_clone: Any = getattr(torch, "_lazy_clone", None)
_tensor_use_count: Any = getattr(torch.Tensor, "_use_count", lambda tensor: 1)
#: Two threads may write one tensor at once; it is moved once. Reentrant for the sake of finalizers.
_moving = threading.RLock()


@reset_in_child
def _unlock() -> None:
    global _moving
    _moving = threading.RLock()


#: One owner is the tensor, one the Python object of the storage.
_SOLE_OWNER: Final = 2
_SHM: Final = "/dev/shm"


def share(storage: torch.UntypedStorage) -> tuple[int, int]:
    """Move ``storage`` into shared memory in place, if it is not there; returns (descriptor, bytes).

    The descriptor belongs to the storage. Every tensor on the storage sees the shared memory afterwards.
    Raises ResourceError if torch would put it into a /dev/shm that is too small for it (touching that would end
    the process with a bus error), or if descriptors have run out.
    """
    try:
        with _moving:
            if not storage.is_shared():
                _check_room(storage.nbytes())
                _keep_for_arrays(storage)
            fd, nbytes = storage._share_fd_cpu_()
    except RuntimeError as error:
        _hold(storage, None)  # it has left nothing
        raise ResourceError(
            f"torch could not move a storage of {storage.nbytes()} bytes into shared memory: {_limit(error)}"
        ) from error
    return int(fd), int(nbytes)


def _keep_for_arrays(storage: torch.UntypedStorage) -> None:
    """Let the memory that ``storage`` is about to leave live as long as the storage, if arrays may point into it.

    An array made by ``tensor.numpy()`` keeps only the storage alive, and torch would free the memory under it. A lazy
    clone owns that memory too. The memory of ``torch.from_numpy`` cannot be cloned so; it has its owner elsewhere.
    """
    if storage.resizable() or _lazy_clone is None:
        return  # no array was ever made of it
    try:
        _hold(storage, _lazy_clone(torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)))
    except RuntimeError:
        pass


def _hold(storage: Any, memory: Any) -> None:
    """Keep ``memory`` as long as ``storage``: torch keeps a storage's Python object for as long as the storage."""
    storage._torchwq_left_memory = memory


def _limit(error: RuntimeError) -> str:
    """Which limit torch has run into. It tells only by the text of its error."""
    if "file descriptor" in str(error) or "open files" in str(error):
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return (
            f"each one takes a file descriptor, and this process may have {soft} open (RLIMIT_NOFILE). "
            f"Raise it with `ulimit -n`, or keep fewer shared tensors at a time"
        )
    return str(error)


def _check_room(nbytes: int) -> None:
    try:
        stat = os.statvfs(_SHM)
    except OSError:
        return
    free = stat.f_bavail * stat.f_frsize
    if nbytes > free:
        raise ResourceError(
            0,
            f"a tensor of {nbytes} bytes that has views must be moved into {_SHM}, which has {free} bytes left: "
            f"enlarge it (docker: --shm-size), or write a tensor that alone owns its memory, e.g. tensor.clone()",
        )


def open_shared(fd: int, nbytes: int) -> torch.UntypedStorage:
    """The shared storage behind a descriptor from another process. The caller keeps and closes ``fd``."""
    try:
        storage: torch.UntypedStorage = _private._new_shared_fd_cpu(fd, nbytes)
    except RuntimeError as error:
        raise ResourceError(f"a shared tensor of {nbytes} bytes could not be mapped: {_limit(error)}") from error
    return storage


def move_if_sole_owner(tensor: torch.Tensor) -> None:
    """Give a private tensor that alone owns its storage a storage in anonymous shared memory, in place.

    Does nothing for any other tensor: ``share`` then moves its storage as torch does, with all views of it.
    Raises ResourceError if memory or descriptors have run out.
    """
    if _use_count is None or _same_version is None or not CAN_SHARE_FD:
        return
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.is_inference():
        return
    with _moving:
        storage = tensor.untyped_storage()
        nbytes = storage.nbytes()
        if nbytes == 0 or storage.is_shared() or _use_count(storage._cdata) > _SOLE_OWNER:
            return
        block = blocks.Descriptor(blocks.create())
        try:
            os.posix_fallocate(block.fd, 0, nbytes)
        except AttributeError:
            os.ftruncate(block.fd, nbytes)
        except OSError as error:
            raise blocks.exhausted(error) from error
        shared = open_shared(block.fd, nbytes)
        shared.copy_(storage)
        if _tensor_use_count(tensor) > 1:
            _hold(shared, storage)  # someone in C++ has the tensor, DLPack for one, and may point into its memory
        # The values stay what they were: autograd need not take this for a change.
        with torch.no_grad(), _same_version(tensor):
            tensor.set_(shared, tensor.storage_offset(), tensor.size(), tensor.stride())


def nested_parts(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Buffer, sizes, strides and offsets of a nested tensor of the strided layout."""
    private: Any = tensor
    return (
        private.values(),
        private._nested_tensor_size(),
        private._nested_tensor_strides(),
        private._nested_tensor_storage_offsets(),
    )


def nested_from(parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The nested tensor whose ``nested_parts`` these are; a view of the buffer, not a copy."""
    return torch._nested_view_from_buffer(*parts)


def sparse_parts(tensor: torch.Tensor) -> tuple[list[torch.Tensor], bool]:
    """The dense tensors that make up a sparse one, and whether it is coalesced (COO only)."""
    private: Any = tensor
    if tensor.layout is torch.sparse_coo:
        return [private._indices(), private._values()], tensor.is_coalesced()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()], False
    return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()], False


def negated_view(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory with the neg bit flipped."""
    return torch._neg_view(tensor)
