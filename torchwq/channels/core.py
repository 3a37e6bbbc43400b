"""What all handles on a channel in one process share: the way that its items take, and what is told to those who wait.

A channel begins *here*: its items wait in a mailbox, and its tensors stay where they are. When a handle is first sent
to another process, a line is made, and what waits here goes on it. From then on every thread of this process uses the
line too, so that there is one order, and one way.

How it is read says ``reading``; whom a reader waits for is told by ``vigil``. A reader that has waited for a moment is
woken by whatever there may be to tell: what other processes do is told by ``peers.monitor``, what happens in this one
by whoever does it. Only these are found by looking every ``POLL_INTERVAL`` seconds: a thread of the user's that ends,
or a handle that is dropped, which may leave nobody to wait for; a worker that dies with a handle in a message; a bundle
that its receiver took into its death; and what the monitor's events do not cover.
"""

from __future__ import annotations

import secrets
import threading
import weakref
from collections.abc import Callable
from typing import Any, Final

from ..errors import QueueClosed, ResourceError
from ..peers.monitor import POLL_INTERVAL, PeerMonitor
from ..transport import cleanup, reactor
from ..transport.alarm import Alarm
from ..transport.capabilities import SAME_PROCESS
from ..transport.descriptors import close_fds
from ..transport.endpoint import Received
from ..transport.fork import closed_in_child, reset_in_child
from ..transport.mailbox import Mailbox
from ..transport.readiness import Readiness
from .here import Here
from .line import Line, open_lines
from .state import ChannelState, Way
from .vigil import READS, WRITES, Vigil

FORKED: Final = (
    "this channel was made before a fork and belongs to the parent process: pass it to workers started by torchwq"
)


class Core:
    """A process's part of a channel."""

    def __init__(self, name: bytes, capacity: int | None, line: Line | None = None) -> None:
        self.name = name
        self.capacity = capacity
        self.line: Line | None = None
        self.here = Here(capacity)
        self.here.on_wait_for_room = _weakly(self._wait_for_room)
        self.way: Way = self.here
        self.forked = False
        #: Those that are to be given up when this object is gone.
        self._lines: list[tuple[Line, PeerMonitor]] = []
        self.monitor: PeerMonitor | None = None
        #: How often there may have been something to tell.
        self.changes = 0
        self._will_look_on = False
        self.vigil = Vigil(self)
        self._trouble = Alarm()
        self._readiness = Readiness()
        # The box only weakly: this channel may be in it.
        self._finalizer = weakref.finalize(
            self, _end_later, self._lines, weakref.ref(self.here.box), self._trouble, self._readiness
        )
        self._finalizer.atexit = False
        if line is not None:
            self._use(line)
        closed_in_child(self)
        _cores[name] = self

    def _use(self, line: Line) -> None:
        line.on_wait_for_room = _weakly(self._wait_for_room)
        monitor = self.monitor = PeerMonitor(line.table, _weakly(self._peers_changed))
        self._lines.append((line, monitor))
        self.line = self.way = line
        if self._readiness.is_watched:
            monitor.open()

    # Waiting

    def _wait_for_room(self) -> None:
        writer = self.vigil.writer()
        self.vigil.raise_news(writer.seen(), WRITES)
        self.vigil.show_waiting(writer, WRITES)
        self.vigil.raise_if_alone(writer, WRITES)

    def wake_all(self) -> None:
        """Have everybody who waits here look at the others."""
        self.changes += 1
        self.here.box.wake_all()
        if self.line is not None:
            self.line.wake_all()

    def _peers_changed(self) -> None:
        """Something has happened in the table of peers. Called by the reactor."""
        self.wake_all()
        self._look_on()

    # Handles

    def handle_descriptors(self) -> list[Any]:
        """Descriptors for another process. Raises ResourceError; or MarshalError, for an item that cannot go there."""
        self.open_to_processes()
        assert self.line is not None
        return self.line.handle_descriptors()

    def open_to_processes(self) -> None:
        """Have a line, and let what waits here go on it. Raises as ``handle_descriptors``, and changes nothing then."""
        self.check_fork()
        with self.here.lock:
            if self.line is not None:
                return
            line = self.line = Line(self.name, capacity=self.capacity)  # first: an item may have this channel in it
            try:
                self.here.empty_into(line)
            except BaseException:
                self.line = None
                line.leave()
                raise
            self._use(line)
            self._watch()

    def leave(self, handle: Any, worker: Any, failed: bool) -> None:
        """A worker that is a thread has ended, and its handle with it."""
        if self.vigil.dismiss(handle, worker, failed):
            self._look_soon()
        self.wake_all()

    def check_fork(self) -> None:
        if self.forked:
            raise QueueClosed(FORKED)

    def close(self, *, failed: bool = False) -> None:
        self.way.close(failed=failed)
        if self.way.peer.same_process:
            self._trouble.set()

    # Readiness

    def fileno(self, handle: Any) -> int:
        """Readable when ``read`` with ``handle`` would not have to wait."""
        self.check_fork()
        if not self._readiness.is_watched:
            self._watch()
            self._readiness.fileno()
            if self.monitor is not None:
                self.monitor.open()
        if not handle.is_watched:
            handle.is_watched = True
            self._look_soon()
        return self._readiness.fileno()

    def _watch(self) -> None:
        if self.line is None:
            self._readiness.set(self.here.box.bell().fileno(), self._trouble.fileno())
        else:
            self._readiness.set(self.line.outlet(), self._trouble.fileno())

    def _look_soon(self) -> None:
        if self._readiness.is_watched:
            reactor.get().call_later(0, _weakly(self._look_on))

    def _look_on(self) -> None:
        """Let deaths show in the descriptor. Called by the reactor alone: who looked first must not clear last."""
        if self.forked or not self._readiness.is_watched:
            return
        if self.way.state() is ChannelState.DRAINED or any(map(self._has_to_tell, self.vigil.handles.all())):
            self._trouble.set()
        else:
            self._trouble.clear()
        if self.monitor is not None and not self.monitor.covers_all_peers and not self._will_look_on:
            self._will_look_on = True
            reactor.get().call_later(POLL_INTERVAL, _weakly(self._look_on_again))

    def _look_on_again(self) -> None:
        self._will_look_on = False
        self._look_on()

    def news_told(self) -> None:
        """Somebody has been told of something: what is watched may not be ready any more."""
        self._look_soon()

    def _has_to_tell(self, handle: Any) -> bool:
        """Whether there is something that nobody has been told who reads with this handle, if it is watched.

        Not whether nobody is left: only one who waits knows that, for here it is not known who does. One that is not
        watched may never be read: what it is not told would keep those awake who watch another one.
        """
        return handle.is_watched and all(self.vigil.has_news(seen, READS) for seen in handle.all_seen())

    def abandon(self) -> None:
        self._finalizer.detach()
        self.forked = True
        self.way = _Forked()


