"""A barrier that does not wait for the dead: words under the table's lock, and eventfds that wake whole generations.

As in ``threading.Barrier``, those who pass together are a *generation*. Invariants:

* A generation ends when its number changes: because as many threads have arrived as it needs, or because somebody has
  noticed a failure, which makes it BROKEN.
* KNOWN_FAILURES is the number of failures when the first thread of a generation arrived. Each thread that waits has
  been told of these. One more failure concerns all of them, so whoever notices it breaks the generation.
* The monitor reports what other processes do, and threads that end with a handle. The cleanup thread then checks the
  generation, because the reactor must not wait for the table's lock. A thread that waits checks it, too, every
  ``POLL_INTERVAL`` seconds, for what causes no event: a user's thread ends, a handle is dropped, or what the monitor
  does not cover.
* Each handle is told once of each failure since it was sent: while it waits at a barrier, or before it arrives there.
* A process that leaves while threads of it wait breaks the generation: these threads will not go on.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn

from ..errors import MutexError, ResourceError, WorkerDied
from ..peers.failures import SeenFailures
from ..peers.local_handles import LocalHandles
from ..peers.monitor import POLL_INTERVAL, PeerMonitor
from ..peers.table import PeerTable
from ..transport import cleanup, descriptors
from ..transport.descriptors import close_fds, close_with
from ..transport.fork import closed_in_child
from ..workers import shutdown, threads
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

#: Seconds for which a thread waits before it looks for failures: mostly the others are about to arrive.
_FIRST_WAIT: Final = 0.25
#: Where the system has no eventfd, a thread that waits looks this often, in seconds.
_POLL_INTERVAL_WITHOUT_EVENTS: Final = 0.001

_PREFIX: Final = "the barrier cannot be completed: "


def new_events() -> list[int]:
    """Eventfds for even and odd generations, readable from the end of one to the end of the next. None on macOS."""
    events: list[int] = []
    try:
        while len(events) < 2 and (event := descriptors.eventfd()) is not None:
            events.append(event)
    except ResourceError:
        close_fds(events)
        raise
    return events


def raise_closed() -> NoReturn:
    """This process has given up its mutexes."""
    shutdown.block_daemon_at_exit()
    raise MutexError("this process is ending, and has given up its mutexes")


class Barrier:
    """One process's part of the barrier. Owns ``events``.

    Args:
        table: those who have the mutex.
        handles: those of this process.
        events: what ``new_events`` gave, in this process or another.
    """

    def __init__(self, table: PeerTable, handles: LocalHandles[Any], events: Sequence[int]) -> None:
        self.events = events
        self._closing = close_with(self, *events)
        self._table = table
        self._handles = handles
        self._words = table.words
        self._num_waiting = table.slot_offset(table.slot) + NUM_WAITING
        check = functools.partial(_check, weakref.ref(self))
        self._monitor = PeerMonitor(table, functools.partial(cleanup.call_soon, check))
        #: Threads of this process that have come to the barrier.
        self._threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
        closed_in_child(self)

    def wait(self, n: int, timeout: float | None, seen: SeenFailures) -> int:
        self._threads.add(threading.current_thread())
        deadline = None if timeout is None else time.monotonic() + timeout
        words = self._words
        with self._table.locked():
            if self._has_unseen_failure(seen):
                if words[NUM_ARRIVED] and self._num_failures() > words[KNOWN_FAILURES]:
                    self._break()  # the threads that wait have not been told yet
                self._raise_unseen_failure(seen)
            generation = int(words[GENERATION])
            if not words[NUM_ARRIVED]:
                words[PARTIES], words[KNOWN_FAILURES] = n, self._num_failures()
            elif words[PARTIES] != n:
                raise ValueError(f"a barrier of {int(words[PARTIES])} is waited for already, and this one is of {n}")
            if words[NUM_ARRIVED] + 1 == n:
                self._next_generation()
                return self._take_position(generation)
            words[NUM_ARRIVED] += 1
            words[self._num_waiting] += 1
        timed_out = None
        try:
            self._wait_for_end(generation, deadline)
        except TimeoutError as error:
            timed_out = error
        finally:
            with self._table.locked():
                if self._table.fd >= 0:
                    words[self._num_waiting] -= 1
                    if words[GENERATION] == generation:
                        words[NUM_ARRIVED] -= 1
                        if timed_out is not None:
                            raise timed_out
        if self._table.fd < 0:
            raise_closed()
        if words[BROKEN + generation % 2] == generation + 1:
            self._raise_unseen_failure(seen)
            raise WorkerDied(f"{_PREFIX}others that had this mutex have gone, and all that have it wait here")
        with self._table.locked():
            return self._take_position(generation)

    def _take_position(self, generation: int) -> int:
        """In which place this thread goes on after a generation has ended."""
        position = int(self._words[NUM_RELEASED + generation % 2])
        self._words[NUM_RELEASED + generation % 2] = position + 1
        return position

    def _next_generation(self) -> None:
        generation = int(self._words[GENERATION])
        self._words[NUM_ARRIVED] = 0
        self._words[NUM_RELEASED + generation % 2] = 0
        self._words[GENERATION] = generation + 1
        if self.events:
            os.write(self.events[generation % 2], (1).to_bytes(8, "little"))
            with contextlib.suppress(BlockingIOError):
                os.read(self.events[1 - generation % 2], 8)

    def _break(self) -> None:
        generation = int(self._words[GENERATION])
        self._words[BROKEN + generation % 2] = generation + 1
        self._next_generation()

    def _wait_for_end(self, generation: int, deadline: float | None) -> None:
        poll = select.poll()
        if self.events:
            poll.register(self.events[generation % 2], select.POLLIN)
        if not self._sleep(poll, generation, deadline, _FIRST_WAIT):
            with self._monitor.watching():
                self.check()
                while not self._sleep(poll, generation, deadline, POLL_INTERVAL):
                    self.check()

    def _sleep(self, poll: select.poll, generation: int, deadline: float | None, longest: float) -> bool:
        """Whether the generation ends within ``longest`` seconds. Raises TimeoutError after ``deadline``."""
        until = time.monotonic() + longest
        while self._words[GENERATION] == generation:
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                self.check()
                if self._words[GENERATION] != generation:
                    break
                raise TimeoutError("not all have come to the barrier in time")
            if now >= until:
                return False
            left = (until if deadline is None else min(until, deadline)) - now
            poll.poll(1000 * (left if self.events else min(left, _POLL_INTERVAL_WITHOUT_EVENTS)))
            if self._table.fd < 0:
                raise_closed()
        return True

    def check(self) -> None:
        """Break the generation if it cannot be completed."""
        words = self._words
        with self._table.locked():
            if self._table.fd < 0 or not words[NUM_ARRIVED]:
                return
            if self._num_failures() > words[KNOWN_FAILURES] or self._all_wait_here():
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
        """Whether some handles on the mutex were closed, and the threads of all others wait here already.

        This does not know of daemon threads that have never come to the barrier.
        """
        table, waiting = self._table, int(self._words[self._num_waiting])
        if others_may_come(self._handles, table, lambda slot: bool(table.get_word(slot, NUM_WAITING))):
            return False
        if len(self._handles.all()) > waiting:
            return False
        known = {thread for thread in list(self._threads) if thread.is_alive()}.union(threads.user_threads())
        return bool(self._words[HANDLES_CLOSED]) and len(known) <= max(1, waiting)

    def leave(self, failed: bool) -> None:
        """Leave the table. ``failed``: see ``PeerTable.leave``."""
        self._monitor.close()
        with self._table.locked():
            if self._words[self._num_waiting] and self._words[NUM_ARRIVED]:
                self._break()
            self._table.leave(failed=failed)
        self._closing()

    def abandon(self) -> None:
        self._closing()


def _check(find: Callable[[], Barrier | None]) -> None:
    barrier = find()
    if barrier is not None:
        barrier.check()
