"""When is one who waits at a channel told that it may wait in vain?

Nobody owns a channel, and anybody may write. So it is told of what may be the reason that nothing comes. Invariants:

* It is told, once, of each process that has died since the channel was sent to it, or failed as a worker, and had
  written to the channel: items that it was to write may be missing. Of one that had neither written nor read, if no
  other has written either. One that had only read is nothing to a reader. For a writer that waits for room it is the
  other way round. A thread that is a worker and has failed counts as such a process.
* It is told, each time, if others have had the channel, and nobody is left that could write: every process that still
  has it waits, too, and in this one every handle; none is under way to a worker that lives; and no other thread of the
  user's could use this handle. As that is seen from words that change one after the other, it must be so for a while.
* "It" is a thread with a handle. A handle that is new need not be told of what had happened when it was sent.
"""

from __future__ import annotations

import functools
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol

from ..errors import WorkerDied
from ..peers.failures import SeenFailures, dead_peer_ids
from ..peers.local_handles import LocalHandles
from ..peers.table import PeerTable
from ..workers import threads
from ..workers.deaths import others_may_come, raise_next_death
from .socket import SocketChannel
from .state import ChannelBackend
from .table import BACKLOG, SENT, SENT_AT_CLAIM, TAKEN, TAKEN_AT_CLAIM, WAITING

#: What one waits to do.
READS, WRITES = 1, 2
#: For so many seconds it must be seen that nobody is left.
_CONFIRMATION_TIME: Final = 0.2

_NOBODY_LEFT: Final = {
    READS: "nobody is left to write to this channel: every worker that had it has ended or dropped it, or waits, too. "
    "If one of them failed, join() of its map raises its error",
    WRITES: "nobody is left to read from this channel, which is full: every worker that had it has ended or dropped "
    "it, or waits, too. If one of them failed, join() of its map raises its error",
}


def _never() -> bool:
    return False


@dataclass(slots=True)
class SeenChannelFailures(SeenFailures):
    """What a thread with a handle on a channel has been told of."""

    #: Whether it was told that one that had failed has closed the channel.
    failed_closing: bool = False
    #: Whether ``select`` has just found that nobody is left: the next read says so, even one that does not wait.
    nobody_left: bool = False

    def copy(self) -> SeenChannelFailures:
        return SeenChannelFailures(set(self.deaths), self.thread_failures, self.failed_closing)


class Part(Protocol):
    """One process's part of a channel (``core.Core``), as this watches over it."""

    socket: SocketChannel | None
    backend: ChannelBackend
    forked: bool

    def wake_all(self) -> None:
        """Have everybody who waits here look at the others."""

    def on_failure_raised(self) -> None:
        """Somebody has been told of something."""