def _end_later(
    lines: list[tuple[Line, PeerMonitor]],
    find_box: Callable[[], Mailbox[Received] | None],
    trouble: Alarm,
    readiness: Readiness,
) -> None:
    """A part is garbage, which is collected at any moment, in any thread, with any lock held."""
    for line, monitor in lines:
        cleanup.later(monitor.close)
        if not line.left:
            cleanup.later(line.retire)
    for each in (find_box(), trouble, readiness):
        if each is not None:
            cleanup.later(each.close)


class _Forked:
    """The way of a channel in the child of a fork: there is none."""

    peer = SAME_PROCESS
    max_payload = 0
    is_closed = True
    was_failed = False

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise QueueClosed(FORKED)

    def put(self, obj: Any) -> None:
        """``check_fork`` says it."""

    send = take = read = can_take = sleep = state = num_items = close = counts = _refuse


def _weakly(method: Callable[[], None]) -> Callable[[], None]:
    bound = weakref.WeakMethod(method)
    return lambda: _call(bound)


def _call(method: Callable[[], Callable[[], None] | None]) -> None:
    bound = method()
    if bound is not None:
        bound()


_cores: weakref.WeakValueDictionary[bytes, Core] = weakref.WeakValueDictionary()
_guard = threading.RLock()


@reset_in_child
def _forget() -> None:
    global _cores, _guard
    _cores, _guard = weakref.WeakValueDictionary(), threading.RLock()


def new(capacity: int | None) -> Core:
    """The part of this process in a new channel."""
    return Core(secrets.token_bytes(16), capacity)


def open_(name: bytes, capacity: int | None, fds: list[int]) -> Core:
    """This process's part of the channel that these descriptors are of. Takes the descriptors over."""
    with _guard:
        core = _cores.get(name)
        line = None if core is None else core.line
        if line is None:
            # One that all handles have dropped may still have something to send, which must come first.
            line = next((each for each in list(open_lines) if each.name == name and each.revive()), None)
        if line is None or line.left:
            return _with_line(name, capacity, Line(name, fds, capacity))
        try:
            if core is None:
                core = _with_line(name, capacity, line)
        finally:
            close_fds(fds)
    line.table.count_handle_received()
    return core


def _with_line(name: bytes, capacity: int | None, line: Line) -> Core:
    try:
        return Core(name, capacity, line)
    except ResourceError:  # before the part was told to give it up
        line.retire()
        raise


def leave_all(failed: bool) -> None:
    """At exit."""
    for line in list(open_lines):
        line.leave(failed=failed, at_exit=True)
