"""The one background thread of a process: it watches the descriptors for which no thread waits.

It sends what full sockets did not take, answers processes that open queues by name, and notices the end of a process at
the other end of a control connection. It never unpickles anything and never runs users' code, so neither holds it up.

Invariants:

* Callbacks run in the reactor's thread, one at a time. They must not block, nor run users' code, which pickling does;
  they leave that to :mod:`torchwq.transport.cleanup`. The debug mode (:mod:`.debug`) reports one that does either.
* A callback may still run once after ``remove``, if its event was under way already.
* A descriptor is removed *before* it is closed: its number may be used again, and epoll goes on reporting a closed
  descriptor whose file another process holds open.
"""

from __future__ import annotations

import heapq
import itertools
import selectors
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from . import debug, descriptors
from .alarm import Alarm
from .fork import closed_in_child, reset_in_child
from .timing import POLL_INTERVAL, THREAD_START_TIMEOUT

Callback = Callable[[], None]


@dataclass(slots=True)
class _Watched:
    reader: Callback | None = None
    writer: Callback | None = None

    def events(self) -> int:
        return (selectors.EVENT_READ if self.reader else 0) | (selectors.EVENT_WRITE if self.writer else 0)


def _new_selector() -> selectors.BaseSelector:
    """The best one that the system allows."""
    descriptors.fill_stdio()
    try:
        return selectors.DefaultSelector()
    except OSError as error:
        if error.errno in descriptors.REFUSALS:
            return selectors.PollSelector()
        raise descriptors.resource_error(error, "epoll_create1") from error


class Reactor:
    """The thread, started with the first descriptor or timer. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._selector = _new_selector()
        #: Whether a ``select`` under way does not learn of changes by itself.
        self._is_polling = not hasattr(self._selector, "fileno")
        self._watched: dict[int, _Watched] = {}
        #: Changed by the reactor's thread only. Any thread appends to the second.
        self._timers: list[tuple[float, int, Callback]] = []
        self._new_timers: deque[tuple[float, int, Callback]] = deque()
        self._order = itertools.count()
        try:
            self._wake_up = Alarm()
        except BaseException:
            self._selector.close()
            raise
        self._selector.register(self._wake_up.fileno(), selectors.EVENT_READ, None)
        self._thread: threading.Thread | None = None
        closed_in_child(self)

    def set_reader(self, fd: int, callback: Callback | None) -> None:
        """Call ``callback`` whenever ``fd`` is readable, until set to None."""
        with self._lock:
            watched = self._watched.setdefault(fd, _Watched())
            watched.reader = callback
            self._update(fd, watched)

    def set_writer(self, fd: int, callback: Callback | None) -> None:
        """Call ``callback`` whenever ``fd`` is writable, until set to None."""
        with self._lock:
            watched = self._watched.setdefault(fd, _Watched())
            watched.writer = callback
            self._update(fd, watched)

    def remove(self, fd: int) -> None:
        with self._lock:
            if self._watched.pop(fd, None) is not None and fd in self._selector.get_map():
                self._selector.unregister(fd)
                self._wake_thread()

    def call_later(self, seconds: float, callback: Callback) -> None:
        """Call ``callback`` in ``seconds``. Takes no lock, once the thread runs: finalizers call this."""
        self._new_timers.append((time.monotonic() + seconds, next(self._order), callback))
        if self._thread is None:
            with self._lock:
                self._start()
        self._wake_up.set()

    @property
    def is_in_current_thread(self) -> bool:
        """Whether this is called by one of its callbacks."""
        return self._thread is threading.current_thread()

    def _update(self, fd: int, watched: _Watched) -> None:
        events = watched.events()
        if fd not in self._selector.get_map():
            if events:
                self._selector.register(fd, events, watched)
        elif events:
            self._selector.modify(fd, events, watched)
        else:
            self._selector.unregister(fd)
        self._wake_thread()
        if events:
            self._start()
        else:
            self._watched.pop(fd, None)

    def _wake_thread(self) -> None:
        if self._is_polling and not self.is_in_current_thread:
            self._wake_up.set()

    def _start(self) -> None:
        if self._thread is None:
            # Set first: a finalizer that runs while the thread starts must not start another.
            thread = self._thread = threading.Thread(target=self._run, name="torchwq-reactor", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                self._thread = None
                if "shutdown" not in str(error):
                    raise
                # The interpreter ends: from 3.12 on it starts no thread then, and none is needed.
            except BaseException:  # a KeyboardInterrupt: the thread may run or not
                until = time.monotonic() + THREAD_START_TIMEOUT
                while not thread.is_alive() and time.monotonic() < until:
                    time.sleep(POLL_INTERVAL)
                if not thread.is_alive():
                    self._thread = None
                raise

    def _run(self) -> None:
        while True:
            while self._new_timers:
                heapq.heappush(self._timers, self._new_timers.popleft())
            until = self._timers[0][0] if self._timers else None
            ready = self._selector.select(None if until is None else max(0.0, until - time.monotonic()))
            for key, events in ready:
                if key.data is None:
                    self._wake_up.clear()
                    continue
                if events & selectors.EVENT_READ:
                    _call(key.data.reader)
                if events & selectors.EVENT_WRITE:
                    _call(key.data.writer)
            while self._timers and self._timers[0][0] <= time.monotonic():
                _call(heapq.heappop(self._timers)[2])

    def abandon(self) -> None:
        self._selector.close()


@debug.timed
def _call(callback: Callback | None) -> None:
    if callback is None:
        return
    try:
        callback()
    except Exception:
        print("torchwq: internal error in the reactor thread", file=sys.stderr)
        traceback.print_exc()


_reactor: Reactor | None = None
_guard = threading.RLock()


@reset_in_child
def _forget() -> None:
    global _reactor, _guard
    _reactor, _guard = None, threading.RLock()


def get() -> Reactor:
    """The reactor of this process."""
    global _reactor
    if _reactor is None:
        with _guard:
            if _reactor is None:
                made = Reactor()
                if _reactor is None:  # else a finalizer in between has made one
                    _reactor = made
    return _reactor
