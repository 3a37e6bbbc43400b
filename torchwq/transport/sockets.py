"""The socket calls that both kinds of endpoint and the control connections share."""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import resource
import socket
import struct
import termios
from collections.abc import Sequence
from typing import Any, Final

from ..errors import ResourceError
from . import descriptors
from .descriptors import close_fds
from .endpoint import MAX_FDS
from .fork import closed_in_child

# Plain integers: the socket module's flags are enums, whose arithmetic costs as much as a system call.
NO_WAIT: Final = int(socket.MSG_DONTWAIT | getattr(socket, "MSG_NOSIGNAL", 0))
CLOEXEC: Final = int(getattr(socket, "MSG_CMSG_CLOEXEC", 0))
TRUNCATED: Final = int(socket.MSG_CTRUNC)
ANCILLARY_SIZE: Final = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)

#: The peer is gone for good.
BROKEN: Final = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ECONNREFUSED, errno.ENOTCONN, errno.ESHUTDOWN})
#: The kernel is short of something for the moment: buffers, or descriptors in flight.
BUSY: Final = frozenset({errno.EAGAIN, errno.EWOULDBLOCK, errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS})


def set_buffer_size(sock: socket.socket, nbytes: int) -> None:
    """Ask for buffers of ``nbytes`` bytes; the kernel gives what ``net.core.wmem_max`` allows."""
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, option, nbytes)


class NotSent(ResourceError):
    """A message could not be sent, though the peer is there. The sender keeps it; later ones may be sent."""


def is_broken(error: OSError, is_closed: bool) -> bool:
    """Whether nothing can be sent or received any more: the peer is gone, or another thread has closed this end.

    EBADF alone does not tell: it may mean a descriptor in the message.
    """
    return error.errno in BROKEN or (error.errno == errno.EBADF and is_closed)


def check_sendable(error: OSError, is_closed: bool) -> None:
    """Return if a message was not sent because the socket is full; else raise.

    Args:
        is_closed: whether this end is closed.

    Raises:
        BrokenPipeError: nobody can receive it.
        NotSent: the message or the system does not allow it.
        OSError: ``error`` itself, if a signal handler has raised it, perhaps after the message had left.
    """
    if is_broken(error, is_closed):
        raise BrokenPipeError(error.errno, "the other side of the queue is closed") from None
    if error.errno in BUSY:
        return
    if not _is_ours(error):
        raise error
    what = f"the message could not be sent ({os.strerror(error.errno or 0)}); whoever is to get it is still there"
    raise NotSent(error.errno or 0, what) from error


def _is_ours(error: OSError) -> bool:
    """Whether a system call of this package has raised ``error``, and not a signal handler in the middle of one."""
    traceback = error.__traceback__
    while traceback is not None:
        name = traceback.tb_frame.f_globals.get("__name__", "")
        if name != "contextlib" and name.rpartition(".")[0] != __package__:
            return False
        traceback = traceback.tb_next
    return True


#: Ancillary data for one descriptor: most messages with descriptors have one.
_rights_of_one: dict[int, list[tuple[int, int, Any]]] = {}
_INT: Final = struct.Struct("@i")


def scm_rights(fds: Sequence[int]) -> list[tuple[int, int, Any]]:
    """Ancillary data that carries ``fds``."""
    if len(fds) > 1:
        return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
    found = _rights_of_one.get(fds[0])
    if found is None:
        found = _rights_of_one[fds[0]] = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, _INT.pack(fds[0]))]
    return found


def received_fds(ancillary: list[tuple[int, int, bytes]], flags: int) -> list[int]:
    """The descriptors in a message's ancillary data.

    Raises ResourceError if the kernel had to drop some of them; the others are closed then.
    """
    if len(ancillary) == 1 and not flags & TRUNCATED and CLOEXEC:
        level, what, data = ancillary[0]
        if len(data) == _INT.size and what == socket.SCM_RIGHTS and level == socket.SOL_SOCKET:
            fd: int = _INT.unpack(data)[0]
            return [fd] if fd > 2 else [descriptors.above_stdio(fd)]
    fds = array.array("i")
    for level, what, data in ancillary:
        if level == socket.SOL_SOCKET and what == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return checked_fds(fds, bool(flags & TRUNCATED))


def checked_fds(fds: Sequence[int], truncated: bool) -> list[int]:
    """The descriptors that came with a message, each above those of stdio.

    Raises ResourceError if it was ``truncated``: the kernel had to drop some. The others are closed then.
    """
    if truncated:
        close_fds(fds)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        raise ResourceError(
            errno.EMFILE,
            f"a message was lost: its file descriptors do not fit into this process, which may have {soft} open "
            f"(RLIMIT_NOFILE; hard limit {hard}). Raise it with `ulimit -n`, or keep fewer shared tensors at a time",
        )
    if not CLOEXEC:
        for fd in fds:
            os.set_inheritable(fd, False)
    return descriptors.all_above_stdio(fds)


def readable_bytes(sock: socket.socket) -> int:
    """How many bytes can be received; 0 for a closed socket."""
    fd = sock.fileno()
    if fd < 0:
        return 0
    try:
        (nbytes,) = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"\0" * 4))
    except OSError as error:
        return 0 if error.errno == errno.EBADF else 1
    return int(nbytes)


class SocketEndpoint:
    """The methods of :class:`~torchwq.transport.endpoint.Endpoint` that do not depend on the kind of socket."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(True)
        closed_in_child(self)

    def unread_by_peer(self) -> int | None:
        if self._socket.fileno() < 0:
            return 0
        try:
            (queued,) = struct.unpack("i", fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, b"\0" * 4))
        except OSError:
            return None
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


def peer_uid(sock: socket.socket) -> int:
    """User id of the process at the other end of a connected AF_UNIX socket, by the kernel: see unix(7)."""
    if hasattr(socket, "SO_PEERCRED"):
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return int(struct.unpack("3i", credentials)[1])
    # struct xucred of the BSDs: version, uid, ...
    credentials = sock.getsockopt(0, 1, 76)
    return int(struct.unpack_from("=II", credentials)[1])
