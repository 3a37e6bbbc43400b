"""The one place where a thread sleeps until a message comes.

Waking a process that sleeps costs many times what passing a message costs, so a wait first *spins*: it tries again
for a short while. How long adapts: a short sleep lengthens the next spin, a spin in vain halves it, so that a queue
which is fed rarely costs no processor time. A spin during which the kernel has given the core to another thread shows
that there are more threads than cores. Then no thread spins here for a while, which doubles each time.

Invariants:

* The shared end of a queue is watched with EPOLLEXCLUSIVE where the system has it: one message wakes one of the
  sleeping processes, not all of them. It is watched only while a thread sleeps, because the sender pays for a watched
  end with each message. Each thread registers it before it sleeps, and so repairs what an interruption has left.
* The process that was woken may be killed before it takes the message. So no sleep is longer than ``MAX_SLEEP``, and
  after each one every reader tries again. The native part does so with one look and without the GIL. So whoever takes
  messages for other threads wakes them.
* A signal may come just before the main thread sleeps, or in another thread. So that thread handles signals after each
  sleep, in the native part after some of them.
* An :class:`~torchwq.transport.alarm.Alarm` ends every wait; the caller then looks at the state for which it stands.
* ``wake_all`` ends each wait that has begun, once: the alarm is set until the last of them has ended.
* The epoll is made for the first sleep. While none can be had, threads sleep by poll(2), and each message wakes all.
* A ``poll`` object serves one thread at a time: a thread takes one out of ``_polls``, and puts it back.

Source: epoll_ctl(2) for EPOLLEXCLUSIVE.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final, Protocol, TypeVar

from .. import _native
from ..errors import ResourceError
from . import descriptors
from .alarm import Alarm
from .timing import (
    MAX_NATIVE_SLEEP,
    MAX_SLEEP,
    MAX_SPIN_NS,
    MAX_SPIN_PAUSE_NS,
    MIN_SPIN_NS,
    MIN_SPIN_PAUSE_NS,
    SHORT_SLEEP_NS,
)

T = TypeVar("T")

_POLLS_PER_YIELD: Final = 4
#: The alarm's reason during ``wake_all``.
_WAKE: Final = "wake"
_THREAD: Final[int | None] = getattr(resource, "RUSAGE_THREAD", None)
_EXCLUSIVE: Final = getattr(select, "EPOLLEXCLUSIVE", 0)


def cores() -> int:
    """How many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def _preemptions() -> int:
    """How often another thread has taken this one's core; 0 where the system does not count that for each thread."""
    return 0 if _THREAD is None else resource.getrusage(_THREAD).ru_nivcsw


def never() -> bool:
    """No reason to stop waiting."""
    return False


class _HasFileno(Protocol):
    def fileno(self) -> int: ...


