"""What all handles on a channel in one process share: the backend that carries items, and what those who wait are told.

A channel begins with a ``LocalChannel``: its items wait in a mailbox, and its tensors stay where they are. When a
handle is first sent to another process, a ``SocketChannel`` is made, and the items that wait go there. From then on
every thread of this process uses the socket, too, so that there is one order.

A reader waits as ``reading`` says, a writer of a channel with a capacity for room, as ``send_if_room`` says here. Both
are told what ``failure_detector`` says. Once one has waited for a moment, whatever changes there wakes it:
``peers.monitor`` for the other processes; the thread that changes something for this one. Only these changes are
polled, each POLL_INTERVAL: a thread of the user's ends, or a handle is dropped, so that nobody may be left; a worker
dies with a handle in a message; a receiver dies with a backlog message; and whatever the monitor has no event for.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any, Final

from ..errors import QueueClosed, ResourceError
from ..memory.anonymous import Descriptor
from ..peers.monitor import POLL_INTERVAL, PeerMonitor
from ..pipe.room import Room
from ..transport import cleanup, reactor
from ..transport.alarm import Alarm
from ..transport.capabilities import SAME_PROCESS
from ..transport.descriptors import close_fds
from ..transport.endpoint import Received
from ..transport.fork import closed_in_child, reset_in_child
from ..transport.mailbox import Mailbox
from ..transport.readiness import Readiness
from ..workers import threads
from .failure_detector import READ, WRITE, FailureDetector, Handle
from .local import LocalChannel
from .socket import SocketChannel, open_socket_channels
from .state import ChannelBackend, ChannelState

MADE_BEFORE_FORK: Final = (
    "this channel was made before a fork and belongs to the parent process: pass it to workers started by torchwq"
)


class Core:
    """One process's part of a channel. See :func:`open_`."""

    def __init__(self, name: bytes, capacity: int | None, socket: SocketChannel | None = None) -> None:
        self.name = name
        self.capacity = capacity
        self.socket: SocketChannel | None = None
        self.local = LocalChannel(capacity)
        self.backend: ChannelBackend = self.local
        self.forked = False
        #: What is to be released when this object is gone.
        self._socket_channels: list[tuple[SocketChannel, PeerMonitor]] = []
        self.monitor: PeerMonitor | None = None
        #: How often something may have changed that a reader is to be told of.
        self.changes = 0
        self._is_update_scheduled = False
        self.failures = FailureDetector(self)
        self._alarm = Alarm()
        self._readiness = Readiness()
        # The mailbox only weakly: this channel may be in it.
        self._finalizer = weakref.finalize(
            self, _close_later, self._socket_channels, weakref.ref(self.local.pipe.box), self._alarm, self._readiness
        )
        self._finalizer.atexit = False
        if socket is not None:
            self.local.pipe.carry(socket)
            self._use(socket)
        closed_in_child(self)
        _cores[name] = self

    def _use(self, socket: SocketChannel) -> None:
        if self.local.room is not None and socket.room is not None:
            self.local.room.share(socket.room)
        monitor = self.monitor = PeerMonitor(socket.table, _weakly(self._peers_changed))
        self._socket_channels.append((socket, monitor))
        self.socket = self.backend = socket
        if self._readiness.is_watched:
            monitor.open()

    # Writing and waiting

    def send_if_room(
        self, backend: ChannelBackend, payload: Any, handle: Handle, deadline: float | None = None
    ) -> bool:
        """See ``ChannelBackend.send``, in a channel with a capacity.

        ``payload`` was encoded for ``backend``. If there is no room, this thread waits for it with ``handle``. Raises
        queue.Full after ``deadline`` (time.monotonic).
        """
        room = self.local.room
        assert room is not None
        send = functools.partial(backend.send, payload)
        found = room.try_write(send)
        return self._wait_for_room(room, send, handle, deadline) if found is None else found

    def _wait_for_room(self, room: Room, send: Callable[[], bool], handle: Handle, deadline: float | None) -> bool:
        watched: list[PeerMonitor] = []
        with self.failures.waiting(handle, WRITE), contextlib.ExitStack() as watching:

            def look() -> float:
                monitor = self.monitor
                if monitor is not None and monitor not in watched:
                    watched.append(monitor)
                    watching.enter_context(monitor.watching())
                self.failures.raise_unseen(handle.seen_failures(), WRITE)
                self.failures.publish_waiting(handle, WRITE)
                self.failures.raise_if_nobody_left(handle, WRITE)
                return self.failures.seconds_until_sure(POLL_INTERVAL)

            return room.write(send, look, deadline)

    def wake_all(self) -> None:
        """Let every thread that waits at this core look at the other handles."""
        self.changes += 1
        self.local.pipe.wake_all()
        if self.socket is not None:
            self.socket.wake_all()
        if self.local.room is not None:
            self.local.room.wake_all()

    def _peers_changed(self) -> None:
        """The table of peers has changed. Called by the reactor."""
        self.wake_all()
        self._update_readiness()

    # Handles

    def handle_descriptors(self) -> list[Descriptor]:
        """Descriptors for another process. Raises ResourceError; or MarshalError for an item that cannot go there."""
        self.open_to_processes()
        assert self.socket is not None
        return self.socket.handle_descriptors()

    def open_to_processes(self) -> None:
        """Make a socket channel, and move the items there.

        Raises as ``handle_descriptors``, and changes nothing then.
        """
        self.check_fork()
        with self.local.pipe.lock:
            if self.socket is not None:
                return
            try:
                socket = self.local.move_to(self._open_socket)
            except BaseException:
                self.socket = None
                raise
            self._use(socket)
            self._watch()

    def _open_socket(self) -> SocketChannel:
        # It is known before the items move: one may have this channel in it.
        self.socket = SocketChannel(self.name, capacity=self.capacity)
        return self.socket

    def leave(self, handle: Handle, worker: threads.ThreadWorker, failed: bool) -> None:
        """The thread worker that had ``handle`` has ended."""
        if self.failures.remove_handle(handle, worker, failed):
            self.update_readiness_soon()
        self.wake_all()

    def check_fork(self) -> None:
        if self.forked:
            raise QueueClosed(MADE_BEFORE_FORK)

    def close(self, *, failed: bool = False) -> None:
        self.backend.close(failed=failed)
        if self.backend.peer.same_process:
            self._alarm.set()
        if self.local.room is not None:
            self.local.room.wake_all()

    # Readiness

    def fileno(self, handle: Handle) -> int:
        """Readable when ``read`` with ``handle`` would not have to wait."""
        self.check_fork()
        if not self._readiness.is_watched:
            self._watch()
            self._readiness.fileno()
            if self.monitor is not None:
                self.monitor.open()
        if not handle.is_watched:
            handle.is_watched = True
            self.update_readiness_soon()
        return self._readiness.fileno()

    def _watch(self) -> None:
        with self.local.pipe.lock:  # items may be moving: who looks first must not set last
            self._readiness.set(*self.local.pipe.filenos(), self._alarm.fileno())

    def update_readiness_soon(self) -> None:
        if self._readiness.is_watched:
            reactor.get().call_later(0, _weakly(self._update_readiness))

    def _update_readiness(self) -> None:
        """Make the descriptor readable while there is a failure to tell, or the end.

        Called by the reactor alone, so that no older look clears what a newer one has set.
        """
        if self.forked or not self._readiness.is_watched:
            return
        handles = self.failures.handles.all()
        if self.backend.state() is ChannelState.DRAINED or any(map(self._has_unseen_failure, handles)):
            self._alarm.set()
        else:
            self._alarm.clear()
        if self.monitor is not None and not self.monitor.covers_all_peers and not self._is_update_scheduled:
            self._is_update_scheduled = True
            reactor.get().call_later(POLL_INTERVAL, _weakly(self._update_readiness_again))

    def _update_readiness_again(self) -> None:
        self._is_update_scheduled = False
        self._update_readiness()

    def _has_unseen_failure(self, handle: Handle) -> bool:
        """Whether no thread that reads with ``handle``, if it is watched, was told of some failure.

        A handle that is not watched may never be read, and its failures would keep those awake who watch another one.
        That nobody is left is no such failure: only a thread that waits can know it.
        """
        return handle.is_watched and all(self.failures.has_unseen(seen, READ) for seen in handle.all_seen_failures())

    def abandon(self) -> None:
        self._finalizer.detach()
        self.forked = True
        self.backend = _ForkedChannel()


