"""When a block may be used again. The functions are called under ``state_lock.lock``, unless they say otherwise.

Note [block lifetimes]
~~~~~~~~~~~~~~~~~~~~~~
This rests on Note [reference counts].

* A made block goes to a new tensor only if neither this process (``Block.in_use``) nor another one
  (``RefTable.state``) uses it, which is checked under the lock. It cannot come into use in between: a new tensor on it
  comes from another tensor on it, and there is none, or from a message, which the table would show to be in flight and
  which is taken under the lock.
* A mapped block is IN_USE in the table from the moment at which it is taken out of a message until this process does
  not use it any more. A message that is being decoded uses its blocks.
* Whoever receives a message has its memory. Either the message has a descriptor for each of its blocks, or its one
  possible reader keeps them, see Note [in-band promises]. So *retiring* a block is always safe, even if every process
  that has had it is dead: its memory is not used again, and is freed when nobody has it any more.
* What cannot be accounted for is retired: a block that a forked child or torch's own multiprocessing may see, one
  whose references were lost, one whose maker is dead.
* ``by_number`` has every block of this process that has a number.

``use_poller`` finds out that the tensors of a message are gone. Weak references watch private mappings of blocks, and
storages that torch shares. Their callbacks, which the garbage collector may run at any moment, whatever locks are held,
only append to a queue. The next operation, or the maintenance, drains it.
"""

from __future__ import annotations

import functools
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import torch

from .. import _native
from ..transport.fork import reset_in_child
from . import limits, maintenance, state_lock, storages, tree_table
from .block import Block, Geometry
from .block_fields import ADOPTED, MADE, MAPPED, PLAIN
from .counts import ESCAPED, FREE, IN_FLIGHT, IN_USE, UNTRACKED
from .use_poller import UsePoller

#: Where a storage's Python object has the block that it is the storage of.
ATTRIBUTE: Final = "_torchwq_block"

#: Seconds for which a block that nobody uses is kept.
IDLE_TIMEOUT: Final = 10.0
#: Seconds after which references in flight count as lost: in general, and after an event that may have lost some. If
#: they were not lost, a block is not used again that could have been; that is all.
_IN_FLIGHT_TIMEOUT: Final = 60.0
_IN_FLIGHT_TIMEOUT_AFTER_LOSS: Final = 2.0
#: Seconds within which a process whose end was reported has lost its locks, too.
_EXIT_TIMEOUT: Final = 3 * maintenance.PERIOD
#: How many blocks one poll checks: the lock is held meanwhile.
MAX_PER_POLL: Final = 2000

by_number: dict[int, Block] = {}
#: Made and mapped blocks, by the addresses of their storages.
_by_address: dict[int, Block] = {}
#: How many made and mapped blocks there are, each of which holds a descriptor, and the bytes of the made ones.
open_blocks = made_bytes = 0
#: Watches whose objects are gone, and the block numbers of messages that nobody has decoded.
_finalized: deque[Any] = deque()
#: Mapped blocks that were found idle, each once, the oldest first. Some may be in use again, or retired.
_idle: deque[Block] = deque()
_loss_at = _exit_at = 0.0


@reset_in_child
def _reset() -> None:
    """The child's tensors stay what they are, on memory that the parent does not use again: see ``before_fork``."""
    global open_blocks, made_bytes, _loss_at, _exit_at
    for block in by_number.values():
        unmark(block)
    by_number.clear()
    _by_address.clear()
    if _native.core is not None:
        _native.core.unregister_all()
    _finalized.clear()
    _in_use.clear()
    _idle.clear()
    open_blocks, made_bytes = 0, 0
    _loss_at = _exit_at = 0.0


class Watch(weakref.ref[Any]):
    """Tells when an adopted storage, or a private mapping of a block, is gone."""

    __slots__ = ("block", "mapping")

    block: Block
    #: Whether it is a private mapping, which is one of the block's ``users``.
    mapping: bool


def prototype(block: Block, geometry: Geometry) -> torch.Tensor:
    """A tensor of this geometry on a made or mapped block, to make others of by ``detach()``. Under the lock, or of a
    block that was taken from the pool: ``in_use`` must not see a half."""
    found = block.find_prototype(geometry)
    return block.new_prototype(geometry) if found is None else found


