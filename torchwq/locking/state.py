"""One process's part of a mutex, which all its handles in this process share.

A process's part outlives its handles until the cleanup thread closes it.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Final

from ..errors import MutexError
from ..memory import anonymous
from ..peers.failures import SeenFailures, dead_peer_ids
from ..peers.local_handles import LocalHandles
from ..peers.table import PeerTable
from ..transport import cleanup
from ..transport.descriptors import close_fds
from ..transport.fork import closed_in_child, reset_in_child
from ..workers import shutdown
from .barrier import Barrier, new_events, raise_closed
from .layout import HANDLES_CLOSED, NUM_WAITING, THREAD_FAILURES
from .robust_lock import RobustLock

_FORKED: Final = "this mutex was made before a fork and belongs to the parent process: pass it to workers of torchwq"

_open: set[MutexState] = set()
_by_name: weakref.WeakValueDictionary[bytes, MutexState] = weakref.WeakValueDictionary()
_guard = threading.RLock()


@reset_in_child
def _forget() -> None:
    global _by_name, _guard
    _by_name, _guard = weakref.WeakValueDictionary(), threading.RLock()
    _open.clear()


class MutexState:
    """Takes over ``fds``: what ``handle_descriptors`` gave in another process, or none to make a new mutex."""

    def __init__(self, name: bytes, fds: Sequence[int] = ()) -> None:
        self.name = name
        try:
            self.table = PeerTable(fds[:2], reset_words=(NUM_WAITING,))
        except BaseException:
            close_fds(fds[2:])
            raise
        self.handles: LocalHandles[Any] = LocalHandles()
        try:
            self._barrier = Barrier(self.table, self.handles, list(fds[2:]) if fds else new_events())
        except BaseException:
            self.table.leave()
            raise
        self._words = self.table.words
        self.lock = RobustLock(self.table)
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
            raise_closed()

    def acquire(self, deadline: float | None) -> bool:
        self.check_usable()
        return self.lock.acquire(deadline)

    def release(self) -> None:
        self.check_usable()
        self.lock.release()

    def wait_at_barrier(self, n: int, timeout: float | None, seen: SeenFailures) -> int:
        self.check_usable()
        return self._barrier.wait(n, timeout, seen)

    def present_failures(self) -> SeenFailures:
        """The failures until now, of which a handle that is sent now need not be told."""
        self.check_usable()
        return SeenFailures(dead_peer_ids(self.table), int(self._words[THREAD_FAILURES]))

    def handle_descriptors(self) -> list[anonymous.Descriptor]:
        self.check_usable()
        return anonymous.duplicates([*self.table.handover(), *self._barrier.events], self.table.count_handles_sent)

    def count_pending(self, number: int) -> None:
        """See ``HandleRef``."""
        with _guard:
            self.handles.count_pending(number)
        if number < 0:
            close_when_unused(self)

    def on_worker_thread_end(self, failed: bool) -> None:
        """A worker that is a thread has ended, and its handle is closed."""
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
        self._barrier.leave(failed)
        _open.discard(self)

    def abandon(self) -> None:
        self.forked = True


@contextlib.contextmanager
def find_state(name: bytes) -> Iterator[MutexState | None]:
    """This process's part of the mutex of this name, if it has one. It is not closed within this block."""
    with _guard:
        state = _by_name.get(name)
        yield None if state is None or state.closed else state


def close_when_unused(state: MutexState) -> None:
    """Have the cleanup thread close this process's part if it has no handle by then."""
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
