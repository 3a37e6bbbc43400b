"""How a tensor comes to be on a block: it is made there, or moved there when it is first written.

A tensor that alone owns its storage is moved into a block of the pool: one copy, into warm memory. torch moves one
with views, and a bare storage, into shared memory of torch's own. A tensor in shared memory stays where it is. In each
of the three cases the writer's tensor and the reader's have the same memory.

Invariant: of two threads that write the same tensor at once, one moves it, and the other finds it moved. So a small
tensor is moved under the lock, and a large one, whose copying takes long, while its storage is in ``_moving``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import threading
import warnings
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, Final

import torch
import torch.multiprocessing
from torch.multiprocessing import reductions

from .. import _native
from ..errors import ResourceError
from ..transport.fork import reset_in_child
from . import limits, pool, recycling, state_lock, storages
from .block import Block, Geometry
from .block_fields import MAPPED
from .slices import aligned, cut_shared, slice_of

#: A view is copied without the gaps between its elements if it spans so many times its elements, and so many bytes.
_SPARSE_FACTOR: Final = 16
_SPARSE_BYTES: Final = 1 << 20
#: Up to so many bytes are copied in less time than another thread needs to wake up.
_SMALL: Final = 64 * 1024

_OWN_FILE: Final = (
    "a tensor with views, mapped from a file for this process alone, is copied instead of shared: a change on one side "
    "is not seen on the other. Map it with torch.from_file(..., shared=True), or write tensor.clone()"
)


class _Mover:
    """A thread that moves a storage, and the event for which others wait."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.done = threading.Event()


#: Which thread moves a storage, by the address of torch's object for it.
_moving: dict[int, _Mover] = {}


@reset_in_child
def _reset() -> None:
    _moving.clear()


def is_current(block: Block) -> bool:
    """Whether the block of a storage can be sent. If not, because its maker is dead, the storage has none any more."""
    if block.kind != MAPPED or recycling.is_current(block):
        return True
    with state_lock.lock:
        recycling.retire(block)
    return False


def needs_torch_reducer(storage: torch.UntypedStorage) -> bool:
    """Whether only torch's own reductions can share this: by the user's choice it has a name in the file system."""
    return not storages.CAN_SHARE_FD or (
        storage.is_shared() and torch.multiprocessing.get_sharing_strategy() == "file_system"
    )


class IsSlice(Exception):
    """The storage to be shared is a slice of shared memory: another thread has moved it there meanwhile."""


def share(tensor: torch.Tensor) -> Block | None:
    """Get a dense CPU tensor of more than 0 bytes onto a block.

    Returns None, with one warning, if there is no descriptor for it; also if it would have to wait for itself.
    Raises ResourceError if there is no memory, and IsSlice if it is on a slice, perhaps only now.
    """
    geometry = storages.geometry(tensor)
    with state_lock.lock:
        storage = tensor.untyped_storage()
        block = recycling.block_of(storage)
        if block is not None:
            return block
        if slice_of(storage) is not None:
            raise IsSlice
        movable = not storages.is_shared(storage) and storages.is_sole_owner(tensor, storage)
        # The order matters: a thread that moves it swaps the storages before it leaves _moving. One that begins now
        # waits for the lock.
        small = movable and storage.nbytes() <= _SMALL
        if small and storage._cdata not in _moving and tensor.untyped_storage()._cdata == storage._cdata:
            block = pool.fill_free_block(storage.nbytes(), functools.partial(_move, tensor, storage, geometry))
            if block is not None:
                return block
        key = storage._cdata
        del storage  # two threads that share the same tensor must not count each other as owners
    with _moved_by_this_thread(key, tensor) as is_this_thread:
        if not is_this_thread:
            return None
        with state_lock.lock:
            storage = tensor.untyped_storage()
            block = recycling.block_of(storage)
            if block is not None:
                return block
            if slice_of(storage) is not None:
                raise IsSlice
            movable = not storages.is_shared(storage) and storages.is_sole_owner(tensor, storage)
        if not movable:
            return _share_storage(storage)
        block = pool.fill_block(storage.nbytes(), functools.partial(_move, tensor, storage, geometry))
        if block is None:
            limits.warn_of_copies()
    return block


@contextlib.contextmanager
def _moved_by_this_thread(key: int, tensor: torch.Tensor | None = None) -> Iterator[bool]:
    """Let no other thread move meanwhile the storage with this key, or that of ``tensor``; waits for one that does.

    Yields False if the wait would not end: a finalizer or a signal handler writes the tensor that its own thread is
    just moving, or runs while that thread has the lock.
    """
    mover = _Mover()
    try:
        while (other := _moving.setdefault(key, mover)) is not mover:
            if other.thread == mover.thread or state_lock.is_locked_by_this_thread():
                yield False
                return
            other.done.wait(1.0)
            if tensor is not None:
                key = tensor.untyped_storage()._cdata  # another one, if it has been moved
        yield True
    finally:
        if _moving.get(key) is mover:
            del _moving[key]
        mover.done.set()


def _move(tensor: torch.Tensor, storage: torch.UntypedStorage, geometry: Geometry, block: Block) -> Block:
    block.left_memory = storages.move(tensor, recycling.prototype(block, geometry), storage, block.address)
    return block


