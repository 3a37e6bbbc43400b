"""What all handles on a channel in one process share: the way that its items take, and whom its readers wait for.

A channel begins *here*: its items wait in a mailbox, and its tensors stay where they are. When a handle is first sent
to another process, a line is made, and what waits here goes on it. From then on every thread of this process uses the
line too, so that there is one order, and one way.

Nobody owns a channel, and anybody may write. So when is a blocked reader told that it waits in vain? Invariants:

* It is told, once, of each process that has died since it was sent the channel, or failed as a worker, and had written
  to it: items that it was to write may be missing. Of one that had neither written nor read, if no other process has
  written either. One that had only read is nothing to a reader. For a writer that waits for room it is the other way
  round.
* It is told, each time, if others have had the channel, and nobody has it any more who could write: no process, no
  other handle in this one, no handle under way to a worker that lives; and the last one to write was not another
  thread of this process.
* Items that are there come first.
"""

from __future__ import annotations

import queue
import secrets
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Final

from ..errors import QueueClosed, WorkerDied
from ..transport import reactor
from ..transport.alarm import Alarm
from ..transport.endpoint import Received
from ..transport.process import closed_in_child, reset_in_child
from ..transport.readiness import Readiness
from ..transport.sockets import close_fds
from ..workers import info, worker
from ..workers.losses import lost
from .here import Here
from .line import ISSUED, REDEEMED, SENT, SENT_BEFORE, TAKEN, TAKEN_BEFORE, Line, open_lines
from .state import ChannelState, Way

#: Seconds between two looks at the others by one who waits.
LOOK_EVERY: Final = 0.25

FORKED: Final = (
    "this channel was made before a fork and belongs to the parent process: pass it to workers started by torchwq"
)


