"""The shared memory that this process makes, and uses again.

Fresh shared memory costs two to four system calls, and a page fault for every 4 KiB on both sides: twenty times as
much as copying into it. So a block is kept when its tensor is gone. It is in a ring with the others of its size, in
the order of their last use: the block at the head was used longest ago, so it is the likeliest to be free, and checking
a few from the head on is enough.

A storage has exactly as many bytes as its tensor, because ``torch.save`` writes all of it. Memory comes in coarser
steps, so a block can be fitted with a storage of another size, which costs a mapping and no page.

Invariants:

* While a thread fills a block, no ring has it, so two threads never fill the same one. If the process forks meanwhile,
  the child may have the tensor that the block is being filled for, so the block is retired afterwards.
* ``fallocate`` reserves the pages of a new block: running out of memory is an error then, not a bus error later.
* More than the limit is never *kept*: blocks beyond it are made if tensors need them, and retired when they are free.
* What a block costs does not grow with their number. No process tells this one that it has dropped a block, so each
  new block checks a few of the others, all in turn.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import time
from collections import deque
from collections.abc import Callable
from typing import Final, TypeVar

import torch

from ..errors import ResourceError
from ..transport.fork import reset_in_child
from . import anonymous, limits, maintenance, recycling, state_lock, storages
from .block import Block
from .block_fields import MADE

T = TypeVar("T")

#: How many blocks at the head of a ring are checked, and how many rings of other sizes.
_MAX_CHECKS: Final = 4
_MAX_OTHER_RINGS: Final = 4
#: How many blocks are checked, at a limit, to make room for one more.
_MAX_CHECKS_FOR_ROOM: Final = 16
_PAGE: Final = 4096
#: Above this, memory comes in steps of an eighth of the next smaller power of two.
_COARSE_FROM: Final = 64 * 1024

#: Blocks by their capacity, then by the bytes of their storage.
all_rings: dict[int, dict[int, deque[Block]]] = {}
#: Blocks between ``_acquire`` and ``_publish``, and whether this process was forked meanwhile.
_acquired: dict[Block, bool] = {}
#: Those that are still to be checked, in this round, to make room.
_candidates: deque[Block] = deque()


@reset_in_child
def _reset() -> None:
    for block in [*blocks(), *_acquired]:
        recycling.unmark(block)
    all_rings.clear()
    _acquired.clear()
    _candidates.clear()


def blocks() -> list[Block]:
    """All blocks of the rings. Under the lock."""
    rings = [ring for rings in list(all_rings.values()) for ring in list(rings.values())]
    return [block for ring in rings for block in list(ring) if block.kind == MADE]


def capacity_for(nbytes: int) -> int:
    """How much memory a block for ``nbytes`` gets."""
    step = _PAGE if nbytes <= _COARSE_FROM else max(_PAGE, 1 << (nbytes.bit_length() - 4))
    return -(-nbytes // step) * step


def fill_block(nbytes: int, fill: Callable[[Block], T], is_short: bool = False) -> T | None:
    """Take a block, and return what ``fill(block)`` returns, which may fill the block and let something use it.

    The block's storage has ``nbytes`` bytes, more than 0, with arbitrary values, and nothing else uses the block.
    Returns None if no descriptor is free. Raises ResourceError if there is no memory.

    Args:
        is_short: ``fill`` takes little time, and no other lock. So it may run under the lock, which is faster.
    """
    if is_short:
        with state_lock.lock:
            found = fill_free_block(nbytes, fill)
        if found is not None:
            return found
    block = _acquire(nbytes)
    if block is None:
        return None
    try:
        return fill(block)
    finally:
        _publish(block)


def fill_free_block(nbytes: int, fill: Callable[[Block], T]) -> T | None:
    """The same, if a block of just this size is free; else None. Under the lock, which ``fill`` must not let go.

    The block stays in its ring: its ``users`` keep finalizers that run meanwhile from taking it.
    """
    recycling.drain_finalizers()
    rings = all_rings.get(capacity_for(nbytes))
    ring = rings.get(nbytes) if rings else None
    block = _free_one(ring)
    if ring is None or block is None:
        return None
    block.users += 1
    block.used_at = time.monotonic()
    ring.append(block)
    try:
        return fill(block)
    finally:
        block.users -= 1


_Source = torch.Tensor | torch.UntypedStorage


def copy(source: _Source, start: int, nbytes: int, is_short: bool) -> tuple[Block, torch.UntypedStorage] | None:
    """A block with a copy of ``nbytes`` of ``source``, from the byte ``start`` of it on; else as above.

    The second is the block's storage, which keeps it in use.
    """
    return fill_block(nbytes, functools.partial(_copy, source, start, nbytes), is_short)


def _copy(source: _Source, start: int, nbytes: int, block: Block) -> tuple[Block, torch.UntypedStorage]:
    storage = block.storage
    # The address only now: while the block was made, another thread may have moved the source into shared memory.
    ctypes.memmove(block.address, source.data_ptr() + start, nbytes)
    return block, storage


def _acquire(nbytes: int) -> Block | None:
    capacity = capacity_for(nbytes)
    with state_lock.lock:
        recycling.drain_finalizers()
        rings = all_rings.setdefault(capacity, {})
        block = _free_one(rings.get(nbytes))
        if block is not None:
            _acquired[block] = False
            return block
        block = _free_one_of_another_size(rings, nbytes)
        if block is None and not _may_make(capacity):
            return None
    try:
        return _make(nbytes, capacity) if block is None else _fit(block, nbytes)
    except ResourceError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            return None
        raise


def _free_one(ring: deque[Block] | None) -> Block | None:
    if ring:
        for _ in range(min(_MAX_CHECKS, len(ring))):
            if not ring:
                break
            block = ring.popleft()
            if block.kind == MADE:
                if recycling.is_free(block):
                    block.has_content = False
                    return block
                if block.kind == MADE:
                    ring.append(block)
    return None


def _free_one_of_another_size(rings: dict[int, deque[Block]], nbytes: int) -> Block | None:
    for size in list(rings)[:_MAX_OTHER_RINGS]:
        if size == nbytes:
            continue
        ring = rings.pop(size, None)
        block = _free_one(ring)
        if ring:
            rings.setdefault(size, deque()).extend(ring)  # at the end: others are checked first the next time
        if block is not None:
            return block
    return None


def _may_make(capacity: int) -> bool:
    """Make room for one more block, as far as that helps; False if there are no descriptors. Under the lock."""
    for _ in range(_MAX_CHECKS_FOR_ROOM):
        has_descriptor = recycling.open_blocks < limits.max_open_blocks()
        if has_descriptor and recycling.made_bytes + capacity <= limits.memory_limit():
            return True
        if not _candidates:
            _candidates.extend(blocks())
            if not _candidates:
                break
        block = _candidates.popleft()
        if block.kind == MADE and block not in _acquired and recycling.is_free(block):
            recycling.retire(block)  # its ring drops it later
    return recycling.open_blocks < limits.max_open_blocks()


def _fit(old: Block, nbytes: int) -> Block:
    """Use a free block's memory for a storage of another size."""
    try:
        storage = storages.open_shared(old.fd, nbytes)
        block = Block(MADE, storage, storages.descriptor(storage), old.capacity)
    finally:
        with state_lock.lock:
            recycling.retire(old)
    _add(block)
    return block


