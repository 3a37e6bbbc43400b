"""The shared memory that this process makes, and uses again.

Fresh shared memory costs a system call or four, and a page fault for every 4 KiB on both sides: that is twenty times
what copying into it costs. So a block is not given back when its tensor is gone. It stands in a ring with the others
of its size, in the order in which they were given out: the one at the head has been out for longest, so it is the
likeliest to be free, and looking at a few from the head on is enough.

A storage shows exactly as many bytes as its tensor has, because ``torch.save`` writes all of it. Memory comes in
coarser steps, so a block can be fitted with a storage of another size, which costs a mapping and no page.

Invariants:

* A block that is taken is in no ring until it is lent, so two threads never fill the same one. A fork in between
  spoils it: the child may have the tensor that it is being filled for, so it is given up when it is lent.
* Pages are reserved when a block is made (``fallocate``): running out is an error then, not a bus error later.
* More than the limit is never *kept*: blocks beyond it are made if tensors need them, and given up when they are free.
* What a block costs does not grow with how many there are. Nobody tells this process which of its blocks others do not
  use any more, so they are looked at: a few for each new one, all in turn.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections import deque
from collections.abc import Callable
from typing import Final, TypeVar

from ..errors import ResourceError
from ..transport.fork import reset_in_child
from . import anonymous, limits, maintenance, recycling, state_lock, storages
from .block import MADE, Block

T = TypeVar("T")

#: How many blocks at the head of a ring are looked at, and how many rings of other sizes.
_MAX_CHECKS: Final = 4
_MAX_OTHER_RINGS: Final = 4
#: How many blocks are looked at, at a limit, to make room for one more.
_MAX_CHECKS_FOR_ROOM: Final = 16
_PAGE: Final = 4096
#: Above this, memory comes in steps of an eighth of the next smaller power of two.
_COARSE_FROM: Final = 64 * 1024

#: Blocks by the memory they have, then by the bytes their storage shows.
_rings: dict[int, dict[int, deque[Block]]] = {}
#: Blocks between ``_acquire`` and ``_publish``, and whether this process was forked meanwhile.
_acquired: dict[Block, bool] = {}
#: Those that are still to be looked at, in this round, to make room.
_candidates: deque[Block] = deque()


@reset_in_child
def _reset() -> None:
    for block in [*blocks(), *_acquired]:
        recycling.unmark(block)
    _rings.clear()
    _acquired.clear()
    _candidates.clear()


def blocks() -> list[Block]:
    """All blocks that are lent or free. Under the lock."""
    rings = [ring for rings in list(_rings.values()) for ring in list(rings.values())]
    return [block for ring in rings for block in list(ring) if block.kind == MADE]


def capacity_for(nbytes: int) -> int:
    """How much memory a block for ``nbytes`` gets."""
    step = _PAGE if nbytes <= _COARSE_FROM else max(_PAGE, 1 << (nbytes.bit_length() - 4))
    return -(-nbytes // step) * step


def fill_block(nbytes: int, fill: Callable[[Block], T]) -> T | None:
    """What ``fill(block)`` gives, which may fill the block and let something use it.

    The block's storage has ``nbytes`` bytes, more than 0, with arbitrary values, and nobody else has the block. Returns
    None if no descriptor can be had. Raises ResourceError if there is no memory.
    """
    block = _acquire(nbytes)
    if block is None:
        return None
    try:
        return fill(block)
    finally:
        _publish(block)


def fill_free_block(nbytes: int, fill: Callable[[Block], T]) -> T | None:
    """The same, if a block of just this size is free; else None. Under the lock, which ``fill`` must not let go.

    The block stays in its ring: a user of its own keeps finalizers that run meanwhile from taking it.
    """
    recycling.drain_finalizers()
    rings = _rings.get(capacity_for(nbytes))
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


def _acquire(nbytes: int) -> Block | None:
    capacity = capacity_for(nbytes)
    with state_lock.lock:
        recycling.drain_finalizers()
        rings = _rings.setdefault(capacity, {})
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
            rings.setdefault(size, deque()).extend(ring)  # at the end: others are looked at first the next time
        if block is not None:
            return block
    return None


def _may_make(capacity: int) -> bool:
    """Make room for one more block, as far as that helps; False if there are no descriptors. Under the lock."""
    for _ in range(_MAX_CHECKS_FOR_ROOM):
        if (
            recycling.made_bytes + capacity <= limits.memory_limit()
            and recycling.open_blocks < limits.max_open_blocks()
        ):
            return True
        if not _candidates:
            _candidates.extend(blocks())
            if not _candidates:
                break
        block = _candidates.popleft()
        if block.kind == MADE and block not in _acquired and recycling.is_free(block):
            recycling.retire(block)  # its ring drops it when it comes to it
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
    """The block is in the ring again: whatever uses it now decides when it is free."""
    with state_lock.lock:
        forked = _acquired.pop(block, None)
        if forked is None:
            return  # this is the child of a fork, which does not know the block
        if forked:
            recycling.retire(block)
            return
        block.used_at = time.monotonic()
        _rings.setdefault(block.capacity, {}).setdefault(block.nbytes, deque()).append(block)


def _retire_free(idle_since: float | None) -> None:
    """Give up the free blocks: all of them, or those that nobody has used since then."""
    # A finalizer may run at any allocation in here, and may take and lend blocks of its own.
    for rings in list(_rings.values()):
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


def _on_period(now: float) -> None:
    over = recycling.made_bytes > limits.memory_limit()
    _retire_free(None if over else now - recycling.IDLE_TIMEOUT)


maintenance.on_period(_on_period)


def trim() -> None:
    """Give everything back that is free now."""
    with state_lock.lock:
        recycling.drain_finalizers()
        _retire_free(None)


@state_lock.before_fork
def _before_fork() -> None:
    """What has tensors here will have them in the child too."""
    for block in _acquired:
        _acquired[block] = True
    for block in blocks():
        if block.in_use():
            recycling.retire(block)
