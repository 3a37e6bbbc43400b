"""The room that a bounded queue or channel has, and how its writers wait for it.

A writer takes a *claim*, writes, and gives the claim back: the message counts by itself then. While all that read are
threads of this process, whoever takes a message wakes one who waits. Once other processes read, too, it does so through
a word of shared memory and an event's descriptor, which all of them have. Whether a wait is in vain the room does not
know: it calls the caller's ``look``, after ``_FIRST_LOOK`` and after each ``wake_all``.

Note [Waiting for room]
~~~~~~~~~~~~~~~~~~~~~~~
The word says whether anybody waits, the descriptor is readable when there may be room. Two parties write one thing and
look at another, so each passes a memory fence in between:

* A writer empties the descriptor, sets the word, passes a fence, and counts. It sleeps only if there was no room then.
* Whoever takes a message counts it as taken, passes a fence, and looks at the word. If it is set, it clears it and
  makes the descriptor readable.

So either the writer sees the room, or it is woken. One event wakes one writer (``EPOLLEXCLUSIVE``, see epoll_ctl(2)).
Two messages may have been taken since, and the second has found the word cleared. So a writer that has waited, however
its wait ends, looks whether there is room for others, and passes the event on.

Who is killed in between leaves at worst an event that nobody passes on, or a message that nobody has counted as taken.
Therefore no sleep is longer than ``timing.MAX_SLEEP``, after which everybody counts again.

Invariants:

* ``_claims`` holds the claims of writers that were let in. ``_claim_count`` counts all that were ever let in. So a
  finalizer or a signal handler that writes in the middle of another write is counted there.
* While a message is being written, both it and its claim may be counted. So whoever gives a claim back looks whether
  anybody waits: that one may have been turned away because of the claim alone.
* A claim is taken out again whatever interrupts a write, and wherever.
* No lock of this object is held while a message is written: only that of ``lock``, which its maker chose.
"""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Final, TypeVar

from ..transport import descriptors, reactor
from ..transport.fork import closed_in_child
from ..transport.parking import ParkingLot
from ..transport.timing import MAX_SLEEP
from ..transport.waiting import Waiter

R = TypeVar("R")

#: After so many seconds a writer looks for the first time whether it waits in vain.
_FIRST_LOOK: Final = 0.25
#: How often one looks whom no event wakes, in seconds: where there is no eventfd; and a finalizer that writes in the
#: reactor's thread, because what would make room may be the reactor's work.
_POLL_INTERVAL: Final = 0.02


class Room:
    """The room for ``capacity`` messages. Safe to use from several threads.

    Args:
        capacity: how many messages may wait to be taken.
        count: how many do, as far as they have been written.
        is_closed: whether room does not matter any more, because writing only tells that all is closed.
        lock: gives what is held while one counts and writes, if that must be one step for all that write.
    """

    def __init__(
        self,
        capacity: int,
        count: Callable[[], int],
        is_closed: Callable[[], object],
        lock: Callable[[], AbstractContextManager[object] | None] | None = None,
    ) -> None:
        self.capacity = capacity
        self._count = count
        self._is_closed = is_closed
        self._lock = lock
        self._guard = threading.RLock()
        self._claims: set[object] = set()
        self._claim_count = 0
        #: One for each write that waits.
        self._waits: set[object] = set()
        self._changes = 0
        self._lot = ParkingLot(self._has_room)
        self._shared: SharedRoom | None = None

    def share(self, shared: SharedRoom) -> None:
        """Readers of other processes make room from now on, too."""
        self._shared = shared
        self.wake_all()

    def try_write(self, write: Callable[[], R]) -> R | None:
        """Call ``write``, and return what it does (not None); None, and it is not called, if there is no room."""
        lock = None if self._lock is None else self._lock()
        if lock is None:
            return self._claim_and_write(write)
        with lock:
            return self._claim_and_write(write)

    def write(self, write: Callable[[], R], look: Callable[[], float | None], deadline: float | None = None) -> R:
        """The same as soon as there is room, or all is closed. Raises queue.Full after ``deadline`` (time.monotonic).

        ``look`` is called by one who waits, now and then and after each ``wake_all``. It raises if there is no use in
        waiting, or returns in how many seconds it wants to be called again at the latest.
        """
        found = self.try_write(write)
        return self._wait(write, look, deadline) if found is None else found

    def made(self) -> None:
        """A message was taken. Called after it was counted as taken."""
        shared = self._shared
        if shared is not None:
            shared.made()
        elif self._lot.asleep:
            self._lot.wake_one()

    def wake_all(self) -> None:
        """Let all of this process that wait look at the state of things."""
        self._changes += 1
        self._lot.wake_all()
        shared = self._shared
        if shared is not None:
            shared.wake_all()

    def _changed_since(self, changes: int) -> Callable[[], bool]:
        return lambda: self._changes != changes

    def _has_room(self) -> bool:
        return bool(self._is_closed()) or self._count() + len(self._claims) < self.capacity

    def _take_claim(self, claim: object) -> bool:
        """False if there is no room."""
        with self._guard:
            while True:
                before, count = self._claim_count, self._count()
                if count + len(self._claims) >= self.capacity:
                    return False
                if before == self._claim_count:  # no finalizer or signal handler has written while this counted
                    self._claim_count += 1
                    self._claims.add(claim)
                    return True

    def _claim_and_write(self, write: Callable[[], R]) -> R | None:
        claim, claims = object(), self._claims
        try:
            if self._take_claim(claim):
                return write()
        finally:
            if claim in claims:
                claims.discard(claim)
                if self._waits and self._has_room():
                    self.made()
        return write() if self._is_closed() else None

    def _wait(self, write: Callable[[], R], look: Callable[[], float | None], deadline: float | None) -> R:
        attempt = functools.partial(self.try_write, write)
        seconds: float | None = _FIRST_LOOK
        wait = object()
        try:
            self._waits.add(wait)
            while True:
                changes, shared = self._changes, self._shared
                if reactor.get().is_in_current_thread:
                    seconds = _POLL_INTERVAL
                until = None if seconds is None else time.monotonic() + seconds
                if deadline is not None:
                    until = deadline if until is None else min(until, deadline)
                place = self._lot if shared is None else shared
                found = place.wait(attempt, until, self._changed_since(changes))
                if found is not None:
                    return found
                seconds = look()
                if deadline is not None and time.monotonic() >= deadline:
                    raise queue.Full(f"there are {self.capacity} unread messages, and room for no more")
        finally:
            self._waits.discard(wait)
            if self._has_room():
                self.made()


