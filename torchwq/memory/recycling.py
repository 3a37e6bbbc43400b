"""When a block may be used again: the protocol of lifetimes. Its other half is in ``ref_table``.

Invariants. All of this module's state, and every block's, is changed under ``lock`` only. Nothing waits under it. No
code of a user's is called under it; should a finalizer run, it finds every block either in use or not taken yet.

* A made block is given to a new tensor only if it is used neither here (``Block.in_use``) nor elsewhere
  (``RefTable.state``), which is looked at under the lock. It cannot become used in between: a new tensor on it comes
  from another tensor on it, and there is none, or from a message, which the table would show to be under way and which
  is taken under the lock.
* A block that a message brought is IN_USE in the table from the moment at which it is taken out of the message
  until it is not in use here. A message that is being decoded is a user of its blocks.
* The memory is there for whoever receives a message. Either the message has a descriptor for each of its blocks, or its
  one possible reader keeps them, see Note [in-band promises]. So *giving up* a block is always safe, even if every
  process that has had it is dead: its memory is not used again, and goes when nobody has it any more.
* Given up is what cannot be accounted for: a block that a forked child or torch's own multiprocessing may see, one
  whose references do not come home, one whose maker is dead.
* The table has every block of this process that has a number, under that number.

Whether the tensors of a message are gone is looked at (``use_poller``). Private mappings of blocks, and storages that
torch shares, are watched by weak references, whose callback does nothing but take a note: garbage is collected at any
moment, whatever locks are held. The notes are looked at by the next operation, or by a timer.
"""

from __future__ import annotations

import functools
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import torch

from ..transport import reactor
from ..transport.fork import reset_in_child
from . import limits, ref_table, storages
from .block import ADOPTED, MADE, MAPPED, PLAIN, Block, Geometry
from .ref_table import ESCAPED, FREE, IN_FLIGHT, IN_USE, UNTRACKED
from .use_poller import UsePoller

#: Where a storage's Python object has the block that it is the storage of.
ATTRIBUTE: Final = "_torchwq_block"

#: Seconds between two looks at what is not needed any more.
PERIOD: Final = 2.0
#: Seconds for which a block that nobody uses is kept.
IDLE_TIMEOUT: Final = 10.0
#: Seconds after which references under way are believed to be lost: in general, and after something has happened that
#: may have lost some. If they were not, a block is not used again that could have been; that is all.
_IN_FLIGHT_TIMEOUT: Final = 60.0
_IN_FLIGHT_TIMEOUT_AFTER_LOSS: Final = 2.0
#: Seconds after which a process whose end was heard of has lost its locks, too.
_EXIT_TIMEOUT: Final = 3 * PERIOD
#: How many blocks one poll takes in: the lock is held meanwhile.
MAX_PER_POLL: Final = 2000

#: Reentrant, because a user's finalizer may run when anything is allocated, and may write to a queue.
lock = threading.RLock()


def is_locked_here() -> bool:
    """Whether this thread has the lock: what runs then has interrupted someone who must not be made to wait."""
    owned: Any = getattr(lock, "_is_owned", lambda: False)
    return bool(owned())


#: Blocks by their numbers.
by_number: dict[int, Block] = {}
#: How many made and mapped blocks there are, each of which holds a descriptor, and the bytes of the made ones.
open_blocks = made_bytes = 0
#: Watches whose tensors are gone, and numbers of references that came in messages which nobody has decoded.
_finalized: deque[Any] = deque()
#: Mapped blocks that were found idle, each once, the oldest first. Some may be in use again, or given up.
_idle: deque[Block] = deque()
_is_scheduled = False
_is_ended = False
_loss_at = _end_at = 0.0

#: Called at every tick, under the lock, with the time.
_on_period: list[Callable[[float], None]] = []
#: Called after that, without the lock; each says whether it has anything to look after.
_after_period: list[Callable[[], bool]] = []


@reset_in_child
def _reset() -> None:
    """The child's tensors stay what they are, on memory that the parent does not use again: see ``before_fork``."""
    global lock, open_blocks, made_bytes, _is_scheduled, _is_ended, _loss_at, _end_at
    lock = threading.RLock()
    for block in by_number.values():
        unmark(block)
    by_number.clear()
    _finalized.clear()
    _in_use.clear()
    _idle.clear()
    open_blocks, made_bytes, _is_scheduled, _is_ended = 0, 0, False, False
    _loss_at = _end_at = 0.0


class Watch(weakref.ref[Any]):
    """Tells when an adopted storage, or a private mapping of a block, is gone."""

    __slots__ = ("block", "mapping")

    block: Block
    #: Whether it is a private mapping, which is one of the block's ``users``.
    mapping: bool


def prototype(block: Block, geometry: Geometry) -> torch.Tensor:
    """A tensor that lies so on a made or mapped block, to make others of by ``detach()``. Under the lock, or of a block
    that was taken from the pool: ``in_use`` must not see a half."""
    found = block.prototypes.get(geometry)
    return block.new_prototype(geometry) if found is None else found


