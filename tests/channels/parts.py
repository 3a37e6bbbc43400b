"""Parts of other processes in a channel, as it were."""

from __future__ import annotations

import os

from torchwq.channels.socket import SocketChannel, open_socket_channels
from torchwq.channels.table import SENT


def another(socket: SocketChannel) -> SocketChannel:
    """A second part, which would normally be another process's."""
    fds = [*socket._connection.handover(), *socket.table.handover()]
    if socket._room >= 0:
        fds.append(socket._room)
    return SocketChannel(socket.name, [os.dup(fd) for fd in fds], socket.capacity)


def write_and_die(socket: SocketChannel) -> None:
    """What a process leaves that is killed after it has written."""
    part = another(socket)
    part.table.add(SENT, 1)
    part.table.abandon()
    part.left = True
    open_socket_channels.discard(part)
    part._connection.close()
