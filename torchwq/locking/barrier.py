"""A barrier that does not wait for the dead: a few words under the table's lock, and descriptors that wake who waits.

Invariants:

* A round ends when its number changes: because as many have arrived as it needs, or, BROKEN, because a death was
  noticed. It is counted from 0 again then.
* All who wait have been told of the losses that there had been when the first of them arrived. So one more than that
  concerns each of them, and whoever sees it ends the round for all.
* What other processes do, and threads that end with a handle, the monitor tells; the cleanup thread looks then, for the
  reactor must not wait for the table's lock. Who waits looks himself every ``POLL_INTERVAL`` seconds only for what no
  event tells: a thread of the user's that ends, a handle that is dropped, and what the monitor's events do not cover.
* Each handle is told, once, of each death since it was sent: at a barrier where it waits, or before it has arrived at
  the next one.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Final, Protocol

from ..errors import WorkerDied
from ..memory import anonymous
from ..peers.failures import SeenFailures
from ..peers.local_handles import LocalHandles
from ..peers.monitor import POLL_INTERVAL, PeerMonitor
from ..peers.table import PeerTable
from ..transport import descriptors
from ..transport.descriptors import close_fds
from ..workers import threads
from ..workers.deaths import others_may_come, raise_next_death
from .layout import (
    BROKEN,
    GENERATION,
    HANDLES_CLOSED,
    KNOWN_FAILURES,
    NUM_ARRIVED,
    NUM_RELEASED,
    NUM_WAITING,
    PARTIES,
    THREAD_FAILURES,
)

#: For so many seconds a thread waits as if nothing could be wrong.
_FIRST_WAIT: Final = 0.25
#: Where the system has no eventfd, nothing wakes who waits: he looks so often, in seconds.
_POLL_INTERVAL_WITHOUT_EVENTS: Final = 0.001

_PREFIX: Final = "the barrier cannot be completed: "


def new_generation_events() -> list[int]:
    """What wakes those who wait at a barrier: readable from the end of a round of its parity to the end of the next."""
    events: list[int] = []
    try:
        for _ in range(2):
            event = descriptors.eventfd()
            if event is None:
                break
            events.append(event)
    except OSError as error:
        close_fds(events)
        raise anonymous.resource_error(error) from error
    return events


class _MutexState(Protocol):
    """One process's part of a mutex (``state.MutexState``), to which the barrier belongs."""

    table: PeerTable
    monitor: PeerMonitor
    slot: int
    handles: LocalHandles[object]
    closed: bool

    def check_usable(self) -> None:
        """Raise MutexError if it cannot be used any more."""