class SharedRoom:
    """The word and the descriptor by which processes tell each other of room.

    Args:
        words: memory that they share.
        index: of the word.
        fds: what ``handover`` of another one gave, which this object takes over; None to make a new event.

    Raises ResourceError: descriptors have run out.
    """

    def __init__(self, words: memoryview, index: int, fds: Sequence[int] | None = None) -> None:
        self._words, self._index = words, index
        if fds is None:
            fd = descriptors.eventfd()
            fds = [] if fd is None else [fd]
        #: The event; -1 where the system has none, or refuses it.
        self._fd = fds[0] if fds else -1
        self._closing = descriptors.close_with(self, *fds)
        #: Held while the words and the descriptors are used. Taking and releasing it is the fence of the note.
        self._fence = threading.RLock()
        self._waiter: Waiter | None = None
        closed_in_child(self)

    def handover(self) -> list[int]:
        """The descriptors, which stay this object's, from which another process makes the same."""
        return [] if self._fd < 0 else [self._fd]

    def fileno(self) -> int:
        """Readable when there may be room."""
        return self._fd if self._closing.alive else -1

    def made(self) -> None:
        """See ``Room.made``."""
        with self._fence:
            if self._closing.alive and self._words[self._index]:
                self._words[self._index] = 0
                if self._fd >= 0:
                    os.write(self._fd, (1).to_bytes(8, "little"))

    def wait(self, attempt: Callable[[], R | None], deadline: float | None, stop: Callable[[], object]) -> R | None:
        """What ``attempt`` gives as soon as it gives something; None after ``deadline`` (time.monotonic), if there is a
        reason to ``stop``, or for no reason. See Note [Waiting for room]."""
        found = self._asked(attempt)
        if found is not None:
            return found
        with self._fence:
            waiter = self._waiter
            if waiter is None and self.fileno() >= 0:
                waiter = self._waiter = Waiter(self)
        if waiter is None:
            if self._closing.alive:
                time.sleep(_POLL_INTERVAL)
            return attempt()
        latest = time.monotonic() + MAX_SLEEP
        return waiter.wait(
            functools.partial(self._asked, attempt), latest if deadline is None else min(latest, deadline), stop
        )

    def _asked(self, attempt: Callable[[], R | None]) -> R | None:
        with self._fence:
            if self._closing.alive:
                if self._fd >= 0:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._fd, 8)
                self._words[self._index] = 1
        return attempt()

    def wake_all(self) -> None:
        """End each ``wait`` of this process that has begun."""
        waiter = self._waiter
        if waiter is not None:
            waiter.wake_all()

    def close(self) -> None:
        """Give up the descriptors. Nobody of this process waits any more, or wakes then."""
        with self._fence:
            waiter, self._waiter = self._waiter, None
            self._closing()
        if waiter is not None:
            waiter.close()

    def abandon(self) -> None:
        if self._waiter is not None:
            self._waiter.abandon()
        self._closing()
