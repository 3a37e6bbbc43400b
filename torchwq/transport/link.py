"""A control connection between two processes, which ends when one of the two does.

Each handle on a queue holds one to the queue's owner; a process that asks for a queue by its name has one to the
process that it asks. The kernel closes it when the process at the other end dies, however it dies: that makes it a
*liveness link*. Each end belongs to one process. A link copies the descriptors that a message brings, because the
sender of the message closes its own at once.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence

from . import descriptors, kinds
from .connection import Connection
from .endpoint import Received
from .trailer import PICKLE, payload_of


def socket_type() -> socket.SocketKind:
    return socket.SOCK_SEQPACKET if kinds.kind() == "seqpacket" else socket.SOCK_STREAM


class Link:
    """One end of a control connection; takes over ``fd``. Safe to use from several threads."""

    def __init__(self, fd: int) -> None:
        self._connection = Connection(kinds.from_socket(fd), waitable=False)
        self._is_watched = False
        self._on_message: Callable[[bytes, list[int]], None]
        self._on_end: Callable[[], None]

    @property
    def unsent(self) -> int:
        """How many messages wait in the outbox."""
        return len(self._connection.outbox)

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send one message, now or later, without blocking. Raises BrokenPipeError if the peer is gone."""
        self._connection.send(_WithDescriptors(data, descriptors.dup_all(fds)) if fds else data)

    def receive(self) -> Received | None:
        """Take one message; None if there is none now. Raises EOFError when the peer is gone."""
        return _without_trailer(self._connection.take())

    def wait(self, seconds: float) -> Received | None:
        """Take one message, waiting for it at most ``seconds``. Only for a link that is not watched."""
        return _without_trailer(self._connection.receive(seconds))

    def watch(self, on_message: Callable[[bytes, list[int]], None], on_end: Callable[[], None]) -> None:
        """Let the reactor call ``on_message`` for each message, and ``on_end`` once when the peer is gone.

        A second call, also from within ``on_message``, puts new callbacks in place of the old ones.
        """
        self._on_message, self._on_end = on_message, on_end
        self._is_watched = True
        self._connection.watch(self._ready)

    def _ready(self) -> None:
        while self._is_watched:
            try:
                received = self.receive()
            except EOFError:
                self._is_watched = False
                self._connection.watch(None)
                self._on_end()
                return
            if received is None:
                return
            self._on_message(*received)

    def fileno(self) -> int:
        return self._connection.fileno()

    def wait_sent(self) -> None:
        """See ``Outbox.wait_empty``."""
        self._connection.outbox.wait_empty()

    def close_when_sent(self, then: Callable[[], None]) -> None:
        """Refuse every later ``send``; close and call ``then`` when no message waits."""

        def close() -> None:
            self.close()
            then()

        self._connection.close_when_sent(close)

    def close(self) -> None:
        """Close at once. The peer still gets the messages in the socket; those in the outbox are dropped."""
        self._is_watched = False
        self._connection.close()


class _WithDescriptors:
    """A message that brings descriptors: copies, which are closed when it is sent or dropped."""

    kind = PICKLE

    def __init__(self, data: bytes, fds: list[int]) -> None:
        self.data = data
        self.fds = fds
        descriptors.close_with(self, *fds)

    def on_send(self) -> None: ...
    def on_send_failed(self) -> None: ...


def _without_trailer(received: Received | None) -> Received | None:
    """A message as it was given to ``send``: only one with descriptors has a trailer."""
    if received is None or not received[1]:
        return received
    return payload_of(received[0]), received[1]


def pair() -> tuple[Link, int]:
    """Two connected ends: a link, and the descriptor of the other end, to be sent to another process."""
    a, b = descriptors.socketpair(socket_type())
    return Link(a.detach()), b.detach()
