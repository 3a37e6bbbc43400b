"""A control connection between two processes: small messages, and the news that the other one is gone.

Each handle on a queue holds one to the queue's owner, each worker one to its owner, each owner one to its fork
server. The kernel closes it when the process at the other end dies, however it dies: that is what makes it a
*liveness link*. Both ends belong to one process each, so no lock is needed beyond this process's own.
"""

from __future__ import annotations

import select
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence

from . import descriptors, reactor
from .descriptors import close_fds
from .endpoint import Received
from .kinds import kind
from .process import closed_in_child
from .sockets import (
    ANCILLARY_SIZE,
    CLOEXEC,
    NO_WAIT,
    NotSent,
    check_sendable,
    is_broken,
    received_fds,
    rights,
)
from .stream import receive_frame, send_frame

_SIZE = 64 * 1024


def socket_type() -> socket.SocketKind:
    return socket.SOCK_SEQPACKET if kind() == "seqpacket" else socket.SOCK_STREAM


class Link:
    """One end of a control connection; takes over ``fd``. Safe to use from several threads."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(True)
        self._packets = self._socket.type == socket.SOCK_SEQPACKET
        # Reentrant: a finalizer or a signal handler may send in the middle of sending.
        self._lock = threading.RLock()
        self._unsent: deque[tuple[bytes, list[int]]] = deque()
        self._watched = False
        self._on_message: Callable[[bytes, list[int]], None]
        self._on_end: Callable[[], None]
        closed_in_child(self)

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send without blocking; what does not fit now is sent later. Raises BrokenPipeError if the peer is gone."""
        with self._lock:
            if self._unsent or not self._try_send(data, fds):
                self._unsent.append((data, descriptors.dup_all(fds)))
                reactor.get().set_writer(self.fileno(), self._flush)

    def _try_send(self, data: bytes, fds: Sequence[int]) -> bool:
        try:
            if self._packets:
                self._socket.sendmsg([data], rights(fds) if fds else [], NO_WAIT)
                return True
            return send_frame(self._socket, data, fds)
        except OSError as error:
            check_sendable(error, self._socket)
            return False

    def _flush(self) -> None:
        with self._lock:
            try:
                while self._unsent:
                    data, fds = self._unsent[0]
                    try:
                        if not self._try_send(data, fds):
                            return
                    except NotSent as error:  # nobody is left who could be told
                        sys.excepthook(type(error), error, error.__traceback__)
                    if not self._unsent:  # a finalizer that came in between has closed it
                        return
                    self._unsent.popleft()
                    close_fds(fds)
            except BrokenPipeError:
                self._drop()
            if self.fileno() >= 0:
                reactor.get().set_writer(self.fileno(), None)

    def ping(self, data: bytes) -> None:
        """Send if there is room; whoever is behind with reading pings needs no more of them."""
        with self._lock:
            try:
                self._try_send(data, ())
            except BrokenPipeError:
                pass

    def receive(self) -> Received | None:
        """Take one message; None if there is none now. Raises EOFError once the other end is gone."""
        try:
            if not self._packets:
                return receive_frame(self._socket)
            data, ancillary, flags, _ = self._socket.recvmsg(_SIZE, ANCILLARY_SIZE, NO_WAIT | CLOEXEC)
        except BlockingIOError:
            return None
        except OSError as error:
            if is_broken(error, self._socket):
                raise EOFError from None
            raise
        if not data:
            raise EOFError
        return data, received_fds(ancillary, flags)

    def wait(self, seconds: float) -> Received | None:
        """Take one message, waiting for it at most so long. Only for a link that is not watched."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        poll.poll(seconds * 1000)
        return self.receive()

    def watch(self, on_message: Callable[[bytes, list[int]], None], on_end: Callable[[], None]) -> None:
        """Let the reactor hand over each message, and call ``on_end`` once when the other end is gone.

        A second call, also from within ``on_message``, puts new callbacks in place of the old ones.
        """
        self._on_message, self._on_end = on_message, on_end
        self._watched = True
        reactor.get().set_reader(self.fileno(), self._ready)

    def _ready(self) -> None:
        while self._watched:
            try:
                received = self.receive()
            except EOFError:
                self._unwatch()
                self._on_end()
                return
            if received is None:
                return
            self._on_message(*received)

    def _unwatch(self) -> None:
        self._watched = False
        if self.fileno() >= 0:
            reactor.get().remove(self.fileno())

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        with self._lock:
            if self.fileno() >= 0:
                if self._watched or self._unsent:
                    self._unwatch()
                self._socket.close()
            self._drop()

    def _drop(self) -> None:
        while self._unsent:
            close_fds(self._unsent.popleft()[1])

    def abandon(self) -> None:
        self._watched = False
        self._drop()
        self._socket.close()


def pair() -> tuple[Link, int]:
    """Two connected ends: one to use here, and the descriptor of the other, to be sent elsewhere."""
    a, b = descriptors.socketpair(socket_type())
    return Link(a.detach()), b.detach()