def _close_later(
    sockets: list[tuple[SocketChannel, PeerMonitor]],
    find_mailbox: Callable[[], Mailbox[Received] | None],
    alarm: Alarm,
    readiness: Readiness,
) -> None:
    """A core is garbage, which is collected at any moment, in any thread, with any lock held."""
    for socket, monitor in sockets:
        cleanup.call_soon(monitor.close)
        if not socket.left:
            cleanup.call_soon(socket.release)
    for each in (find_mailbox(), alarm, readiness):
        if each is not None:
            cleanup.call_soon(each.close)


class _ForkedChannel:
    """The backend in the child of a fork: it refuses everything."""

    peer = SAME_PROCESS
    max_payload = 0
    is_closed = True
    was_failed = False

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise QueueClosed(MADE_BEFORE_FORK)

    def try_write(self, obj: Any) -> None:
        """Nothing was sent: ``Channel`` checks for the fork next."""

    send = take = try_read = can_take = wait = state = num_items = close = counts = _refuse


def _weakly(method: Callable[[], None]) -> Callable[[], None]:
    """``method``, which does not keep its object alive, and is not called when the object is gone."""
    find = weakref.WeakMethod(method)

    def call() -> None:
        found = find()
        if found is not None:
            found()

    return call


_cores: weakref.WeakValueDictionary[bytes, Core] = weakref.WeakValueDictionary()
_guard = threading.RLock()


@reset_in_child
def _reset() -> None:
    global _cores, _guard
    _cores, _guard = weakref.WeakValueDictionary(), threading.RLock()


def open_(name: bytes, capacity: int | None, fds: list[int]) -> Core:
    """This process's core of the channel that has these descriptors, which it takes over. Raises ResourceError."""
    with _guard:
        core = _cores.get(name)
        socket = None if core is None else core.socket
        if socket is None:
            # All handles may have been dropped, and a backlog be left, which must be sent first.
            socket = next((each for each in list(open_socket_channels) if each.name == name and each.retain()), None)
        if socket is None or socket.left:
            return _open_with(name, capacity, SocketChannel(name, fds, capacity))
        try:
            if core is None:
                core = _open_with(name, capacity, socket)
        finally:
            close_fds(fds)
    socket.table.count_handle_received()
    return core


def _open_with(name: bytes, capacity: int | None, socket: SocketChannel) -> Core:
    try:
        return Core(name, capacity, socket)
    except ResourceError:  # no core is there to release it
        socket.release()
        raise


def leave_all(failed: bool) -> None:
    """Give up every socket channel of this process. Called at exit."""
    for socket in list(open_socket_channels):
        socket.leave(failed=failed, at_exit=True)