def watch(obj: Any, block: Block, mapping: bool = False) -> None:
    """Check ``block`` when ``obj`` is gone."""
    reference = Watch(obj, _finalized.append)
    reference.block, reference.mapping = block, mapping
    block.watches.add(reference)


# References


def count_sent(numbers: Sequence[int]) -> None:
    """A message with references to these blocks is about to be sent. Called without the lock."""
    table = tree_table.current()
    if table is None:
        return
    with state_lock.lock:
        for number in numbers:
            if number != UNTRACKED:
                table.count_sent(number)


def note_discarded(numbers: Iterable[int]) -> None:
    """A message with references to these blocks was discarded. Called with or without the lock."""
    _finalized.append(tuple(numbers))


@state_lock.before_fork
def drain_finalizers() -> None:
    """Check what was finalized since the last call."""
    while _finalized:
        note = _finalized.popleft()
        if type(note) is Watch:
            block = note.block
            block.watches.discard(note)
            if note.mapping:
                block.users -= 1
            if block.kind == ADOPTED:
                retire(block)
            elif block.kind == MAPPED and not block.watches:
                release(block)
        else:
            table = tree_table.current()
            for number in note:
                if number != UNTRACKED and table is not None:
                    table.count_received(number, 0)


# Mapped blocks


def _on_idle(block: Block) -> None:
    """Take back the IN_USE of a mapped block."""
    table = tree_table.current()
    if table is not None:
        table.clear_flag(block.number, IN_USE)
    if block.is_orphaned:
        retire(block)
    elif not block.is_listed_idle:
        block.is_listed_idle = True
        _idle.append(block)


_in_use = UsePoller(_on_idle)
#: A mapped block may not be in use any more.
release: Final[Callable[[Block], None]] = _in_use.release
#: Poll a mapped block that a message's tensor is on from now on.
start_polling: Final[Callable[[Block], None]] = _in_use.add
#: Release those mapped blocks that are not in use any more, as far as it is time to poll them.
poll: Final[Callable[[int], None]] = _in_use.poll


def poll_all() -> None:
    """The same now, for as many as one poll checks."""
    _in_use.poll_all(MAX_PER_POLL)


def next_idle() -> Block | None:
    """A mapped block that this process does not use, to be retired; None if there is none.

    The cost does not grow with how many are in use: each is checked once for each time that it was idle.
    """
    while _idle:
        block = _idle.popleft()
        block.is_listed_idle = False
        if block.kind == MAPPED and not block.watches and not block.in_use():
            return block
    return None


def retire_idle(idle_since: float) -> None:
    """Retire the mapped blocks that this process has not used since then, or that their maker has retired."""
    for _ in range(len(_idle)):
        block = next_idle()
        if block is None:
            return
        if block.used_at < idle_since or not is_current(block):
            retire(block)
        else:
            block.is_listed_idle = True
            _idle.append(block)


def retire_orphans() -> None:
    """Retire the mapped blocks whose maker is gone: at once, or when they are not in use. Called without the lock."""
    with state_lock.lock:
        table = tree_table.current()
        if table is None:
            return
        drain_finalizers()
        alive: dict[int, bool] = {}
        for block in list(by_number.values()):
            if block.kind == MAPPED and not block.is_orphaned and not table.has_maker(block.number, alive):
                block.is_orphaned = True
                release(block)


# All blocks


def register(block: Block) -> bool:
    """Give a block a number, if it can have one."""
    if block.number != UNTRACKED:
        return True
    table = tree_table.current()
    number = table.take_row() if table is not None else None
    if number is None:
        return False
    block.number = number
    _set_number(block)
    maintenance.schedule()
    return True


def _set_number(block: Block) -> None:
    by_number[block.number] = block
    if _native.core is not None:
        _native.core.register_block(block)


def _drop_number(block: Block) -> None:
    del by_number[block.number]
    if _native.core is not None:
        _native.core.unregister_block(block)


def prepare_to_send(block: Block) -> None:
    """Register a block, or, if it can have no number, retire it: nobody would tell when it is free. Without the lock.

    Warns, once in this process, if the user can change that.
    """
    with state_lock.lock:
        if block.kind != MADE or register(block):
            return
        retire(block)
        full = "all processes together have as many blocks as it counts"
        reason = tree_table.failure_reason if tree_table.current() is None else full
    if reason:
        limits.warn_of_no_reuse(reason)


