"""An AF_UNIX SOCK_SEQPACKET socket as an endpoint: the kernel does what other queues do with locks and threads.

It keeps the boundaries of messages, hands each one to exactly one of the processes that read the same end, wakes one
sleeper for it, and carries file descriptors along. So processes share no lock, and a process that is killed anywhere
leaves nothing to repair: its ``send`` or ``recvmsg`` has either happened or not.

Source: unix(7).
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from .. import _native
from . import descriptors, polling, trailer
from .endpoint import NO_FDS, ReceiveBare, Received, SendBare
from .sockets import (
    ANCILLARY_SIZE,
    CLOEXEC,
    NO_WAIT,
    TRUNCATED,
    SocketEndpoint,
    check_sendable,
    checked_fds,
    received_fds,
    scm_rights,
    set_buffer_size,
)
from .timing import SEND_TIMEOUT

#: Small enough that several messages fit into the smallest default buffer of a socket (208 KiB).
MAX_MESSAGE: Final = 32 * 1024
RECEIVE_FLAGS: Final = NO_WAIT | CLOEXEC
_BUFFER: Final = 1 << 20


class PythonSeqpacketCalls:
    """The two system calls of the hot path."""

    #: The descriptor; -1 once the endpoint is closed.
    fd: int
    _socket: socket.socket
    #: Bound once: attribute look-ups are a measurable part of a message's cost.
    _send: SendBare
    _recvmsg: Any

    def try_send(self, data: bytes, fds: Sequence[int] = ()) -> bool:
        try:
            if fds:
                self._socket.sendmsg([data], scm_rights(fds), NO_WAIT)
            else:
                self._send(data, NO_WAIT)
        except OSError as error:
            check_sendable(error, self._socket.fileno() < 0)
            return False
        return True

    def try_receive(self) -> Received | None:
        while True:
            try:
                data, ancillary, flags, _ = self._recvmsg(MAX_MESSAGE, ANCILLARY_SIZE, RECEIVE_FLAGS)
            except BlockingIOError:
                return None
            except ConnectionResetError:
                # The peer closed with messages of ours unread. The kernel says so once, on the read that comes next;
                # the messages that the peer had sent before are still there.
                continue
            except OSError as error:
                if error.errno == errno.EBADF:  # closed by another thread of this process
                    raise EOFError from None
                raise
            if ancillary or flags & TRUNCATED:
                return data, received_fds(ancillary, flags)
            if data:
                return data, NO_FDS
            raise EOFError


SeqpacketCalls = PythonSeqpacketCalls
if not TYPE_CHECKING and _native.core is not None:
    SeqpacketCalls = _native.core.SeqpacketCalls


class SeqpacketEndpoint(SeqpacketCalls, SocketEndpoint):
    """One end of a seqpacket socket pair; takes over ``fd``."""

    max_message = MAX_MESSAGE
    max_payload = max_message - trailer.SIZE

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self.fd = fd
        self._send, self._recvmsg = self._socket.send, self._socket.recvmsg
        self.send_bare: SendBare | None = self._send
        self.receive_bare: ReceiveBare | None = self._socket.recv

    def send_with_timeout(self, data: bytes) -> bool:
        if self.try_send(data):
            return True
        # Not a ``send`` with SO_SNDTIMEO, whose time begins anew with each signal.
        polling.writable(SEND_TIMEOUT, self._socket.fileno())
        return self.try_send(data)

    def peek(self) -> bytes | None:
        try:
            return self._socket.recv(MAX_MESSAGE, NO_WAIT | socket.MSG_PEEK)
        except (BlockingIOError, ConnectionResetError):  # the kernel reports the reset once: see ``try_receive``
            return None

    def leave_open(self) -> None:
        self.fd = -1
        super().leave_open()

    def close(self) -> None:
        self.fd = -1  # first: from then on the number may be another descriptor's
        super().close()

    abandon = close


def pair() -> tuple[SeqpacketEndpoint, SeqpacketEndpoint]:
    a, b = descriptors.socketpair(socket.SOCK_SEQPACKET)
    for sock in (a, b):
        set_buffer_size(sock, _BUFFER)
    return SeqpacketEndpoint(a.detach()), SeqpacketEndpoint(b.detach())


def _on_error(number: int, closed: bool) -> None:
    """A message was not sent: return if the socket is full. Raises BrokenPipeError or NotSent."""
    check_sendable(OSError(number, os.strerror(number)), closed)


if _native.core is not None:
    _native.core.set_sockets(NO_FDS, _on_error, checked_fds)
