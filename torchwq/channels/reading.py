"""What one reads a channel from: the way that its items take, and whoever may be gone.

Asking who is gone costs, so the first wait goes as if nothing could be wrong: mostly the next item is on its way. After
that the reader looks at the others each time it wakes, and what may have changed there wakes it (see ``core``).
"""

from __future__ import annotations

import contextlib
import math
import time
from typing import Final, Protocol

from ..handles.readable import EndOfMessages, MessageSource
from ..peers.monitor import POLL_INTERVAL, PeerMonitor
from ..transport.endpoint import Received
from .core import Core
from .failure_detector import READS, SeenChannelFailures
from .state import ChannelState

#: For so many seconds a reader waits as if nothing could be wrong.
_FIRST_WAIT: Final = 0.25


class _Handle(Protocol):
    #: Whether anybody has asked for its descriptor.
    is_watched: bool

    def seen_failures(self) -> SeenChannelFailures:
        """What this thread has been told of."""
        ...


class Reader(MessageSource):
    """One read with a handle, in one thread. What only a wait needs is set where it begins."""

    __slots__ = ("_changes", "_core", "_deadline", "_handle", "_is_drained", "_monitor", "_watching")

    _is_drained: bool
    #: ``Core.changes`` as this has last looked at the others.
    _changes: int
    _monitor: PeerMonitor | None
    _deadline: float

    def __init__(self, core: Core, handle: _Handle) -> None:
        self._core = core
        self._handle = handle
        #: What watches the other processes while this blocks; None for a task, which the readiness wakes.
        self._watching: contextlib.ExitStack | None = None

    def take(self) -> Received | None:
        return self._core.backend.take()

    def wait_until(self, deadline: float | None, timeout: float | None) -> Received:
        core = self._core
        core.check_fork()
        self._monitor = None
        self._deadline = math.inf if deadline is None else deadline
        received = core.backend.wait(min(time.monotonic() + _FIRST_WAIT, self._deadline))
        if received is not None:
            return received
        with contextlib.ExitStack() as self._watching:
            self._watching.enter_context(core.failures.waiting(self._handle, READS))
            return super().wait_until(deadline, timeout)

    def sleep(self, deadline: float | None) -> Received | None:
        until = time.monotonic() + self._core.failures.seconds_until_sure(POLL_INTERVAL)
        return self._core.backend.wait(min(until, self._deadline), self._has_changed)

    def _has_changed(self) -> bool:
        return self._core.changes != self._changes

    def may_raise(self) -> bool:
        core = self._core
        core.check_fork()
        monitor = core.monitor
        if self._watching is not None and monitor is not self._monitor and time.monotonic() < self._deadline:
            assert monitor is not None
            self._monitor = monitor
            self._watching.enter_context(monitor.watching())
        self._changes = core.changes  # before the look: of what comes later this is told again
        self._is_drained = core.backend.state() is ChannelState.DRAINED
        return True

    def raise_failure(self) -> None:
        core, seen = self._core, self._handle.seen_failures()
        if self._is_drained:
            core.failures.raise_unseen(seen, READS)
            core.failures.raise_failed_closing(seen)
            raise EndOfMessages
        if self._watching is None:
            core.failures.raise_unseen(seen, READS)  # not that nobody is left: another task may write
            return
        if core.socket is not None:
            core.socket.finish_closing()
        core.failures.raise_unseen(seen, READS)
        core.failures.publish_waiting(self._handle, READS)
        core.failures.raise_if_nobody_left(self._handle, READS)

    def on_empty(self) -> None:
        core, seen = self._core, self._handle.seen_failures()
        core.check_fork()
        core.failures.raise_unseen(seen, READS)
        if seen.nobody_left:
            seen.nobody_left = False
            core.failures.raise_if_nobody_left(self._handle, READS)
        if core.backend.state() is ChannelState.DRAINED:
            core.failures.raise_failed_closing(seen)

    def awaited(self) -> str:
        return "no item"

    def fileno(self) -> int:
        return self._core.fileno(self._handle)

    def is_ready(self) -> bool:
        """Looks at the others, too."""
        core = self._core
        if core.forked or core.backend.can_take() or core.backend.state() is ChannelState.DRAINED:
            return True
        if core.socket is not None:
            core.socket.finish_closing()
        seen = self._handle.seen_failures()
        seen.nobody_left = core.failures.is_nobody_left(self._handle, READS)
        return seen.nobody_left or core.failures.has_unseen(seen, READS)
