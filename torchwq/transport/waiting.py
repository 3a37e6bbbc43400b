"""The one place where a thread sleeps until a message comes.

Waking a process that sleeps costs many times what passing a message costs, so a wait first tries again for a short
while. How long adapts: a wait that ended soon after falling asleep lengthens the next spin, a spin in vain halves
it, so that a queue which is fed rarely costs no processor time.

Invariants:

* The shared end of a queue is watched with EPOLLEXCLUSIVE where the system has it: one message wakes one of the
  sleeping processes, not all of them. It is watched while somebody sleeps, and not longer: whoever sends would pay
  for it with each message. Each who falls asleep sees to it, and so makes good what an interruption has left.
* That process may be killed between waking and taking the message. So no sleep is longer than ``SLICE``; after
  each the message is tried for again, by everyone.
* An :class:`~torchwq.transport.alarm.Alarm` ends every wait; the caller then looks at the state it stands for.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final, Protocol, TypeVar

from . import descriptors
from .alarm import Alarm
from .process import closed_in_child

T = TypeVar("T")

#: Longest sleep in seconds before a message is tried for again.
SLICE: Final = 0.5
_MAX_SPIN: Final = 100_000  # nanoseconds
_MIN_SPIN: Final = 10_000
_LOOKS_PER_YIELD: Final = 4
#: A sleep shorter than this would have been better spent spinning.
_SHORT_SLEEP: Final = 400_000
_EXCLUSIVE: Final = getattr(select, "EPOLLEXCLUSIVE", 0)


def cores() -> int:
    """How many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


class _HasFileno(Protocol):
    def fileno(self) -> int: ...


class Waiter:
    """Waits for one source of messages and one alarm. Safe to use from several threads."""

    def __init__(self, source: _HasFileno, alarm: Alarm) -> None:
        self._source = source
        self._alarm = alarm
        self._can_spin = cores() > 1
        self._spin = _MAX_SPIN if self._can_spin else 0
        # Reentrant: a finalizer that runs in the middle of falling asleep may close this.
        self._guard = threading.RLock()
        self._sleepers = 0
        #: Threads that sleep; one that was interrupted at the wrong moment stands here until it has slept again.
        self._asleep: set[int] = set()
        self._watched = -1
        self._closed = False
        self._epoll = descriptors.epoll()
        if self._epoll is not None:
            try:
                self._epoll.register(alarm.fileno(), select.EPOLLIN)
            except BaseException:
                self._epoll.close()
                raise
        closed_in_child(self)

    @classmethod
    def with_alarm(cls, source: _HasFileno) -> tuple[Waiter, Alarm]:
        """One that has an alarm of its own, and the alarm. Raises ResourceError, and leaves nothing open then."""
        alarm = Alarm()
        try:
            return cls(source, alarm), alarm
        except BaseException:
            alarm.close()
            raise

    def wait(self, attempt: Callable[[], T | None], deadline: float | None) -> T | None:
        """Return what ``attempt`` gives; None when the alarm is set or ``deadline`` (time.monotonic) has passed.

        ``attempt`` is called at least once after the alarm was set, so nothing that had come before is overlooked.
        """
        if not self._enter():
            return attempt()
        try:
            if self._spin:
                found = self._spin_for(attempt)
                if found is not None:
                    return found
            return self._sleep_for(attempt, deadline)
        finally:
            self._leave()

    def _enter(self) -> bool:
        with self._guard:
            if self._closed:
                return False
            self._sleepers += 1
            return True

    def _leave(self) -> None:
        with self._guard:
            self._sleepers -= 1
            if self._closed and not self._sleepers:
                self._release()

    def _sleep_for(self, attempt: Callable[[], T | None], deadline: float | None) -> T | None:
        asleep_since = time.monotonic_ns()
        while True:
            remaining = SLICE if deadline is None else min(SLICE, deadline - time.monotonic())
            alarmed = self._sleep(max(remaining, 0.0))
            found = attempt()
            if found is not None:
                if self._can_spin and time.monotonic_ns() - asleep_since < _SHORT_SLEEP:
                    self._spin = min(_MAX_SPIN, max(_MIN_SPIN, self._spin * 4))
                return found
            if alarmed or (deadline is not None and time.monotonic() >= deadline):
                return None

    def _spin_for(self, attempt: Callable[[], T | None]) -> T | None:
        until = time.monotonic_ns() + self._spin
        # Asking is cheaper than trying: a failed ``recv`` makes an exception.
        poll = select.poll()
        try:
            poll.register(self._source.fileno(), select.POLLIN)
            poll.register(self._alarm.fileno(), select.POLLIN)
        except (OSError, ValueError):  # one is closed: the alarm says so
            return None
        look = poll.poll
        while True:
            for _ in range(_LOOKS_PER_YIELD):
                if look(0):
                    found = attempt()
                    if found is not None:
                        return found
                    if self._alarm.is_set():
                        return None
            if time.monotonic_ns() > until:
                break
            os.sched_yield()
        self._spin = self._spin // 2 if self._spin > _MIN_SPIN else 0
        return None

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        assert self._epoll is not None
        ident = threading.get_ident()
        try:
            with self._guard:
                self._asleep.add(ident)
                self._watched = self._source.fileno()
                # Somebody else watches it already; or it is closed, and the alarm says so.
                with contextlib.suppress(OSError, ValueError):
                    self._epoll.register(self._watched, select.EPOLLIN | _EXCLUSIVE)
            yield
        finally:
            with self._guard:
                self._asleep.discard(ident)
                if not self._asleep:
                    with contextlib.suppress(OSError, ValueError):
                        self._epoll.unregister(self._watched)

    def _sleep(self, seconds: float) -> bool:
        """Sleep until there may be a message; True if the alarm is set."""
        if self._epoll is not None:
            with self._watching():
                self._epoll.poll(seconds)
        else:
            poll = select.poll()
            poll.register(self._source.fileno(), select.POLLIN)
            poll.register(self._alarm.fileno(), select.POLLIN)
            poll.poll(seconds * 1000)
        return self._alarm.is_set()

    def close(self) -> None:
        """Wake everyone who waits; the last one out releases the descriptors, the alarm's too."""
        with self._guard:
            if self._closed:
                return
            self._closed = True
            self._alarm.set()
            if not self._sleepers:
                self._release()

    def _release(self) -> None:
        self._alarm.close()
        if self._epoll is not None:
            self._epoll.close()

    def abandon(self) -> None:
        if self._epoll is not None:
            self._epoll.close()
