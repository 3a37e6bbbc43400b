"""One read of a channel: the order of looking at its items and at the failures of others.

Looking at others costs time, so for ``_FIRST_WAIT`` a reader waits as if nothing could be wrong: mostly the next item
is on its way. After that it looks at the others each time it wakes, and whatever may have changed there wakes it (see
``core``).
"""

from __future__ import annotations

import contextlib
import math
import time
from typing import Final

from ..handles.readable import EndOfMessages, MessageSource
from ..peers.monitor import POLL_INTERVAL, PeerMonitor
from ..transport.endpoint import Received
from .core import Core
from .failure_detector import READ, Handle
from .state import ChannelState

#: In seconds.
_FIRST_WAIT: Final = 0.25


class Reader(MessageSource):
    """One read with a handle, in one thread. What only a wait needs is set when the wait begins."""

    __slots__ = ("_changes", "_core", "_deadline", "_handle", "_is_drained", "_monitor", "_watching")

    _is_drained: bool
    #: ``Core.changes`` at the last look at the others.
    _changes: int
    _monitor: PeerMonitor | None
    _deadline: float

    def __init__(self, core: Core, handle: Handle) -> None:
        self._core = core
        self._handle = handle
        #: Keeps the other processes watched while this blocks; None for a task, which the readiness wakes.
        self._watching: contextlib.ExitStack | None = None

    def take(self) -> Received | None:
        return self._core.backend.take()

    def wait_until(self, deadline: float | None, timeout: float | None) -> Received:
        core = self._core
        core.check_fork()
        self._monitor = None
        self._deadline = math.inf if deadline is None else deadline
        received = core.backend.wait(core.backend.take, min(time.monotonic() + _FIRST_WAIT, self._deadline))
        if received is not None:
            return received
        with contextlib.ExitStack() as self._watching:
            self._watching.enter_context(core.failures.waiting(self._handle, READ))
            return super().wait_until(deadline, timeout)

    def sleep(self, deadline: float | None) -> Received | None:
        until = time.monotonic() + self._core.failures.seconds_until_sure(POLL_INTERVAL)
        return self._core.backend.wait(self.take, min(until, self._deadline), self._has_changed)

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
        self._changes = core.changes  # before the look: a later change wakes this again
        self._is_drained = core.backend.state() is ChannelState.DRAINED
        return True

    def raise_failure(self) -> None:
        core, seen = self._core, self._handle.seen_failures()
        if self._is_drained:
            core.failures.raise_unseen(seen, READ)
            core.failures.raise_failed_closing(seen)
            raise EndOfMessages
        if self._watching is None:
            core.failures.raise_unseen(seen, READ)
            return  # it is not told that nobody is left: another task may write
        if core.socket is not None:
            core.socket.finish_closing()
        core.failures.raise_unseen(seen, READ)
        core.failures.publish_waiting(self._handle, READ)
        core.failures.raise_if_nobody_left(self._handle, READ)

    def on_empty(self) -> None:
        core, seen = self._core, self._handle.seen_failures()
        core.check_fork()
        core.failures.raise_unseen(seen, READ)
        if seen.nobody_left:
            seen.nobody_left = False
            core.failures.raise_if_nobody_left(self._handle, READ)
        if core.backend.state() is ChannelState.DRAINED:
            core.failures.raise_failed_closing(seen)

    def awaited(self) -> str:
        return "no item"

    def fileno(self) -> int:
        return self._core.fileno(self._handle)

    def is_ready(self) -> bool:
        """Whether ``read`` would not have to wait, be it because of others."""
        core = self._core
        if core.forked or core.backend.can_take() or core.backend.state() is ChannelState.DRAINED:
            return True
        if core.socket is not None:
            core.socket.finish_closing()
        seen = self._handle.seen_failures()
        seen.nobody_left = core.failures.is_nobody_left(self._handle, READ)
        return seen.nobody_left or core.failures.has_unseen(seen, READ)