class Barrier:
    """One process's part of it."""

    def __init__(self, state: _MutexState, events: Sequence[int]) -> None:
        self._state: _MutexState = weakref.proxy(state)  # which owns it
        self._events = events
        self._table = state.table
        self._words = state.table.words
        self._slot = state.slot
        #: Threads of this process that have come to the barrier.
        self._threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()

    def wait(self, n: int, timeout: float | None, seen: SeenFailures) -> int:
        self._threads.add(threading.current_thread())
        deadline = None if timeout is None else time.monotonic() + timeout
        words = self._words
        with self._table.locked():
            if self._has_unseen_failure(seen):
                if words[NUM_ARRIVED] and self._num_failures() > words[KNOWN_FAILURES]:
                    self._break()  # who waits has not been told yet
                self._raise_unseen_failure(seen)
            number = int(words[GENERATION])
            if not words[NUM_ARRIVED]:
                words[PARTIES], words[KNOWN_FAILURES] = n, self._num_failures()
            elif words[PARTIES] != n:
                raise ValueError(f"a barrier of {int(words[PARTIES])} is waited for already, and this one is of {n}")
            if words[NUM_ARRIVED] + 1 == n:
                self._next_generation()
                return self._take_position(number)
            words[NUM_ARRIVED] += 1
            words[self._slot + NUM_WAITING] += 1
        timed_out = None
        try:
            self._wait_for_end(number, deadline)
        except TimeoutError as error:
            timed_out = error
        finally:
            with self._table.locked():
                if not self._state.closed:
                    words[self._slot + NUM_WAITING] -= 1
                    if words[GENERATION] == number:
                        words[NUM_ARRIVED] -= 1
                        if timed_out is not None:
                            raise timed_out
        if words[BROKEN + number % 2] == number + 1:
            self._raise_unseen_failure(seen)
            raise WorkerDied(
                "the barrier cannot be completed: others that had this mutex have gone, and all that have it wait here"
            )
        with self._table.locked():
            return self._take_position(number)

    def _take_position(self, number: int) -> int:
        """In which place this thread goes on after a round."""
        position = int(self._words[NUM_RELEASED + number % 2])
        self._words[NUM_RELEASED + number % 2] = position + 1
        return position

    def _next_generation(self) -> None:
        number = int(self._words[GENERATION])
        self._words[NUM_ARRIVED] = 0
        self._words[NUM_RELEASED + number % 2] = 0
        self._words[GENERATION] = number + 1
        if self._events:
            os.write(self._events[number % 2], (1).to_bytes(8, "little"))
            with contextlib.suppress(BlockingIOError):
                os.read(self._events[1 - number % 2], 8)

    def _break(self) -> None:
        number = int(self._words[GENERATION])
        self._words[BROKEN + number % 2] = number + 1
        self._next_generation()

    def _wait_for_end(self, number: int, deadline: float | None) -> None:
        poll = select.poll()
        if self._events:
            poll.register(self._events[number % 2], select.POLLIN)
        if not self._sleep(poll, number, deadline, _FIRST_WAIT):
            with self._state.monitor.watching():
                self.check()
                while not self._sleep(poll, number, deadline, POLL_INTERVAL):
                    self.check()

    def _sleep(self, poll: select.poll, number: int, deadline: float | None, longest: float) -> bool:
        """Whether the round has ended, within so many seconds."""
        until = time.monotonic() + longest
        while self._words[GENERATION] == number:
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                self.check()
                if self._words[GENERATION] != number:
                    break
                raise TimeoutError("not all have come to the barrier in time")
            if now >= until:
                return False
            left = (until if deadline is None else min(until, deadline)) - now
            poll.poll(1000 * (left if self._events else min(left, _POLL_INTERVAL_WITHOUT_EVENTS)))
            self._state.check_usable()
        return True

    def check(self) -> None:
        """End the round if it cannot be completed. The monitor has this called when there may be something new."""
        words = self._words
        with self._table.locked():
            if (
                not self._state.closed
                and words[NUM_ARRIVED]
                and (self._num_failures() > words[KNOWN_FAILURES] or self._all_wait_here())
            ):
                self._break()

    def _num_failures(self) -> int:
        return self._table.num_deaths + int(self._words[THREAD_FAILURES])

    def _has_unseen_failure(self, seen: SeenFailures) -> bool:
        return self._words[THREAD_FAILURES] > seen.thread_failures or seen.next_unseen_death(self._table) is not None

    def _raise_unseen_failure(self, seen: SeenFailures) -> None:
        raise_next_death(seen, self._table, "this mutex", so=_PREFIX)
        if self._words[THREAD_FAILURES] > seen.thread_failures:
            seen.thread_failures = int(self._words[THREAD_FAILURES])
            raise WorkerDied(
                f"{_PREFIX}a worker that had this mutex, a thread, ended with an error: join() of its map raises it"
            )

    def _all_wait_here(self) -> bool:
        """Whether some that had the mutex have given it up, and all that have it wait here already.

        Daemon threads of this process that have never come to the barrier are not known.
        """
        table, waiting = self._table, int(self._words[self._slot + NUM_WAITING])
        if others_may_come(self._state.handles, table, lambda slot: bool(table.get_word(slot, NUM_WAITING))):
            return False
        if len(self._state.handles.all()) > waiting:
            return False
        known = {thread for thread in list(self._threads) if thread.is_alive()}.union(threads.user_threads())
        return bool(self._words[HANDLES_CLOSED]) and len(known) <= max(1, waiting)
