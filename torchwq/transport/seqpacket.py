"""An AF_UNIX SOCK_SEQPACKET socket as an endpoint: the kernel does what other queues use locks and threads for.

It keeps the boundaries of messages, hands each one to exactly one of the processes that read the same end, wakes one
sleeper for it, and carries file descriptors along. So no lock is shared between processes, and a process that is killed
anywhere leaves nothing to repair: a ``send`` or ``recvmsg`` on such a socket has either happened or not.
"""

from __future__ import annotations

import errno
import fcntl
import socket
import struct
import termios
from collections.abc import Sequence
from typing import Final

from . import descriptors, polling, trailer
from .endpoint import NO_FDS, ReceiveBare, Received, SendBare
from .fork import closed_in_child
from .sockets import (
    ANCILLARY_SIZE,
    CLOEXEC,
    NO_WAIT,
    TRUNCATED,
    check_sendable,
    readable_bytes,
    received_fds,
    scm_rights,
    set_buffer_size,
)
from .timing import SEND_TIMEOUT

#: Below the smallest default buffer of a socket (208 KiB) by enough that several fit.
MAX_MESSAGE: Final = 32 * 1024
RECEIVE_FLAGS: Final = NO_WAIT | CLOEXEC
_BUFFER: Final = 1 << 20


class SeqpacketEndpoint:
    """One end of a seqpacket socket pair; takes over ``fd``."""

    max_message = MAX_MESSAGE
    max_payload = max_message - trailer.SIZE

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(True)
        # Bound once: attribute look-ups are a measurable part of a message's cost.
        self._send = self._socket.send
        self.send_bare: SendBare | None = self._send
        self.receive_bare: ReceiveBare | None = self._socket.recv
        self._recvmsg = self._socket.recvmsg
        closed_in_child(self)

    def try_send(self, data: bytes, fds: Sequence[int] = ()) -> bool:
        try:
            if fds:
                self._socket.sendmsg([data], scm_rights(fds), NO_WAIT)
            else:
                self._send(data, NO_WAIT)
        except OSError as error:
            check_sendable(error, self._socket)
            return False
        return True

    def send_with_timeout(self, data: bytes) -> bool:
        if self.try_send(data):
            return True
        # Not a ``send`` with SO_SNDTIMEO, whose time begins anew with each signal.
        polling.writable(SEND_TIMEOUT, self._socket.fileno())
        return self.try_send(data)

    def try_receive(self) -> Received | None:
        while True:
            try:
                data, ancillary, flags, _ = self._recvmsg(MAX_MESSAGE, ANCILLARY_SIZE, RECEIVE_FLAGS)
            except BlockingIOError:
                return None
            except ConnectionResetError:
                # The other side closed with messages of ours unread. The kernel says so once, on whichever read
                # comes next; what was sent to us before that is still there.
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

    def peek(self) -> bytes | None:
        try:
            return self._socket.recv(MAX_MESSAGE, NO_WAIT | socket.MSG_PEEK)
        except (BlockingIOError, ConnectionResetError):  # which was told now, and is not again: see ``try_receive``
            return None

    def unread_by_peer(self) -> int | None:
        if self._socket.fileno() < 0:
            return 0
        (queued,) = struct.unpack("i", fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, b"\0" * 4))
        return int(queued)

    def stop_receiving(self) -> None:
        self._socket.shutdown(socket.SHUT_RD)

    def stop_sending(self) -> None:
        self._socket.shutdown(socket.SHUT_WR)

    def is_readable(self) -> bool:
        return readable_bytes(self._socket) > 0

    def set_buffer_size(self, nbytes: int) -> None:
        set_buffer_size(self._socket, nbytes)

    def fileno(self) -> int:
        return self._socket.fileno()

    def handover(self) -> list[int]:
        return [self._socket.fileno()]

    def leave_open(self) -> None:
        self._socket.detach()

    def close(self) -> None:
        self._socket.close()

    abandon = close


def pair() -> tuple[SeqpacketEndpoint, SeqpacketEndpoint]:
    a, b = descriptors.socketpair(socket.SOCK_SEQPACKET)
    for sock in (a, b):
        set_buffer_size(sock, _BUFFER)
    return SeqpacketEndpoint(a.detach()), SeqpacketEndpoint(b.detach())
