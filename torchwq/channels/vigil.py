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

import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from ..errors import WorkerDied
from ..workers import threads
from ..workers.losses import death_of, handle_may_come
from .line import BACKLOG, SENT, SENT_BEFORE, TAKEN, TAKEN_BEFORE, WAITS

if TYPE_CHECKING:
    from .core import Core

#: What one waits to do.
READS, WRITES = 1, 2
#: For so many seconds it must be seen that nobody is left.
_SURE_AFTER: Final = 0.2

_ALONE: Final = {
    READS: "nobody is left to write to this channel: every worker that had it has ended or dropped it, or waits, too. "
    "If one of them failed, join() of its map raises its error",
    WRITES: "nobody is left to read from this channel, which is full: every worker that had it has ended or dropped "
    "it, or waits, too. If one of them failed, join() of its map raises its error",
}


@dataclass
class Told:
    """What a thread with a handle has been told of: deaths, and how many workers that are threads had failed."""

    #: Tenancies, as a table of peers numbers them.
    dead: set[int] = field(default_factory=set)
    failures: int = 0
    failed_closing: bool = False
    #: Whether ``select`` has just found that nobody is left: the next read says so, even one that does not wait.
    nobody_left: bool = False

    def copy(self) -> Told:
        return Told(set(self.dead), self.failures, self.failed_closing)


