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
from ..peers.failures import SeenFailures, tenancies_of_the_dead
from ..peers.handles import Handles
from ..peers.monitor import PeerMonitor
from ..peers.table import PeerTable
from ..transport import cleanup
from ..transport.descriptors import close_fds, close_with
from ..transport.fork import closed_in_child, reset_in_child
from ..workers import shutdown
from ..workers.presence import Presence
from .barrier import Barrier, new_events
from .lock import Lock
from .words import FAILURES, LEFT, WAITING

_FORKED: Final = "this mutex was made before a fork and belongs to the parent process: pass it to workers of torchwq"

#: What is open in this process. A part outlives its handles, until it is given up in the background.
_open: set[Core] = set()
_by_name: weakref.WeakValueDictionary[bytes, Core] = weakref.WeakValueDictionary()
_guard = threading.RLock()


@reset_in_child
def _forget() -> None:
    global _by_name, _guard
    _by_name, _guard = weakref.WeakValueDictionary(), threading.RLock()
    _open.clear()


class Core:
    """Takes over ``fds``: those of ``handle_descriptors``, or none to make a new mutex."""

    def __init__(self, name: bytes, fds: Sequence[int] = ()) -> None:
        self.name = name
        try:
            self.table = PeerTable(fds[:2], states=(WAITING,))
        except BaseException:
            close_fds(fds[2:])
            raise
        try:
            self._events = list(fds[2:]) if fds else new_events()
        except BaseException:
            self.table.leave()
            raise
        self._closing = close_with(self, *self._events)
        self._words = self.table.words
        self.slot = self.table.index(self.table.slot)
        self._lock = Lock(self.table)
        self._barrier = Barrier(self, self._events)
        self.monitor = PeerMonitor(self.table, _weakly_later(self))
        self._thread = threading.local()
        self.handles: Handles[object] = Handles()
        self.forked = self.left = False
        if fds:
            self.table.count_redeemed()
        closed_in_child(self)
        _open.add(self)
        _by_name[name] = self

    def check(self) -> None:
        if self.forked:
            raise MutexError(_FORKED)
        if self.left:
            shutdown.hold_daemon()
            raise MutexError("this process is ending, and has given up its mutexes")

    def acquire(self, deadline: float | None) -> bool:
        self.check()
        if not hasattr(self._thread, "presence"):
            self._thread.presence = Presence(self, threading.get_ident())
        return self._lock.acquire(deadline)

    def release(self) -> None:
        self.check()
        self._lock.release()

    @property
    def abandoned(self) -> WorkerDied | None:
        return self._lock.abandoned

    @property
    def is_locked(self) -> bool:
        return self._lock.is_locked

    def thread_ended(self, ident: int) -> None:
        if not self.left and not self.forked:
            self._lock.thread_ended(ident)

    def wait_at_barrier(self, n: int, timeout: float | None, seen: SeenFailures) -> int:
        self.check()
        return self._barrier.wait(n, timeout, seen)

    def seen_by_new_handle(self) -> SeenFailures:
        """What a handle that is sent now need not be told of: all that there is to tell now."""
        self.check()
        return SeenFailures(tenancies_of_the_dead(self.table), int(self._words[FAILURES]))

    # Coming and going

    def handle_descriptors(self) -> list[anonymous.Descriptor]:
        self.check()
        return anonymous.duplicates([*self.table.handover(), *self._events], self.table.count_issued)

    def count_pending(self, number: int) -> None:
        """See ``HandleRef``."""
        with _guard:
            self.handles.count_pending(number)
        if number < 0:
            leave_later(self)

    def thread_ended_with_handle(self, failed: bool) -> None:
        if not self.left and not self.forked:
            with self.table.locked():
                self._words[LEFT] += 1
                self._words[FAILURES] += int(failed)
            self.table.ring()

    def leave(self, failed: bool = False) -> None:
        """Give up this process's part, and with it the lock. ``failed``: see ``PeerTable.leave``."""
        if self.forked:
            return
        with self.table.locked():
            if self.left:
                return
            self.left = True
            self._words[LEFT] += 1
        self.monitor.close()
        self._closing()
        self.table.leave(failed=failed)
        _open.discard(self)

    def abandon(self) -> None:
        self.forked = True
        self._closing()


def _weakly_later(core: Core) -> Callable[[], None]:
    """What has the barrier looked at in the background, if its part is still there, and stays so meanwhile."""
    find = weakref.ref(core)

    def call() -> None:
        found = find()
        if found is not None:
            found._barrier.look()

    return lambda: cleanup.later(call)


@contextlib.contextmanager
def found(name: bytes) -> Iterator[Core | None]:
    """The part that this process has already, if it has one; it does not leave meanwhile."""
    with _guard:
        core = _by_name.get(name)
        yield None if core is None or core.left else core


def leave_later(core: Core) -> None:
    """Give up this process's part if no handle is left then."""
    if not core.left and not core.forked:
        cleanup.later(functools.partial(_leave_if_unused, core))


def _leave_if_unused(core: Core) -> None:
    with _guard:
        if not core.handles.any_but(()):
            core.leave(shutdown.failed)


def _leave_all() -> None:
    for core in list(_open):
        core.leave(shutdown.failed)


shutdown.at_close(_leave_all)