def is_current(block: Block) -> bool:
    """Whether the block can still be sent under its number."""
    table = tree_table.current()
    return block.number == UNTRACKED or (table is not None and table.is_current(block.number))


def add(block: Block) -> None:
    """Keep a block that this process has made, or that a message has brought."""
    global open_blocks, made_bytes
    if block.kind == MAPPED:
        _set_number(block)
    else:
        made_bytes += block.capacity
    open_blocks += 1
    _mark(block)
    maintenance.schedule()


def adopt(storage: torch.UntypedStorage, fd: int) -> Block:
    """A block for a storage that torch shares; PLAIN if it can have no number."""
    block = Block(ADOPTED, storage, fd)
    if register(block):
        _mark(block)
        watch(storage, block)
    else:
        block.kind = PLAIN
    return block


def block_of(storage: torch.UntypedStorage) -> Block | None:
    """The block that ``storage`` belongs to, if any. Called with or without the lock."""
    block: Block | None = getattr(storage, ATTRIBUTE, None)
    return block


def _mark(block: Block) -> None:
    storage = block.storage
    setattr(storage, ATTRIBUTE, block)
    if block.kind in (MADE, MAPPED):
        _by_address[block.address] = block
    storages.hook_torch_sharing(storage, functools.partial(_before_torch_shares, block))


def unmark(block: Block) -> None:
    """The storage does not belong to the block any more, which is about to be dropped."""
    if _by_address.get(block.address) is block:
        del _by_address[block.address]
    storage = block.storage
    if storage is not None and block_of(storage) is block:
        delattr(storage, ATTRIBUTE)
        storages.unhook_torch_sharing(storage)


def _before_torch_shares(block: Block, moves: bool) -> None:
    """torch's own multiprocessing is about to pass the storage on, to processes that the table does not know. If it
    ``moves`` the storage to other memory for that, the block has no storage any more."""
    with state_lock.lock:
        if block.kind == ADOPTED and moves:
            retire(block)
        elif block.kind != PLAIN:
            mark_escaped(block)


def retire(block: Block) -> None:
    """Use the memory of a block no more; what uses it now keeps it."""
    global open_blocks, made_bytes
    if by_number.get(block.number) is block:
        _drop_number(block)
        table = tree_table.current()
        if table is not None and block.kind != MAPPED:
            table.release_row(block.number)
    unmark(block)
    if block.kind in (MADE, MAPPED):
        open_blocks -= 1
        made_bytes -= block.capacity if block.kind == MADE else 0
    block.drop()


def mark_escaped(block: Block) -> None:
    """A process that the table does not know may see the block's memory."""
    table = tree_table.current()
    if block.kind == MAPPED and table is not None:
        table.set_flag(block.number, ESCAPED)
    if block.kind != ADOPTED:
        retire(block)


def is_free(block: Block) -> bool:
    """Whether a made block may be used again. If it never may, this retires it."""
    if block.in_use():
        return False
    if block.number == UNTRACKED:
        return True
    table = tree_table.current()
    assert table is not None
    state = table.state(block.number)
    if state == FREE:
        block.expires_at = 0.0
        return True
    if state == ESCAPED or (state == IN_FLIGHT and _has_lost_references(block)):
        retire(block)
    return False


def _has_lost_references(block: Block) -> bool:
    now = time.monotonic()
    if not block.expires_at:
        block.expires_at = now + _IN_FLIGHT_TIMEOUT
        return False
    return now > block.expires_at or (_loss_at > block.used_at and now > _loss_at + _IN_FLIGHT_TIMEOUT_AFTER_LOSS)


def expire_in_flight() -> None:
    """References in flight now may have been lost: a queue was closed, a worker has died. Without the lock."""
    global _loss_at
    _loss_at = time.monotonic()


def note_worker_exit() -> None:
    """A worker has ended: its blocks, which this process may have mapped, are of no use any more. Without the lock."""
    global _exit_at
    _exit_at = time.monotonic()


if _native.core is not None:
    _native.core.set_memory(state_lock.lock, _in_use, _finalized, drain_finalizers, _by_address)


@maintenance.on_period
def _maintain(now: float) -> None:
    drain_finalizers()
    poll_all()
    if now < max(_exit_at, _loss_at) + _EXIT_TIMEOUT:
        retire_orphans()


@maintenance.after_period
def _has_blocks() -> bool:
    return bool(open_blocks or by_number)