class Core:
    """A process's part of a channel."""

    def __init__(self, name: bytes, capacity: int | None, line: Line | None = None, told: Sequence[int] = ()) -> None:
        self.name = name
        self.capacity = capacity
        self.line = line
        self._here = Here(capacity)
        self.way: Way = line or self._here
        self.forked = False
        #: Handles that threads of this process have, and how many of them were ever sent within it.
        self.handles: weakref.WeakSet[Any] = weakref.WeakSet()
        self.invited = 0
        self.under_way = 0
        self._told = set(told)
        self._failures: list[WorkerDied] = []
        self._trouble = Alarm()
        self._readiness = Readiness()
        self._looks = False
        if line is not None:
            self._use(line)
        closed_in_child(self)
        _cores[name] = self

    def _use(self, line: Line) -> None:
        look = weakref.WeakMethod(self._look_as_writer)
        line.on_wait_for_room = lambda: _call(look)
        self.line = self.way = line

    # Waiting

    def wait(self, reader: Any, nonblocking: bool, timeout: float | None) -> Received | None:
        """The next item, after ``take`` has found none; None if there is none and ``nonblocking``, or none will come.

        Raises queue.Empty, WorkerDied.
        """
        self.check_fork()
        if nonblocking:
            return None
        deadline = None if timeout is None else time.monotonic() + timeout
        slept = 0.0
        while True:
            way, now = self.way, time.monotonic()
            until = now + (1.0 if way.here else LOOK_EVERY)
            received = way.sleep(until if deadline is None else min(until, deadline))
            if received is not None:
                return received
            self.check_fork()
            if way.state() is ChannelState.DRAINED and way is self.way:
                return way.take()
            slept, now = slept + time.monotonic() - now, time.monotonic()
            if slept >= LOOK_EVERY or self._failures:
                slept = 0.0
                self.look(reader)
            if deadline is not None and now >= deadline:
                raise queue.Empty

    def look(self, reader: Any) -> None:
        """Raise WorkerDied if someone who waits to read is to be told of something, unless there are items.

        They are looked for last: what those have written that have gone since is there.
        """
        if self.line is not None:
            self.line.finish_closing()
            if not self._failures:
                try:
                    self._look_for_deaths(SENT, SENT_BEFORE, TAKEN, TAKEN_BEFORE)
                except WorkerDied as death:
                    self._failures.append(death)
        alone = not self._failures and self._is_alone(reader)
        if self.way.num_items():
            return
        if self._failures:
            raise self._failures.pop(0)
        if alone:
            raise WorkerDied(
                "nobody is left to write to this channel: every worker that had it has ended or dropped it. If one of "
                "them failed, join() of its map raises its error"
            )

    def _look_as_writer(self) -> None:
        if self._failures:
            raise self._failures.pop(0)
        self._look_for_deaths(TAKEN, TAKEN_BEFORE, SENT, SENT_BEFORE)

    def _look_for_deaths(self, theirs: int, theirs_before: int, other: int, other_before: int) -> None:
        """Tell of the death of one who had done what is waited for."""
        assert self.line is not None
        roster = self.line.roster
        if self.line.left:
            return
        words = roster.words
        gone, unknown, someone_does = [], [], False
        for seat, lives in roster.others():
            first = roster.index(seat)
            does = words[first + theirs] > words[first + theirs_before]
            if lives:
                someone_does = someone_does or does
            elif seat not in self._told:
                if does:
                    gone.append(seat)
                elif words[first + other] == words[first + other_before]:
                    unknown.append(seat)
        for seat in gone or (() if someone_does else unknown):
            self._told.add(seat)
            raise lost(roster, seat, "this channel")

    def _is_alone(self, reader: Any) -> bool:
        if any(handle is not reader for handle in self.handles) or self.under_way:
            return False
        came, writer = self.invited > 0, self._here.last_writer
        if self.line is not None and not self.line.left:
            roster = self.line.roster
            if any(lives for _, lives in roster.others()):
                return False
            issued, redeemed = roster.sum(ISSUED), roster.sum(REDEEMED)
            if issued > redeemed and (worker.living() or info.worker_info() is not None):
                return False
            came = came or roster.others_came() or issued > 0
            writer = self.line.last_writer or writer
        elsewhere = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
        return came and writer not in elsewhere

    # Handles

    def ticket(self) -> list[Any]:
        """Descriptors for another process. Raises ResourceError; or MarshalError, for an item that cannot go there."""
        self.open_to_processes()
        assert self.line is not None
        return self.line.ticket()

    def open_to_processes(self) -> None:
        """Have a line, and let what waits here go on it. Raises as ``ticket``, and changes nothing then."""
        self.check_fork()
        if self.line is None:
            with self._here.lock:
                if self.line is None:
                    line = Line(capacity=self.capacity)
                    try:
                        self._here.empty_into(line)
                    except BaseException:
                        line.leave()
                        raise
                    self._use(line)
                    self._watch()

    def dead(self) -> list[int]:
        """The seats of those that are dead now: whoever is sent a handle need not be told of them."""
        if self.line is None or self.line.left:
            return []
        return [seat for seat, lives in self.line.roster.others() if not lives]

    def leave(self, handle: Any, mapid: int, failed: bool) -> None:
        """Worker ``mapid``, which is a thread, has ended, and its handle with it."""
        self.handles.discard(handle)
        if failed and self.way.state() is ChannelState.OPEN:
            self._failures.append(
                WorkerDied(
                    f"worker {mapid}, a thread that had this channel, ended with an error: join() of its map raises it",
                    mapid=mapid,
                )
            )
            self._trouble.set()
        self._here.box.wake_all()

    def check_fork(self) -> None:
        if self.forked:
            raise QueueClosed(FORKED)

    # Readiness

    def fileno(self) -> int:
        """Readable when ``read`` would not have to wait."""
        self.check_fork()
        if not self._readiness.is_watched:
            self._watch()
            self._readiness.fileno()
            self._look_on()
        return self._readiness.fileno()

    def _watch(self) -> None:
        if self.line is None:
            self._readiness.set(self._here.box.bell().fileno(), self._trouble.fileno())
        else:
            self._readiness.set(self.line.outlet(), self._trouble.fileno())

    def close(self) -> None:
        self.way.close()
        if self.line is None:
            self._trouble.set()

    def is_ready(self, reader: Any) -> bool:
        """Whether ``read`` would not have to wait; looks at the others, too."""
        if self._failures or self.forked:
            return True
        if self.way.num_items() or self.way.state() is ChannelState.DRAINED:
            return True
        try:
            self.look(reader)
        except WorkerDied as death:
            self._failures.append(death)
            return True
        return False

    def _look_on(self) -> None:
        """Let deaths show in the descriptor."""
        if not self.forked and self._readiness.is_watched:
            handles = list(self.handles)
            if self.is_ready(handles[0] if len(handles) == 1 else None) and self._failures:
                self._trouble.set()
            elif not self._here.is_closed:
                self._trouble.clear()
            again = weakref.WeakMethod(self._look_on)
            reactor.get().call_later(LOOK_EVERY, lambda: _call(again))

    def abandon(self) -> None:
        self.forked = True
        self.way = _Forked()

    def __del__(self) -> None:
        line = getattr(self, "line", None)
        if sys.is_finalizing() or self.forked:
            return
        if line is not None and not line.left:
            reactor.get().call_later(0, line.retire)
        self._here.box.close()
        self._trouble.close()
        self._readiness.close()


class _Forked:
    """The way of a channel in the child of a fork: there is none."""

    here = True
    max_payload = 0
    is_closed = True

    def _refuse(self, *args: Any) -> Any:
        raise QueueClosed(FORKED)

    send = take = sleep = state = num_items = close = counts = _refuse


def _call(method: Callable[[], Callable[[], None] | None]) -> None:
    bound = method()
    if bound is not None:
        bound()


_cores: weakref.WeakValueDictionary[bytes, Core] = weakref.WeakValueDictionary()
_guard = threading.Lock()


@reset_in_child
def _forget() -> None:
    global _cores, _guard
    _cores, _guard = weakref.WeakValueDictionary(), threading.Lock()


def new(capacity: int | None) -> Core:
    return Core(secrets.token_bytes(16), capacity)


def open_(name: bytes, capacity: int | None, told: Sequence[int], fds: list[int]) -> Core:
    """This process's part of the channel that these descriptors are of; it need not be ``told`` of these dead.

    Takes the descriptors over.
    """
    with _guard:
        core = _cores.get(name)
        if core is None or core.line is None or core.line.left:
            return Core(name, capacity, Line(fds, capacity), told)
    close_fds(fds)
    core.line.received_again()
    return core


def leave_all(failed: bool) -> None:
    """At exit."""
    for line in list(open_lines):
        line.leave(failed=failed)