def _make(nbytes: int, capacity: int) -> Block:
    limits.check_memory(capacity)
    with contextlib.closing(anonymous.Descriptor(anonymous.create())) as memory:
        anonymous.reserve(memory.fd, capacity)
        storage = storages.open_shared(memory.fd, nbytes)
    block = Block(MADE, storage, storages.descriptor(storage), capacity)
    _add(block)
    return block


def _add(block: Block) -> None:
    with state_lock.lock:
        recycling.add(block)
        _acquired[block] = False


def _publish(block: Block) -> None:
    """Put the block into its ring: what uses it now decides when it is free."""
    with state_lock.lock:
        forked = _acquired.pop(block, None)
        if forked is None:
            return  # in the child of a fork, which does not know the block
        if forked:
            recycling.retire(block)
            return
        block.used_at = time.monotonic()
        all_rings.setdefault(block.capacity, {}).setdefault(block.nbytes, deque()).append(block)


def _retire_free(idle_since: float | None) -> None:
    """Retire the free blocks: all of them, or those that nobody has used since then."""
    # A finalizer may run at any allocation in here, and may fill blocks.
    for rings in list(all_rings.values()):
        for ring in list(rings.values()):
            for _ in range(min(len(ring), recycling.MAX_PER_POLL)):
                if not ring:
                    break
                block = ring.popleft()
                if block.kind != MADE:
                    continue
                if recycling.is_free(block) and (idle_since is None or block.used_at < idle_since):
                    recycling.retire(block)
                elif block.kind == MADE:
                    ring.append(block)
        for size in [size for size, ring in rings.items() if not ring]:
            del rings[size]


@maintenance.on_period
def _maintain(now: float) -> None:
    over = recycling.made_bytes > limits.memory_limit()
    _retire_free(None if over else now - recycling.IDLE_TIMEOUT)


def trim() -> None:
    """Retire all blocks that are free now."""
    with state_lock.lock:
        recycling.drain_finalizers()
        _retire_free(None)


@state_lock.before_fork
def _before_fork() -> None:
    """The child will have the tensors of this process, too."""
    for block in _acquired:
        _acquired[block] = True
    for block in blocks():
        if block.in_use():
            recycling.retire(block)