def watch(obj: Any, block: Block, mapping: bool = False) -> None:
    """Look at ``block`` again when ``obj`` is gone. Under the lock, or before anyone else knows of the block."""
    reference = Watch(obj, _finalized.append)
    reference.block, reference.mapping = block, mapping
    block.watches.add(reference)


def count_sent(numbers: Sequence[int]) -> None:
    """A message with references to these blocks is about to leave."""
    table = ref_table.current()
    if table is None:
        return
    with lock:
        for number in numbers:
            if number != UNTRACKED:
                table.count_sent(number)


def note_discarded(numbers: Iterable[int]) -> None:
    """A message with references to these blocks was thrown away. May be called with the lock held."""
    _finalized.append(tuple(numbers))


def drain_finalizers() -> None:
    """Look at what was noted. Under the lock."""
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
            table = ref_table.current()
            for number in note:
                if number != UNTRACKED and table is not None:
                    table.count_received(number, 0)


def release(block: Block) -> None:
    """A mapped block is perhaps not in use any more. Under the lock."""
    if not _try_release(block):
        _in_use.add(block)


def _try_release(block: Block) -> bool:
    """Hold a mapped block no more, if it is not in use; returns whether it need not be looked at. Under the lock."""
    if block.kind != MAPPED:
        return True
    if block.in_use():
        return False
    table = ref_table.current()
    if table is not None:
        table.clear_flag(block.number, IN_USE)
    if block.is_orphaned:
        retire(block)
    elif not block.is_listed_idle:
        block.is_listed_idle = True
        _idle.append(block)
    return True


_in_use = UsePoller(_try_release)
#: Let a mapped block that a message's tensor is on be looked at from now on. Under the lock.
start_polling = _in_use.add
#: Release those mapped blocks that are not in use any more, as far as it is time to poll. Under the lock.
poll = _in_use.poll


def poll_all() -> None:
    """The same now, for as many as one poll takes in. Under the lock."""
    _in_use.poll_all(MAX_PER_POLL)


def next_idle() -> Block | None:
    """A mapped block that nobody uses here, to be given up; None if there is none. Under the lock.

    What this costs does not grow with how many are in use: each is looked at once for each time that it was idle.
    """
    while _idle:
        block = _idle.popleft()
        block.is_listed_idle = False
        if block.kind == MAPPED and not block.watches and not block.in_use():
            return block
    return None


def retire_idle(idle_since: float) -> None:
    """Give up the mapped blocks that nobody has used here since then, or that their maker has given up. Under the
    lock."""
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
    """Give up the mapped blocks whose maker is gone, and will not use them again: now, or when they are not in use."""
    with lock:
        table = ref_table.current()
        if table is None:
            return
        drain_finalizers()
        alive: dict[int, bool] = {}
        for block in list(by_number.values()):
            if block.kind == MAPPED and not block.is_orphaned and not table.has_maker(block.number, alive):
                block.is_orphaned = True
                release(block)


# Names


def register(block: Block) -> bool:
    """Give a block a number, if it can have one. Under the lock."""
    if block.number != UNTRACKED:
        return True
    table = ref_table.current()
    number = table.take_row() if table is not None else None
    if number is None:
        return False
    block.number = number
    by_number[number] = block
    schedule_maintenance()
    return True


def prepare_to_send(block: Block) -> None:
    """Give a block a number, or, if it can have none, use its memory no more: nobody would tell when it is free.

    Says so, once in this process, if that need not be.
    """
    with lock:
        if block.kind != MADE or register(block):
            return
        retire(block)
        why = (
            ref_table.failure_reason
            if ref_table.current() is None
            else "all processes together have as many blocks as it counts"
        )
    if why:
        limits.warn_of_no_reuse(why)


def is_current(block: Block) -> bool:
    """Whether the block can still be sent under its number. Under the lock."""
    table = ref_table.current()
    return block.number == UNTRACKED or (table is not None and table.is_current(block.number))


def add(block: Block) -> None:
    """Keep a block that was made, or that a message brought. Under the lock."""
    global open_blocks, made_bytes
    if block.kind == MAPPED:
        by_number[block.number] = block
    else:
        made_bytes += block.capacity
    open_blocks += 1
    _mark(block)
    schedule_maintenance()


def adopt(storage: torch.UntypedStorage, fd: int) -> Block:
    """A block for a storage that torch shares; PLAIN if it can have no number. Under the lock."""
    block = Block(ADOPTED, storage, fd)
    if register(block):
        _mark(block)
        watch(storage, block)
    else:
        block.kind = PLAIN
    return block


def block_of(storage: torch.UntypedStorage) -> Block | None:
    """The block that ``storage`` is the storage of, if it is one's."""
    block: Block | None = getattr(storage, ATTRIBUTE, None)
    return block


def _mark(block: Block) -> None:
    storage = block.storage
    setattr(storage, ATTRIBUTE, block)
    storages.hook_torch_sharing(storage, functools.partial(_before_torch_shares, block))


