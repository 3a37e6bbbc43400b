"""Helpers that stand for other processes."""

from __future__ import annotations

import os

from torchwq import Channel
from torchwq.channels.socket import SocketChannel, open_socket_channels
from torchwq.channels.table import SENT


def socket_of(channel: Channel) -> SocketChannel:
    """Open the channel to processes."""
    channel._core.open_to_processes()
    socket = channel._core.socket
    assert socket is not None
    return socket


def descriptors_of(socket: SocketChannel) -> list[int]:
    """What another process would get."""
    room = [] if socket.room is None else socket.room.handover()
    return [os.dup(fd) for fd in (*socket._connection.handover(), *socket.table.handover(), *room)]


def another(socket: SocketChannel) -> SocketChannel:
    """A second part, which would normally be another process's."""
    return SocketChannel(socket.name, descriptors_of(socket), None if socket.room is None else 1)


def write_and_die(socket: SocketChannel) -> None:
    """Leave what a process leaves that is killed after it has written."""
    part = another(socket)
    part.table.add(SENT, 1)
    part.table.abandon()
    part.left = True
    open_socket_channels.discard(part)
    part._connection.close()