class Vigil:
    """Watches over those who wait at one process's part of a channel. Safe to use from several threads."""

    def __init__(self, core: Core) -> None:
        self._core = weakref.ref(core)
        self._lock = threading.RLock()
        self._handles: weakref.WeakSet[Any] = weakref.WeakSet()
        #: What each thread waits for with which handle.
        self._waiting: dict[tuple[Any, int], int] = {}
        #: Workers that were threads and have failed, with whether they had written.
        self._failures: list[tuple[WorkerDied, bool]] = []
        self._shown = 0
        self._alone_since: tuple[float, Any] | None = None
        self.invited = 0
        self.under_way = 0

    # Handles

    def admit(self, handle: Any) -> None:
        with self._lock:
            self._handles.add(handle)

    def handles(self) -> list[Any]:
        with self._lock:
            return list(self._handles)

    def invite(self, number: int) -> None:
        """So many more handles are under way within this process."""
        with self._lock:
            self.invited += max(0, number)
            self.under_way += number

    def dismiss(self, handle: Any, process: Any, failed: bool) -> bool:
        """The worker that had this handle, a thread, has ended. Returns whether there is something to tell."""
        core = self._core()
        with self._lock:
            self._handles.discard(handle)
            if core is None or core.forked or not failed or core.way.is_closed:
                return False
            mapid = process.info.mapid
            death = WorkerDied(
                f"worker {mapid}, a thread that had this channel, ended with an error: join() of its map raises it",
                mapid=mapid,
            )
            self._failures.append((death, handle.has_written))
            return True

    def now(self) -> Told:
        """All that there is to tell now."""
        return Told(set(self.dead()), len(self._failures))

    def dead(self) -> list[int]:
        core = self._core()
        if core is None or core.line is None or core.line.left:
            return []
        return [tenancy for _, tenancy, lives in core.line.table.tenancies() if not lives]

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
            self._waiting[key] = kind
        try:
            yield
        finally:
            with self._lock:
                if before is None:
                    self._waiting.pop(key, None)
                else:
                    self._waiting[key] = before
            self._show(0)

    def _show(self, kind: int) -> None:
        """Let other processes know whether all that have the channel here wait, and for what."""
        core = self._core()
        if kind != self._shown and core is not None and core.line is not None:
            self._shown = kind
            core.line.table.show(WAITS, kind)

    # News

    def has_news(self, told: Told, kind: int) -> bool:
        return self._find(told.copy(), kind, only_of_threads=False) is not None

    def raise_news(self, told: Told, kind: int, *, only_of_threads: bool = False) -> None:
        """Raise WorkerDied if there is something to tell, unless there are items: what a dead one wrote comes first."""
        core = self._core()
        if core is None or (only_of_threads and len(self._failures) == told.failures):
            return
        before = told.copy()
        death = self._find(told, kind, only_of_threads)
        if death is None:
            return
        if kind == READS and core.way.can_take():
            told.dead, told.failures = before.dead, before.failures
            return
        raise death

    def raise_failed_closing(self, told: Told) -> None:
        core = self._core()
        if core is not None and core.way.was_failed and not told.failed_closing:
            told.failed_closing = True
            raise WorkerDied(
                "this channel was closed by a writer that had failed: items may be missing. If it is a worker, join() "
                "of its map raises its error"
            )

    def _find(self, told: Told, kind: int, only_of_threads: bool) -> WorkerDied | None:
        core = self._core()
        if core is None:
            return None
        while told.failures < len(self._failures):
            death, wrote = self._failures[told.failures]
            told.failures += 1
            if kind == WRITES or wrote or not any(handle.has_written for handle in self.handles()):
                return death
        line = core.line
        if only_of_threads or line is None or line.left:
            return None
        does, does_before, other, other_before = (
            (SENT, SENT_BEFORE, TAKEN, TAKEN_BEFORE) if kind == READS else (TAKEN, TAKEN_BEFORE, SENT, SENT_BEFORE)
        )
        words, table = line.table.words, line.table
        gone, unknown, someone_does = [], [], False
        dead = set()
        for slot, tenancy, lives in table.tenancies():
            first = table.index(slot)
            did = words[first + does] > words[first + does_before]
            did = did or (kind == READS and bool(words[first + BACKLOG]))
            if lives:
                someone_does = someone_does or did
                continue
            dead.add(tenancy)
            if tenancy not in told.dead:
                if did:
                    gone.append((slot, tenancy))
                elif words[first + other] == words[first + other_before]:
                    unknown.append((slot, tenancy))
        for slot, tenancy in gone or (() if someone_does else unknown):
            told.dead &= dead  # those that nobody sees any more need not be remembered
            told.dead.add(tenancy)
            return death_of(table, slot, "this channel")
        return None

    # Nobody is left

    def raise_if_alone(self, handle: Any, kind: int) -> None:
        if self.is_alone(handle, kind):
            raise WorkerDied(_ALONE[kind])

    def show_waiting(self, handle: Any, kind: int) -> None:
        """Let other processes see whether all that have the channel here wait. Called by one that does."""
        self._show(kind if self._all_wait(handle, kind) else 0)

    def is_alone(self, handle: Any, kind: int) -> bool:
        """Whether nobody is left, and has not been for long enough to be sure."""
        core = self._core()
        if core is None or not self._seems_alone(handle, kind):
            self._alone_since = None
            return False
        line = core.line
        sums = None if line is None or line.left else (line.table.sum(SENT), line.table.sum(TAKEN))
        now = time.monotonic()
        if self._alone_since is None or self._alone_since[1] != sums:
            self._alone_since = now, sums
        return now - self._alone_since[0] >= _SURE_AFTER and not (kind == READS and core.way.can_take())

    def _seems_alone(self, handle: Any, kind: int) -> bool:
        core = self._core()
        if core is None or not self._all_wait(handle, kind):
            return False
        came, line = self.invited > 0, core.line
        if line is not None and not line.left:
            table = line.table
            if any(lives and table.shown(slot, WAITS) != kind for slot, lives in table.others()):
                return False
            if handle_may_come(table):
                return False
            came = came or table.others_came() or table.any_issued()
        return came

    def _all_wait(self, handle: Any, kind: int) -> bool:
        """Whether all handles of this process wait for the same, and nobody else could use this one."""
        with self._lock:
            if self.under_way:
                return False
            waiting = {each for (each, _), what in self._waiting.items() if what == kind}
            if any(each is not handle and each not in waiting for each in self._handles):
                return False
        return not threads.of_user()