def move_to(tensor: torch.Tensor, make: Callable[[], torch.UntypedStorage]) -> bool:
    """Move a dense CPU tensor, which alone owns its private storage, onto the storage that ``make`` makes.

    Returns False, and leaves it where it is, if that is not so, or not any more.
    """
    geometry = storages.geometry(tensor)
    with _moved_by_this_thread(tensor.untyped_storage()._cdata, tensor) as is_this_thread:
        if not is_this_thread:
            return False
        with state_lock.lock:
            storage = tensor.untyped_storage()
            if storage.is_shared() or not storages.is_sole_owner(tensor, storage):
                return False
        target = make()
        if target.nbytes() != storage.nbytes():
            return False
        left = storages.move(tensor, storages.place(target, *geometry), storage, target.data_ptr())
        storages.keep_alive(target, left)
        return True


def goes_by_value(block: Block | None, owned_blocks: Container[Block] | None) -> bool:
    """Whether a tensor on this block, or on none, is to be copied: ``owned_blocks`` is given and lacks the block."""
    return owned_blocks is not None and (block is None or block not in owned_blocks)


def span_bytes(tensor: torch.Tensor) -> int:
    """How many bytes of its storage a dense tensor of at least one element spans."""
    size: int = (tensor.numel() if tensor.is_contiguous() else storages.span(tensor)) * tensor.element_size()
    return size


def copy_all(tensors: Sequence[tuple[torch.Tensor, int]]) -> tuple[Block, torch.UntypedStorage] | None:
    """A block with the values of several dense tensors, as slices in this order, and its storage.

    Returns None if there is no descriptor for it. Raises ResourceError if there is no memory.

    Args:
        tensors: each with how many bytes it spans.
    """
    nbytes = 0
    for _, each in tensors:
        nbytes = aligned(nbytes) + each
    return pool.fill_block(nbytes, functools.partial(_copy_all, tensors), is_short=nbytes <= _SMALL)


def _copy_all(tensors: Sequence[tuple[torch.Tensor, int]], block: Block) -> tuple[Block, torch.UntypedStorage]:
    storage = block.storage
    address, shift = block.address, 0
    for tensor, nbytes in tensors:
        ctypes.memmove(address + shift, tensor.data_ptr(), nbytes)
        shift = aligned(shift + nbytes)
    return block, storage


def dense(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The tensor, or a contiguous copy if its gaps are large, and how many elements of its storage it spans."""
    span = storages.span(tensor)
    if span > _SPARSE_FACTOR * tensor.numel() and span * tensor.element_size() > _SPARSE_BYTES:
        tensor = tensor.detach().contiguous()
        span = tensor.numel()
    return tensor, span


def copy(tensor: torch.Tensor) -> tuple[Block, torch.UntypedStorage, Geometry] | None:
    """A block with the values of a dense CPU tensor of at least one element: block, storage, geometry of the copy.

    The copy has the tensor's strides, unless its gaps are large. Returns None, with one warning, if there is no
    descriptor for it. Raises ResourceError if there is no memory.
    """
    tensor, span = dense(tensor)
    code, _, size, stride = storages.geometry(tensor)
    nbytes = span * tensor.element_size()
    copied = pool.copy(tensor, 0, nbytes, is_short=nbytes <= _SMALL)
    if copied is None:
        limits.warn_of_copies()
        return None
    return *copied, (code, 0, size, stride)


def share_storage(storage: torch.UntypedStorage) -> Block | None:
    """Get a storage of more than 0 bytes, with all tensors on it, onto a block; else as ``share``."""
    with _moved_by_this_thread(storage._cdata) as is_this_thread:
        return recycling.block_of(storage) or _share_storage(storage) if is_this_thread else None


def _share_storage(storage: torch.UntypedStorage) -> Block | None:
    if slice_of(storage) is not None:
        raise IsSlice  # torch would move it out of the memory that others see
    try:
        fd = storages.share(storage)
    except ResourceError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            limits.warn_of_copies()
            return None
        raise
    if fd < 0:
        warnings.warn(_OWN_FILE, RuntimeWarning, stacklevel=2)
        return None
    with state_lock.lock:
        recycling.drain_finalizers()
        return recycling.adopt(storage, fd)


def new(geometry: Geometry, nbytes: int) -> torch.Tensor | None:
    """A new tensor in a block of ``nbytes`` > 0 bytes, its values arbitrary. None if there is no descriptor for it."""
    return pool.fill_block(nbytes, functools.partial(_place, geometry), is_short=True)


def _place(geometry: Geometry, block: Block) -> torch.Tensor:
    return recycling.prototype(block, geometry).detach()


def _reduce_for_torch(storage: torch.UntypedStorage) -> Any:
    """Mark the block as escaped: torch's own multiprocessing passes it on to processes that do not count."""
    found = slice_of(storage)
    if found is not None:
        return rebuild_slice, (found.base, found.shift, storage.nbytes())  # the base is reduced here next
    block = recycling.block_of(storage)
    if block is not None:
        with state_lock.lock:
            recycling.mark_escaped(block)
    return reductions.reduce_storage(storage)


def rebuild_slice(base: torch.UntypedStorage, shift: int, nbytes: int) -> torch.UntypedStorage:
    """A slice of a storage that torch has passed on."""
    return cut_shared(storages.lasting_memory(base), base, shift, nbytes)


if _native.core is not None and storages.CAN_RECYCLE:
    storages.set_up_native_move(_native.core, _moving, pool.all_rings, recycling.is_free)

storages.keep_reducer_registered(torch.UntypedStorage, _reduce_for_torch)
