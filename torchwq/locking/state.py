"""One process's part of a mutex: what all its handles share, and how it comes and goes."""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from ..errors import MutexError, WorkerDied
from ..memory import anonymous
from ..peers.failures import SeenFailures, dead_peer_ids
from ..peers.local_handles import LocalHandles
from ..peers.monitor import PeerMonitor
from ..peers.table import PeerTable
from ..transport import cleanup
from ..transport.descriptors import close_fds, close_with
from ..transport.fork import closed_in_child, reset_in_child
from ..workers import shutdown
from ..workers.thread_exit import ThreadExitHook
from .barrier import Barrier, new_generation_events
from .layout import HANDLES_CLOSED, NUM_WAITING, THREAD_FAILURES
from .robust_lock import RobustLock

_FORKED: Final = "this mutex was made before a fork and belongs to the parent process: pass it to workers of torchwq"

#: What is open in this process. A part outlives its handles, until it is given up in the background.
_open: set[MutexState] = set()
_by_name: weakref.WeakValueDictionary[bytes, MutexState] = weakref.WeakValueDictionary()
_guard = threading.RLock()


@reset_in_child
def _forget() -> None:
    global _by_name, _guard
    _by_name, _guard = weakref.WeakValueDictionary(), threading.RLock()
    _open.clear()


class MutexState:
    """Takes over ``fds``: those of ``handle_descriptors``, or none to make a new mutex."""

    def __init__(self, name: bytes, fds: Sequence[int] = ()) -> None:
        self.name = name
        try:
            self.table = PeerTable(fds[:2], reset_words=(NUM_WAITING,))
        except BaseException:
            close_fds(fds[2:])
            raise
        try:
            self._events = list(fds[2:]) if fds else new_generation_events()
        except BaseException:
            self.table.leave()
            raise
        self._closing = close_with(self, *self._events)
        self._words = self.table.words
        self.slot = self.table.slot_offset(self.table.slot)
        self._lock = RobustLock(self.table)
        self._barrier = Barrier(self, self._events)
        self.monitor = PeerMonitor(self.table, _check_barrier_later(self))
        self._thread = threading.local()
        self.handles: LocalHandles[object] = LocalHandles()
        self.forked = self.closed = False
        if fds:
            self.table.count_handle_received()
        closed_in_child(self)
        _open.add(self)
        _by_name[name] = self

    def check_usable(self) -> None:
        if self.forked:
            raise MutexError(_FORKED)
        if self.closed:
            shutdown.block_daemon_at_exit()
            raise MutexError("this process is ending, and has given up its mutexes")

    def acquire(self, deadline: float | None) -> bool:
        self.check_usable()
        if not hasattr(self._thread, "exit_hook"):
            self._thread.exit_hook = ThreadExitHook(self, threading.get_ident())
        return self._lock.acquire(deadline)

    def release(self) -> None:
        self.check_usable()
        self._lock.release()

    @property
    def abandoned(self) -> WorkerDied | None:
        return self._lock.abandoned

    @property
    def is_locked(self) -> bool:
        return self._lock.is_locked

    def on_thread_exit(self, ident: int) -> None:
        if not self.closed and not self.forked:
            self._lock.on_thread_exit(ident)

    def wait_at_barrier(self, n: int, timeout: float | None, seen: SeenFailures) -> int:
        self.check_usable()
        return self._barrier.wait(n, timeout, seen)

    def failures_seen_by_new_handle(self) -> SeenFailures:
        """What a handle that is sent now need not be told of: all that there is to tell now."""
        self.check_usable()
        return SeenFailures(dead_peer_ids(self.table), int(self._words[THREAD_FAILURES]))

    # Coming and going

    def handle_descriptors(self) -> list[anonymous.Descriptor]:
        self.check_usable()
        return anonymous.duplicates([*self.table.handover(), *self._events], self.table.count_handles_sent)

    def count_pending(self, number: int) -> None:
        """See ``HandleRef``."""
        with _guard:
            self.handles.count_pending(number)
        if number < 0:
            close_when_unused(self)

    def worker_thread_ended(self, failed: bool) -> None:
        if not self.closed and not self.forked:
            with self.table.locked():
                self._words[HANDLES_CLOSED] += 1
                self._words[THREAD_FAILURES] += int(failed)
            self.table.notify_all()

    def close(self, failed: bool = False) -> None:
        """Give up this process's part, and with it the lock. ``failed``: see ``PeerTable.leave``."""
        if self.forked:
            return
        with self.table.locked():
            if self.closed:
                return
            self.closed = True
            self._words[HANDLES_CLOSED] += 1
        self.monitor.close()
        self._closing()
        self.table.leave(failed=failed)
        _open.discard(self)

    def abandon(self) -> None:
        self.forked = True
        self._closing()


def _check_barrier_later(state: MutexState) -> Callable[[], None]:
    """What has the barrier looked at in the background, if its part is still there, and stays so meanwhile."""
    find = weakref.ref(state)

    def call() -> None:
        found = find()
        if found is not None:
            found._barrier.check()

    return lambda: cleanup.call_soon(call)


@contextlib.contextmanager
def find_state(name: bytes) -> Iterator[MutexState | None]:
    """The part that this process has already, if it has one; it does not leave meanwhile."""
    with _guard:
        state = _by_name.get(name)
        yield None if state is None or state.closed else state


def close_when_unused(state: MutexState) -> None:
    """Give up this process's part if no handle is left then."""
    if not state.closed and not state.forked:
        cleanup.call_soon(functools.partial(_close_if_unused, state))


def _close_if_unused(state: MutexState) -> None:
    with _guard:
        if not state.handles.any_other_than(()):
            state.close(shutdown.failed)


def _close_all() -> None:
    for state in list(_open):
        state.close(shutdown.failed)


shutdown.at_close(_close_all)
