"""What the owner of a queue has to be told: deaths of workers, failures of their functions, and what may become one.

Invariants:

* A death or a failure is told once, by a call that waits, after the answers that are there were handed out.
* From the moment in which a worker may have failed until it is known whether it has, nobody is told that no worker is
  left: a handle that an error has closed is *in doubt*, and a worker whose end is awaited is *ending*.
* Everything here is read and changed with ``lock`` held, the owner's. ``changed`` is called with it.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from ..errors import WorkerDied
from ..transport import reactor
from ..workers import worker
from .counters import Slot
from .failing import Failed, Lost, NeverCame
from .members import Member, Notes, Side

#: How long, in seconds, a handle that an error has closed may keep a reader from hearing that nobody is left; and a
#: worker that has failed, its error from being told.
_LONGEST_DOUBT: Final = 5.0
_LONGEST_END: Final = 1.0
#: So many failures are remembered, because several handles of a worker tell of the same one.
_REMEMBERED: Final = 64


class Troubles:
    """Of one queue."""

    def __init__(self, lock: threading.RLock, changed: Callable[[], None]) -> None:
        self._lock = lock
        self._changed = changed
        self._to_tell: deque[Lost | Failed | NeverCame] = deque()
        #: How many workers have ended, or are ending, of which no more is known yet.
        self._ending = 0
        #: How many of them may have taken a question without having noted it.
        self.possibly_lost = 0
        self.last_end = ""
        #: Whether failures are told. Who has made a queue for his own use may hear of them otherwise.
        self.tells_failures = True
        self._told: deque[tuple[int | None, int]] = deque(maxlen=_REMEMBERED)
        #: Until when; and the number of a question that the handle had in hand, or 0.
        self._in_doubt: dict[Member | Side, tuple[float, int]] = {}
        self._is_closed = False

    @property
    def any_to_tell(self) -> bool:
        return bool(self._to_tell)

    @property
    def hides_the_end(self) -> bool:
        """Whether it is too early to say that no worker is left."""
        now = time.monotonic()
        return self._ending > 0 or any(until > now for until, _ in self._in_doubt.values())

    def may_have_failed(self, mark: int) -> bool:
        """Whether a worker may have failed at a question up to the number ``mark``, and it is not known yet."""
        with self._lock:
            now = time.monotonic()
            return self._ending > 0 or any(until > now and 0 < at <= mark for until, at in self._in_doubt.values())

    def next(self) -> Lost | Failed | NeverCame | None:
        """What is to be told next. It counts as told then."""
        return self._to_tell.popleft() if self._to_tell else None

    # Handles in doubt

    def doubt(self, handle: Member | Side, slot: Slot | Notes) -> None:
        """It was closed by an error that may turn out to be a failure of its worker. ``slot``: the handle's."""
        with self._lock:
            if not self._is_closed:
                at = 0 if not slot.busy else slot.number if slot.busy == 1 else 1
                self._in_doubt[handle] = time.monotonic() + _LONGEST_DOUBT, at
                reactor.get().call_later(_LONGEST_DOUBT, self._doubt_has_ended)

    def doubt_is_over(self, handle: Member | Side) -> bool:
        """Returns whether there was any."""
        with self._lock:
            if self._in_doubt.pop(handle, None) is None:
                return False
            if isinstance(handle, Member) and handle.link is not None:
                handle.link.close()
            self._changed()
            return True

    def _doubt_has_ended(self) -> None:
        with self._lock:
            self._changed()

    # Deaths

    def process_lost(self, pid: int, in_hand: str) -> None:
        """A process has ended without a goodbye. It is told when it is known how it has ended."""
        process = worker.find(pid)
        if process is None:
            self._report(None, worker.death_error(pid=pid, in_hand=in_hand))
        else:
            process.error_will_be_retrieved = True
            process.add_end_callback(lambda ended: self._report(ended, ended.death_error(in_hand)))

    def ended_in_doubt(self, pid: int, in_hand: str) -> None:
        """A process has ended while one of its handles was in doubt. It may have been killed, or have gone on well."""
        process = worker.find(pid)
        if process is None:
            return
        with self._lock:
            self._ending += 1
        process.add_end_callback(lambda ended: self._end_of_doubt(ended, pid, in_hand))

    def _end_of_doubt(self, process: worker.Worker, pid: int, in_hand: str) -> None:
        with self._lock:
            if process.exitcode != 0 and not any(each == pid for each, _ in self._told):
                self._report(process, process.death_error(in_hand))
                return
            self._ending -= 1
            self._changed()

    def expect_report(self) -> None:
        """A process is lost, of which ``process_lost`` is about to tell."""
        self._ending += 1
        self.possibly_lost += 1

    def _report(self, process: worker.Worker | None, death: Exception) -> None:
        assert isinstance(death, WorkerDied)
        with self._lock:
            self._tell(Lost(process, death))

    def _tell(self, trouble: Lost | Failed) -> None:
        self._ending -= 1
        self._to_tell.append(trouble)
        self.last_end = trouble.summary()
        self._changed()

    def never_came(self, process: worker.Worker) -> None:
        """A worker has failed before it opened the queue, and no other is there that could."""
        with self._lock:
            self._to_tell.append(NeverCame(process))
            self._changed()

    # Failures

    def note_failure(self, failed: Failed) -> None:
        """A worker that has the queue open has failed. It is told when it has ended, so that its error is known."""
        failure, process = failed.failure, failed.process
        with self._lock:
            # Not the failure itself: its error may refer to a handle on this queue.
            identity = failed.pid, failure.number
            if self._is_closed or not self.tells_failures or identity in self._told:
                return
            self._told.append(identity)
            self._ending += 1
        if process is None:
            self._tell_failure(failed)
            return
        process.error_will_be_retrieved = True
        once = functools.partial(self._tell_failure, failed, deque([failed]))
        if failure.ends:
            process.add_end_callback(lambda _: once())
            reactor.get().call_later(_LONGEST_END, once)
        else:
            once()

    def _tell_failure(self, failed: Failed, unless_told: deque[Failed] | None = None) -> None:
        with self._lock:
            if unless_told is not None:
                if not unless_told:
                    return
                unless_told.clear()
            self._tell(failed)

    def close(self) -> list[Member]:
        """Nothing is told any more. Returns the members in doubt, whose links are open."""
        self._is_closed = True
        members = [each for each in self._in_doubt if isinstance(each, Member)]
        self._in_doubt.clear()
        self._to_tell.clear()
        return members