class Waiter:
    """Waits for one source of messages, or for its alarm. Safe to use from several threads. Raises ResourceError."""

    def __init__(self, source: _HasFileno) -> None:
        self._source = source
        self.alarm = Alarm()
        self._can_spin = cores() > 1
        self._spin = MAX_SPIN_NS if self._can_spin else 0
        #: After a spin in which another thread took the core: for how long there is none, and until when.
        self._pause = self._spin_from = 0
        # Reentrant: a finalizer that runs while a thread falls asleep may close this.
        self._guard = threading.RLock()
        #: One for each wait that has begun, and those of them that ``wake_all`` ends.
        self._waits: set[object] = set()
        self._to_wake: set[object] = set()
        #: Threads that sleep. One that was interrupted at the wrong moment stays here until it has slept again.
        self._asleep: set[int] = set()
        self._watched = -1
        self._closed = False
        self._epoll: select.epoll | None = None
        self._polls: deque[select.poll] = deque()

    def wait(
        self, attempt: Callable[[], T | None], deadline: float | None, stop: Callable[[], object] = never
    ) -> T | None:
        """Return what ``attempt`` gives; None when the alarm is set or ``deadline`` (time.monotonic) has passed.

        ``attempt`` is called at least once after the alarm was set, so no message that came before is overlooked.
        ``stop`` is asked once, after the wait has begun: whoever gives it a reason calls ``wake_all`` afterwards.
        """
        wait = object()
        try:
            if not self._enter(wait) or stop():
                return attempt()
            if self._spin:
                found = self._spin_for(attempt)
                if found is not None:
                    return found
            return self._sleep_for(attempt, deadline)
        finally:
            self._waits.discard(wait)  # first: a wait that a Ctrl-C left here would be woken for ever
            self._leave()

    def wake_all(self) -> None:
        """End every wait that has begun: it returns None unless ``attempt`` gives something."""
        if not self._waits:  # who begins to wait after this looks at ``stop`` after it has entered
            return
        with self._guard:
            if self._waits and not self._closed:
                self._to_wake |= self._waits
                self.alarm.set(_WAKE)

    def _enter(self, wait: object) -> bool:
        with self._guard:
            if self._closed:
                return False
            self._waits.add(wait)
            return True

    def _leave(self) -> None:
        with self._guard:
            if self._to_wake and self._to_wake.isdisjoint(self._waits):
                self.alarm.clear(_WAKE)
                self._to_wake &= self._waits  # not clear(): a signal handler may just have added some
            if self._closed and not self._waits:
                self._release()

    def _sleep_for(self, attempt: Callable[[], T | None], deadline: float | None) -> T | None:
        asleep_since = time.monotonic_ns()
        while True:
            remaining = MAX_NATIVE_SLEEP if deadline is None else deadline - time.monotonic()
            alarmed = self._sleep(max(remaining, 0.0))
            found = attempt()
            if found is not None:
                now = time.monotonic_ns()
                if self._can_spin and now - asleep_since < SHORT_SLEEP_NS and now >= self._spin_from:
                    self._spin = min(MAX_SPIN_NS, max(MIN_SPIN_NS, self._spin * 4))
                return found
            if alarmed or (deadline is not None and time.monotonic() >= deadline):
                return None

    def _spin_for(self, attempt: Callable[[], T | None]) -> T | None:
        until = time.monotonic_ns() + self._spin
        while True:
            state = _spin(self, max(until - time.monotonic_ns(), 0))
            if state <= 0:
                break
            found = attempt()
            if found is not None:
                self._pause //= 2
                return found
            if self.alarm.is_set():
                return None
            if time.monotonic_ns() > until:
                break
        if state < 0:
            self._stop_spinning()
        else:
            self._spin = self._spin // 2 if self._spin > MIN_SPIN_NS else 0
        return None

    def _stop_spinning(self) -> None:
        """There are more threads than cores: who spins takes the core of the one that it waits for. Pause, each time
        for longer."""
        self._spin = 0
        self._pause = min(max(2 * self._pause, MIN_SPIN_PAUSE_NS), MAX_SPIN_PAUSE_NS)
        self._spin_from = time.monotonic_ns() + self._pause

    def spin_in_python(self, ns: int) -> int:
        """Look for at most ``ns`` nanoseconds whether there may be a message, or the alarm is set.

        Returns 1 if so, 0 if not, and -1 if not and another thread has taken this one's core meanwhile.
        """
        until = time.monotonic_ns() + ns
        poll = self._take_poll()
        # A poll is cheaper than an attempt: a failed ``recv`` makes an exception.
        ask = poll.poll
        preemptions = _preemptions()
        try:
            while True:
                for _ in range(_POLLS_PER_YIELD):
                    if ask(0):
                        return 1
                if time.monotonic_ns() > until:
                    return 0 if _preemptions() == preemptions else -1
                os.sched_yield()
        finally:
            self._polls.append(poll)

    def spin_natively(self, ns: int) -> int:
        """The same in C, without the GIL."""
        found: int = _native.core.spin(self._source.fileno(), self.alarm.fileno(), ns, _POLLS_PER_YIELD)
        return found

    def _take_poll(self) -> select.poll:
        """A ``poll`` object for the source and the alarm that no other thread uses."""
        try:
            return self._polls.pop()
        except IndexError:
            pass
        poll = select.poll()
        poll.register(self.alarm.fileno(), select.POLLIN)
        with contextlib.suppress(OSError, ValueError):  # the source is closed, and the alarm set
            poll.register(self._source.fileno(), select.POLLIN)
        return poll

    def _sleep(self, seconds: float) -> bool:
        """Sleep until there may be a message, for about ``seconds`` at most; True if the alarm is set."""
        epoll = self._epoll or self._open_epoll()
        if epoll is not None and _native.core is not None:
            ident = threading.get_ident()
            try:
                self._asleep.add(ident)
                seconds = min(seconds, MAX_NATIVE_SLEEP)
                _native.core.sleep(epoll.fileno(), self._source.fileno(), seconds, MAX_SLEEP, self._asleep)
            finally:
                self._asleep.discard(ident)
        elif epoll is not None:
            with self._watching(epoll):
                epoll.poll(min(seconds, MAX_SLEEP))
        else:
            poll = self._take_poll()
            try:
                poll.poll(min(seconds, MAX_SLEEP) * 1000)
            finally:
                self._polls.append(poll)
        return self.alarm.is_set()

    def _open_epoll(self) -> select.epoll | None:
        with self._guard:
            try:
                epoll = descriptors.epoll()
            except ResourceError:  # no descriptor is free
                return None
            if epoll is None or self._epoll is not None:
                return self._epoll  # a finalizer has made it meanwhile
            epoll.register(self.alarm.fileno(), select.EPOLLIN)
            self._epoll = epoll
            return epoll

    @contextlib.contextmanager
    def _watching(self, epoll: select.epoll) -> Iterator[None]:
        ident = threading.get_ident()
        try:
            with self._guard:
                self._asleep.add(ident)
                self._watched = self._source.fileno()
                # Another thread watches the source already; or it is closed, and the alarm set.
                with contextlib.suppress(OSError, ValueError):
                    epoll.register(self._watched, select.EPOLLIN | _EXCLUSIVE)
            yield
        finally:
            with self._guard:
                self._asleep.discard(ident)
                if not self._asleep:
                    with contextlib.suppress(OSError, ValueError):
                        epoll.unregister(self._watched)

    def close(self) -> None:
        """End every wait; the last one releases the descriptors, the alarm's too."""
        with self._guard:
            if self._closed:
                return
            self._closed = True
            self.alarm.set()
            if not self._waits:
                self._release()

    def _release(self) -> None:
        self.alarm.close()
        self.abandon()

    def abandon(self) -> None:
        if self._epoll is not None:
            self._epoll.close()


_spin: Final[Callable[[Waiter, int], int]] = Waiter.spin_in_python if _native.core is None else Waiter.spin_natively