class FailureDetector:
    """Watches over those who wait at one process's part of a channel. Safe to use from several threads."""

    def __init__(self, core: Part) -> None:
        self._core = weakref.ref(core)
        self._lock = threading.RLock()
        self.handles: LocalHandles[Any] = LocalHandles()
        #: What each thread waits for with which handle.
        self._waiting: dict[tuple[Any, int], int] = {}
        #: Workers that were threads and have failed, with whether they had written.
        self._thread_failures: list[tuple[WorkerDied, bool]] = []
        self._published = 0
        self._nobody_left_since: tuple[float, Any] | None = None

    def _table(self) -> PeerTable | None:
        """The table of the processes that have the channel, if others can have it."""
        core = self._core()
        return None if core is None or core.socket is None or core.socket.left else core.socket.table

    # Handles

    def remove_handle(self, handle: Any, process: Any, failed: bool) -> bool:
        """The worker that had this handle, a thread, has ended. Returns whether there is something to tell."""
        core = self._core()
        with self._lock:
            self.handles.discard(handle)
            if core is None or core.forked or not failed or core.backend.is_closed:
                return False
            mapid = process.info.mapid
            death = WorkerDied(
                f"worker {mapid}, a thread that had this channel, ended with an error: join() of its map raises it",
                mapid=mapid,
            )
            self._thread_failures.append((death, handle.has_written))
            return True

    def current(self) -> SeenChannelFailures:
        """What a handle that is sent now need not be told of: all that there is to tell now."""
        return SeenChannelFailures(self.dead(), len(self._thread_failures))

    def dead(self) -> set[int]:
        """The deaths that there are to tell now, of processes."""
        table = self._table()
        return set() if table is None else dead_peer_ids(table)

    def writer(self) -> Any:
        """The handle with which this thread waits for room."""
        me = threading.get_ident()
        return next(handle for (handle, ident), kind in list(self._waiting.items()) if ident == me and kind == WRITES)

    @contextmanager
    def waiting(self, handle: Any, kind: int) -> Iterator[None]:
        """Within this, ``handle`` waits."""
        key = handle, threading.get_ident()
        with self._lock:
            before = self._waiting.get(key)  # a finalizer or signal handler writes or reads in the middle of doing so
            others_wait = kind == READS and READS in self._waiting.values()
            self._waiting[key] = kind
        core = self._core()
        if others_wait and core is not None:
            core.wake_all()  # perhaps all wait now
        del core
        try:
            yield
        finally:
            with self._lock:
                if before is None:
                    self._waiting.pop(key, None)
                else:
                    self._waiting[key] = before
            self._publish(0)

    def _publish(self, kind: int) -> None:
        """Let other processes know whether all that have the channel here wait, and for what."""
        core = self._core()
        if kind != self._published and core is not None and core.socket is not None:
            self._published = kind
            core.socket.table.set_word(WAITING, kind)
            if kind:
                core.socket.table.notify_all()  # perhaps all wait now

    # News

    def has_unseen(self, seen: SeenChannelFailures, kind: int) -> bool:
        """Whether there is something to tell one who waits to do ``kind``."""
        if self._next_failure(seen, kind) is not None:
            return True
        table = self._table()
        return (
            table is not None
            and seen.next_unseen_death(table, functools.partial(_relevant_deaths, table, kind)) is not None
        )

    def raise_unseen(self, seen: SeenChannelFailures, kind: int) -> None:
        """Raise WorkerDied if there is something to tell, unless there are items: what a dead one wrote comes first."""
        core = self._core()
        if core is not None:
            try:
                self._raise_unseen(core, seen, kind)
            except WorkerDied:
                core.on_failure_raised()
                raise

    def _raise_unseen(self, core: Part, seen: SeenChannelFailures, kind: int) -> None:
        items_first: Callable[[], bool] = core.backend.can_take if kind == READS else _never
        known = len(self._thread_failures)
        number = self._next_failure(seen, kind) if known > seen.thread_failures else None
        if number is not None:
            if items_first():
                return
            seen.thread_failures = number + 1
            raise self._thread_failures[number][0]
        seen.thread_failures = known
        table = self._table()
        if table is not None:
            raise_next_death(
                seen, table, "this channel", functools.partial(_relevant_deaths, table, kind), unless=items_first
            )

    def _next_failure(self, seen: SeenChannelFailures, kind: int) -> int | None:
        """Which of the failures of threads is to be told next."""
        for number in range(seen.thread_failures, len(self._thread_failures)):
            if (
                kind == WRITES
                or self._thread_failures[number][1]
                or not any(each.has_written for each in self.handles.all())
            ):
                return number
        return None

    def raise_failed_closing(self, seen: SeenChannelFailures) -> None:
        core = self._core()
        if core is not None and core.backend.was_failed and not seen.failed_closing:
            seen.failed_closing = True
            raise WorkerDied(
                "this channel was closed by a writer that had failed: items may be missing. If it is a worker, join() "
                "of its map raises its error"
            )

    # Nobody is left

    def raise_if_nobody_left(self, handle: Any, kind: int) -> None:
        if self.is_nobody_left(handle, kind):
            raise WorkerDied(_NOBODY_LEFT[kind])

    def publish_waiting(self, handle: Any, kind: int) -> None:
        """Let other processes see whether all that have the channel here wait. Called by one that does."""
        self._publish(kind if self._all_wait(handle, kind) else 0)

    def is_nobody_left(self, handle: Any, kind: int) -> bool:
        """Whether nobody is left, and has not been for long enough to be sure."""
        core = self._core()
        if core is None or not self._seems_nobody_left(handle, kind):
            self._nobody_left_since = None
            return False
        table = self._table()
        sums = None if table is None else (table.sum(SENT), table.sum(TAKEN))
        now = time.monotonic()
        if self._nobody_left_since is None or self._nobody_left_since[1] != sums:
            self._nobody_left_since = now, sums
        return now - self._nobody_left_since[0] >= _CONFIRMATION_TIME and not (
            kind == READS and core.backend.can_take()
        )

    def seconds_until_sure(self, otherwise: float) -> float:
        """In how many seconds it is sure that nobody is left, if it seems so; or ``otherwise``."""
        since = self._nobody_left_since
        return otherwise if since is None else max(0.0, since[0] + _CONFIRMATION_TIME - time.monotonic())

    def _seems_nobody_left(self, handle: Any, kind: int) -> bool:
        table = self._table()
        if not self._all_wait(handle, kind):
            return False
        if others_may_come(
            self.handles, table, lambda slot: table is not None and table.get_word(slot, WAITING) == kind
        ):
            return False
        return self.handles.ever_pending or (table is not None and (table.was_shared() or table.any_handle_sent()))

    def _all_wait(self, handle: Any, kind: int) -> bool:
        """Whether all handles of this process wait for the same, and nobody else could use this one."""
        with self._lock:
            waiting = {each for (each, _), what in self._waiting.items() if what == kind}
        return not self.handles.any_other_than({handle, *waiting}) and not threads.user_threads()


def _relevant_deaths(table: PeerTable, kind: int, dead: Sequence[int], living: Sequence[int]) -> Sequence[int]:
    """Which deaths matter to one who waits to do ``kind``: see the invariants."""
    does, does_before, other, other_before = (
        (SENT, SENT_AT_CLAIM, TAKEN, TAKEN_AT_CLAIM) if kind == READS else (TAKEN, TAKEN_AT_CLAIM, SENT, SENT_AT_CLAIM)
    )

    def has(slot: int, word: int, before: int) -> bool:
        return table.get_word(slot, word) > table.get_word(slot, before)

    def did(slot: int) -> bool:
        return has(slot, does, does_before) or (kind == READS and bool(table.get_word(slot, BACKLOG)))

    gone = [slot for slot in dead if did(slot)]
    if gone or any(map(did, living)):
        return gone
    return [slot for slot in dead if not has(slot, other, other_before)]
