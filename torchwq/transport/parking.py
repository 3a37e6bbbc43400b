"""Where threads of one process sleep until another thread of it wakes them.

A sleeper looks for what it wants after it has lain down, so a waker that looks for sleepers afterwards cannot miss it.
Neither takes a lock: a finalizer that runs in the middle of either may wait or wake, too.

Invariants:

* A sleeper is in ``asleep`` before it looks for the last time, at what it wants and at its reasons not to wait. Whoever
  brings what it wants, or makes such a reason, looks at ``asleep`` afterwards. So one of them sees the other.
* Whoever takes a sleeper out of ``asleep`` wakes it. A sleeper that was chosen and leaves something for others wakes
  the next one, whether it found what it wanted or was interrupted.

Source: trio's parking lot (``trio.lowlevel.ParkingLot``), for threads.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from .timing import MAX_PARKED

R = TypeVar("R")


class ParkingLot:
    """Any number of threads that wait for the same thing, woken in the order in which they came.

    Args:
        is_left: whether there is more for the sleepers to take.
    """

    def __init__(self, is_left: Callable[[], object]) -> None:
        self._is_left = is_left
        #: A waker on the hot path looks here first.
        self.asleep: deque[threading.Lock] = deque()

    def wait(self, attempt: Callable[[], R | None], deadline: float | None, stop: Callable[[], object]) -> R | None:
        """Return what ``attempt`` gives; None after ``deadline`` (time.monotonic), or if there is a reason to ``stop``,
        or for no reason: the caller looks at the state of things and waits again.

        A KeyboardInterrupt that ends the wait takes nothing.
        """
        latch = threading.Lock()
        latch.acquire()
        found = None
        interrupted = True
        try:
            self.asleep.append(latch)
            found = attempt()
            if found is None and not stop():
                left = MAX_PARKED if deadline is None else deadline - time.monotonic()
                latch.acquire(timeout=max(0.0, min(left, MAX_PARKED)))
            interrupted = False
        finally:
            try:
                self.asleep.remove(latch)
                chosen = False
            except ValueError:
                chosen = True
            if chosen and (interrupted or found is not None) and self._is_left():
                self.wake_one()
        if found is None:
            try:
                found = attempt()
            finally:
                if chosen and self._is_left():
                    self.wake_one()
        return found

    def wake_one(self) -> None:
        """Wake the thread that has waited longest."""
        try:
            latch = self.asleep.popleft()
        except IndexError:
            return
        latch.release()

    def wake_all(self) -> None:
        """End every wait that has begun."""
        for _ in range(len(self.asleep)):
            self.wake_one()