def unmark(block: Block) -> None:
    """The storage is not the block's any more, which is about to be dropped. Under the lock."""
    storage = block.storage
    if storage is not None and block_of(storage) is block:
        delattr(storage, ATTRIBUTE)
        storages.unhook_torch_sharing(storage)


def _before_torch_shares(block: Block, moves: bool) -> None:
    """What torch's own multiprocessing passes on, someone sees of whom the table knows nothing. If it ``moves`` the
    storage for that, the block has none any more."""
    with lock:
        if block.kind == ADOPTED and moves:
            retire(block)
        elif block.kind != PLAIN:
            mark_escaped(block)


def retire(block: Block) -> None:
    """Use the memory of a block no more; what uses it now keeps it. Under the lock."""
    global open_blocks, made_bytes
    if by_number.get(block.number) is block:
        del by_number[block.number]
        table = ref_table.current()
        if table is not None and block.kind != MAPPED:
            table.release_row(block.number)
    unmark(block)
    if block.kind in (MADE, MAPPED):
        open_blocks -= 1
        made_bytes -= block.capacity if block.kind == MADE else 0
    block.drop()


def mark_escaped(block: Block) -> None:
    """Someone may see the block's memory of whom the reference table knows nothing. Under the lock."""
    table = ref_table.current()
    if block.kind == MAPPED and table is not None:
        table.set_flag(block.number, ESCAPED)
    if block.kind != ADOPTED:
        retire(block)


def is_free(block: Block) -> bool:
    """Whether a made block may be used again. Gives it up, and says no, if never. Under the lock."""
    if block.in_use():
        return False
    if block.number == UNTRACKED:
        return True
    table = ref_table.current()
    assert table is not None
    state = table.state(block.number)
    if state == FREE:
        block.expires_at = 0.0
        return True
    if state == ESCAPED:
        retire(block)
    elif state == IN_FLIGHT:
        _expire_if_lost(block)
    return False


def _expire_if_lost(block: Block) -> None:
    now = time.monotonic()
    if not block.expires_at:
        block.expires_at = now + _IN_FLIGHT_TIMEOUT
    elif now > block.expires_at or (_loss_at > block.used_at and now > _loss_at + _IN_FLIGHT_TIMEOUT_AFTER_LOSS):
        retire(block)


def expire_in_flight() -> None:
    """References under way now may have been lost: a queue was closed, a worker has died."""
    global _loss_at
    _loss_at = time.monotonic()


def note_worker_exit() -> None:
    """A worker has ended: its blocks, which this process may have mapped, are no use any more."""
    global _end_at
    _end_at = time.monotonic()


# Looking after what is there


def on_period(callback: Callable[[float], None]) -> None:
    """Call ``callback(time)`` under the lock, every PERIOD seconds while there is anything to look after."""
    _on_period.append(callback)


def after_period(callback: Callable[[], bool]) -> None:
    """Call ``callback()`` behind that, without the lock: it may send. It returns whether there is anything to look
    after although there may be no blocks."""
    _after_period.append(callback)


def schedule_maintenance() -> None:
    """There is something to look after."""
    global _is_scheduled
    if not _is_scheduled:
        _is_scheduled = True
        reactor.get().call_later(PERIOD, _run_scheduled)


def _run_scheduled() -> None:
    global _is_scheduled
    _is_scheduled = False
    maintain()


def maintain() -> None:
    """Look after the blocks, and again later, if there are any."""
    with lock:
        if _is_ended:
            return
        try:
            drain_finalizers()
            poll_all()
            now = time.monotonic()
            if now < max(_end_at, _loss_at) + _EXIT_TIMEOUT:
                retire_orphans()
            for callback in _on_period:
                callback(now)
        finally:
            if open_blocks or by_number:
                schedule_maintenance()
    go_on = [callback() for callback in _after_period]
    if any(go_on):
        schedule_maintenance()


def end() -> None:
    """Look after nothing any more: the interpreter is about to end.

    A thread that is in torch's C++ when the interpreter ends, and wants the GIL back there, would end the process by
    ``std::terminate``. Behind this call the reactor's thread is not in ``maintain``, and will not be.
    """
    global _is_ended
    with lock:
        _is_ended = True


_before_fork: list[Callable[[], None]] = []
_forking = threading.local()


def before_fork(callback: Callable[[], None]) -> Callable[[], None]:
    """Call ``callback()`` under the lock before every fork of this process: the child will see what tensors see now."""
    _before_fork.append(callback)
    return callback


def _prepare_fork() -> None:
    # Not for ever: the thread that forks may be in a signal handler that has interrupted a holder of the lock.
    _forking.locked = lock.acquire(timeout=1.0)
    if by_number or open_blocks:
        drain_finalizers()
        for callback in _before_fork:
            callback()


def _after_fork() -> None:
    if _forking.locked:
        _forking.locked = False
        lock.release()


os.register_at_fork(before=_prepare_fork, after_in_parent=_after_fork)
