"""Carries more descriptors than one message can: they wait in the buffer of a socket that travels in their place."""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence

from ..errors import ResourceError
from . import descriptors
from .descriptors import closed_on_error
from .endpoint import MAX_FDS
from .sockets import ANCILLARY_SIZE, CLOEXEC, NO_WAIT, check_sendable, received_fds, scm_rights, set_buffer_size

_PER_MESSAGE = MAX_FDS - 3
#: A kind of which the kernel limits the bytes that wait, and not the number of messages, as it does of datagrams.
_TYPE = getattr(socket, "SOCK_SEQPACKET", socket.SOCK_STREAM) if sys.platform == "linux" else socket.SOCK_DGRAM


def pack(fds: Sequence[int]) -> socket.socket:
    """A socket from which ``unpack`` takes copies of ``fds``. Raises ResourceError if there are too many."""
    filled, carrier = descriptors.socketpair(_TYPE)
    set_buffer_size(filled, 1 << 20)
    with filled:
        for start in range(0, len(fds), _PER_MESSAGE):
            part = fds[start : start + _PER_MESSAGE]
            try:
                filled.sendmsg([b"f"], scm_rights(part), NO_WAIT)
            except OSError as error:
                carrier.close()
                check_sendable(error, filled.fileno() < 0)
                raise ResourceError(
                    error.errno or 0,
                    f"{len(fds)} shared tensors are too many for one message ({error.strerror}): write them in several",
                ) from error
    return carrier


def unpack(fd: int) -> list[int]:
    """All the descriptors in the bundle; takes over and closes ``fd``.

    Raises ResourceError if they are more than this process may have; none is left open then.
    """
    fds: list[int] = []
    with socket.socket(fileno=fd) as carrier, closed_on_error(fds):
        while True:
            try:
                data, ancillary, flags, _ = carrier.recvmsg(8, ANCILLARY_SIZE, NO_WAIT | CLOEXEC)
            except (BlockingIOError, ConnectionError):
                return fds
            if not data:
                return fds
            fds += received_fds(ancillary, flags)
