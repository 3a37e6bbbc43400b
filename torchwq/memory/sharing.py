"""How a tensor comes to be on a block: it is born there, or moved there when it is first written.

A tensor that alone owns its storage is moved into a block of the pool: one copy, in memory that is warm. One with
views is moved by torch, views and all, into shared memory of torch's own, and so is a bare storage. What is in shared
memory already stays where it is. In each of the three the writer's tensor aliases what the reader will see.

Invariant: of two threads that write the same tensor at once, one moves it, and the other finds it moved.
"""

from __future__ import annotations

import errno
import threading
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.multiprocessing
from torch.multiprocessing import reductions

from ..errors import ResourceError
from ..transport.process import reset_in_child
from . import limits, pool, recycling, storages
from .block import MAPPED, Block, Geometry

#: Reentrant for the sake of finalizers.
_moving = threading.RLock()


@reset_in_child
def _unlock() -> None:
    global _moving
    _moving = threading.RLock()


def is_current(block: Block) -> bool:
    """Whether the storage's block can be sent; if not, because its maker is dead, the storage has none any more."""
    if block.kind != MAPPED or recycling.is_current(block):
        return True
    with recycling.lock:
        recycling.give_up(block)
    return False


def is_for_torch(storage: torch.UntypedStorage) -> bool:
    """Whether only torch's own reductions can share this: it has a name in the file system, by the user's choice."""
    return not storages.CAN_SHARE_FD or (
        storage.is_shared() and torch.multiprocessing.get_sharing_strategy() == "file_system"
    )


def share(tensor: torch.Tensor) -> Block | None:
    """Get a dense CPU tensor of more than 0 bytes onto a block.

    Returns None, with one warning, if there is no descriptor for it. Raises ResourceError if there is no memory.
    """
    with _moving:
        storage = tensor.untyped_storage()
        block = recycling.block_of(storage)
        if block is not None:
            return block
        if not storage.is_shared() and storages.is_sole_owner(tensor, storage):
            block = _move(tensor, storage)
        else:
            del tensor
            block = share_storage(storage)
    if block is None:
        limits.warn_of_copies()
    return block


def _move(tensor: torch.Tensor, storage: torch.UntypedStorage) -> Block | None:
    block = pool.take(storage.nbytes())
    if block is not None:
        try:
            geometry = storages.geometry(tensor)
            block.keep(storages.move(tensor, recycling.template(block, geometry), storage, block.address))
        finally:
            pool.lend(block)
    return block


def share_storage(storage: torch.UntypedStorage) -> Block | None:
    """The same for a storage of more than 0 bytes, with all tensors on it."""
    with _moving:
        block = recycling.block_of(storage)
        if block is not None:
            return block
        try:
            fd, _ = storages.share(storage)
        except ResourceError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                return None
            raise
        with recycling.lock:
            recycling.settle()
            return recycling.adopt(storage, fd)


def new(geometry: Geometry, nbytes: int) -> torch.Tensor | None:
    """A new tensor in a block of ``nbytes`` > 0 bytes, its values arbitrary. None if there is no descriptor for it."""
    block = pool.take(nbytes)
    if block is None:
        return None
    try:
        return recycling.template(block, geometry).detach()
    finally:
        pool.lend(block)


def _reduce_for_torch(storage: torch.UntypedStorage) -> Any:
    """What torch's own multiprocessing passes on, someone sees of whom the ledger knows nothing."""
    block = recycling.block_of(storage)
    if block is not None:
        with recycling.lock:
            recycling.give_away(block)
    return reductions.reduce_storage(storage)


ForkingPickler.register(torch.UntypedStorage, _reduce_for_torch)
