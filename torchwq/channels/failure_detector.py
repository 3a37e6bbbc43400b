"""Tells a thread that waits at a channel why its wait may be in vain: others have failed, or nobody is left.

Note [Failures that a channel tells].

Nobody owns a channel, and anybody may write. So no failure ends it; each thread with a handle is told of those that may
be the reason why nothing comes:

* A thread that waits to read is told once of each process that has died, or failed as a worker, since the channel was
  sent to the thread, if that process had written: items that it was to write may be missing. If no dead or living
  process has written, the thread is told of those that had not read either. A process that had only read is of no
  concern to a reader. For a thread that waits for room to write, it is the other way round. A worker that is a thread
  and has failed counts as such a process.
* A waiting thread is told each time that nobody is left, if others have had the channel and nobody could end the wait:
  each process that still has the channel waits for the same, and in this process each handle; no handle is in flight to
  a living worker; and no other thread of the user's could use this handle. These are read from words that change one
  after the other, so they must agree for ``_CONFIRMATION_TIME``.
* A new handle starts with the failures that there are when it is sent: it is not told of these.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

from ..errors import WorkerDied
from ..peers.failures import SeenFailures, dead_peer_ids
from ..peers.local_handles import LocalHandles
from ..workers import threads
from ..workers.deaths import others_may_come, raise_next_death
from .socket import SocketChannel
from .state import ChannelBackend
from .table import BACKLOG, SENT, TAKEN, WAITING, ChannelTable

#: What a thread waits to do; 0 for one that does not wait.
READ, WRITE = 1, 2
#: For so many seconds nobody must seem to be left before a thread is told.
_CONFIRMATION_TIME: Final = 0.2

_NOBODY_LEFT: Final = {
    READ: "nobody is left to write to this channel: every worker that had it has ended or dropped it, or waits, too. "
    "If one of them failed, join() of its map raises its error",
    WRITE: "nobody is left to read from this channel, which is full: every worker that had it has ended or dropped "
    "it, or waits, too. If one of them failed, join() of its map raises its error",
}


@dataclass(slots=True)
class SeenChannelFailures(SeenFailures):
    """The failures that one thread with a handle has been told of."""

    #: Whether the thread was told that a failed writer has closed the channel.
    failed_closing: bool = False
    #: Whether ``select`` has just found that nobody is left: the next read says so, even one that does not wait.
    nobody_left: bool = False

    def copy(self) -> SeenChannelFailures:
        return SeenChannelFailures(set(self.deaths), self.thread_failures, self.failed_closing)


class Handle(Protocol):
    """What a detector needs of ``handle.Channel``."""

    #: Whether it was written to, and whether anybody has asked for its descriptor.
    has_written: bool
    is_watched: bool

    def seen_failures(self) -> SeenChannelFailures:
        """What this thread was told of with this handle."""

    def all_seen_failures(self) -> list[SeenChannelFailures]:
        """The same of each thread that has read with it."""


class Watched(Protocol):
    """What a detector needs of ``core.Core``."""

    socket: SocketChannel | None
    backend: ChannelBackend
    forked: bool

    def wake_all(self) -> None: ...
    def update_readiness_soon(self) -> None: ...


class FailureDetector:
    """For all threads that wait at one process's core of a channel. Safe to use from several threads.

    Args:
        core: owns this object, and outlives each call.
    """

    def __init__(self, core: Watched) -> None:
        self._core: Watched = weakref.proxy(core)
        self._lock = threading.RLock()
        self.handles: LocalHandles[Handle] = LocalHandles()
        #: What each thread waits to do with which handle.
        self._waiting: dict[tuple[Handle, int], int] = {}
        #: The failures of workers that are threads, each with whether its handle had written.
        self._thread_failures: list[tuple[WorkerDied, bool]] = []
        #: What this process's word WAITING says.
        self._published = 0
        #: Since when nobody seems to be left, and the counts of items then.
        self._nobody_left_since: tuple[float, tuple[int, int] | None] | None = None

    def _table(self) -> ChannelTable | None:
        """The table of the processes that have the channel; None if no other process can have it."""
        socket = self._core.socket
        return None if socket is None or socket.left else socket.table

    # Handles

    def remove_handle(self, handle: Handle, worker: threads.ThreadWorker, failed: bool) -> bool:
        """The thread worker that had this handle has ended. Returns whether others are to be told of a failure."""
        with self._lock:
            self.handles.discard(handle)
            if self._core.forked or not failed or self._core.backend.is_closed:
                return False
            mapid = worker.info.mapid
            death = WorkerDied(
                f"worker {mapid}, {worker.kind} with this channel, ended with an error: join() of its map raises it",
                mapid=mapid,
            )
            self._thread_failures.append((death, handle.has_written))
            return True

    def current(self) -> SeenChannelFailures:
        """What a handle that is sent now is not told of."""
        return SeenChannelFailures(self.dead(), len(self._thread_failures))

    def dead(self) -> set[int]:
        """The dead processes, by their peer ids."""
        table = self._table()
        return set() if table is None else dead_peer_ids(table)

    # Waiting

    @contextmanager
    def waiting(self, handle: Handle, operation: int) -> Iterator[None]:
        """Within this context, ``handle`` waits in this thread."""
        key = handle, threading.get_ident()
        with self._lock:
            outer = self._waiting.get(key)  # a finalizer or signal handler may wait in the middle of a wait
            others_wait = operation == READ and READ in self._waiting.values()
            self._waiting[key] = operation
        if others_wait:
            self._core.wake_all()  # perhaps all wait now
        try:
            yield
        finally:
            with self._lock:
                if outer is None:
                    self._waiting.pop(key, None)
                else:
                    self._waiting[key] = outer
            self._publish(0)

    def publish_waiting(self, handle: Handle, operation: int) -> None:
        """Let other processes see whether all handles of this one wait. Called by a thread that does."""
        self._publish(operation if self._all_wait(handle, operation) else 0)

    def _publish(self, operation: int) -> None:
        socket = self._core.socket
        if operation != self._published and socket is not None:
            self._published = operation
            socket.table.set_word(WAITING, operation)
            if operation:
                socket.table.notify_all()  # perhaps all wait now

    def _all_wait(self, handle: Handle, operation: int) -> bool:
        """Whether all handles of this process wait for the same, and no other thread could use this one."""
        with self._lock:
            waiting = {each for (each, _), other in self._waiting.items() if other == operation}
        return not self.handles.any_other_than({handle, *waiting}) and not threads.user_threads()

    # Failures of others

    def has_unseen(self, seen: SeenChannelFailures, operation: int) -> bool:
        """Whether a thread that waits for ``operation`` is to be told of a failure."""
        if self._next_thread_failure(seen, operation) is not None:
            return True
        table = self._table()
        if table is None:
            return False
        return seen.next_unseen_death(table, partial(_relevant_deaths, operation, table)) is not None

    def raise_unseen(self, seen: SeenChannelFailures, operation: int) -> None:
        """Raise WorkerDied if there is a failure to tell and no item to read: what a dead process wrote comes first."""
        try:
            self._raise_unseen(seen, operation)
        except WorkerDied:
            self._core.update_readiness_soon()  # the channel's descriptor may not have to be readable any more
            raise

    def _raise_unseen(self, seen: SeenChannelFailures, operation: int) -> None:
        known = len(self._thread_failures)
        number = self._next_thread_failure(seen, operation) if known > seen.thread_failures else None
        if number is not None:
            if self._has_item(operation):
                return
            seen.thread_failures = number + 1
            raise self._thread_failures[number][0]
        seen.thread_failures = known
        table = self._table()
        if table is not None:
            relevant = partial(_relevant_deaths, operation, table)
            raise_next_death(seen, table, "this channel", relevant, unless=partial(self._has_item, operation))

    def _has_item(self, operation: int) -> bool:
        """Whether a thread that waits for ``operation`` has an item to read first."""
        return operation == READ and self._core.backend.can_take()

    def _next_thread_failure(self, seen: SeenChannelFailures, operation: int) -> int | None:
        """The number of the next failed thread of which to tell."""
        for number in range(seen.thread_failures, len(self._thread_failures)):
            _, has_written = self._thread_failures[number]
            if operation == WRITE or has_written or not any(each.has_written for each in self.handles.all()):
                return number
        return None

    def raise_failed_closing(self, seen: SeenChannelFailures) -> None:
        """Raise WorkerDied, once, if a ``with`` block that had failed has closed the channel."""
        if self._core.backend.was_failed and not seen.failed_closing:
            seen.failed_closing = True
            raise WorkerDied(
                "this channel was closed by a writer that had failed: items may be missing. If it is a worker, join() "
                "of its map raises its error"
            )

    # Nobody is left

    def raise_if_nobody_left(self, handle: Handle, operation: int) -> None:
        if self.is_nobody_left(handle, operation):
            raise WorkerDied(_NOBODY_LEFT[operation])

    def is_nobody_left(self, handle: Handle, operation: int) -> bool:
        """Whether nobody is left, and has not been for long enough to be sure."""
        if not self._seems_nobody_left(handle, operation):
            self._nobody_left_since = None
            return False
        table = self._table()
        counts = None if table is None else (table.sum(SENT), table.sum(TAKEN))
        now = time.monotonic()
        if self._nobody_left_since is None or self._nobody_left_since[1] != counts:
            self._nobody_left_since = now, counts
        return now - self._nobody_left_since[0] >= _CONFIRMATION_TIME and not self._has_item(operation)

    def seconds_until_sure(self, otherwise: float) -> float:
        """In how many seconds it is sure that nobody is left, if it seems so; or ``otherwise``."""
        since = self._nobody_left_since
        return otherwise if since is None else max(0.0, since[0] + _CONFIRMATION_TIME - time.monotonic())

    def _seems_nobody_left(self, handle: Handle, operation: int) -> bool:
        table = self._table()

        def waits(slot: int) -> bool:
            return table is not None and table.get_word(slot, WAITING) == operation

        if not self._all_wait(handle, operation) or others_may_come(self.handles, table, waits):
            return False
        return self.handles.ever_pending or (table is not None and (table.was_shared() or table.any_handle_sent()))


def _relevant_deaths(operation: int, table: ChannelTable, dead: Sequence[int], living: Sequence[int]) -> Sequence[int]:
    """Which deaths matter to a thread that waits for ``operation``: see Note [Failures that a channel tells]."""

    def has_sent(slot: int) -> bool:
        return table.num_sent(slot) > 0

    def has_taken(slot: int) -> bool:
        return table.num_taken(slot) > 0

    def was_to_write(slot: int) -> bool:
        return has_sent(slot) or bool(table.get_word(slot, BACKLOG))

    awaited, other = (was_to_write, has_taken) if operation == READ else (has_taken, has_sent)
    gone = [slot for slot in dead if awaited(slot)]
    if gone or any(map(awaited, living)):
        return gone
    return [slot for slot in dead if not other(slot)]
