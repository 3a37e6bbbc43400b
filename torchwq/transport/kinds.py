"""Makes endpoints, of the kind that ``TORCHWQ_TRANSPORT`` names, or of the best that the platform has."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence

from . import seqpacket, stream
from .endpoint import Endpoint


def kind() -> str:
    """``'seqpacket'`` or ``'stream'``."""
    chosen = os.environ.get("TORCHWQ_TRANSPORT", "").strip().lower()
    if chosen in ("seqpacket", "stream"):
        return chosen
    if chosen:
        raise ValueError(f"TORCHWQ_TRANSPORT must be 'seqpacket' or 'stream', not {chosen!r}")
    return "seqpacket" if sys.platform == "linux" and hasattr(socket, "SOCK_SEQPACKET") else "stream"


def pair() -> tuple[Endpoint, Endpoint]:
    """Two connected ends."""
    return seqpacket.pair() if kind() == "seqpacket" else stream.pair()


def adopt(fds: Sequence[int]) -> Endpoint:
    """Make an end from the descriptors of another process's ``handover()``; takes them over."""
    return seqpacket.SeqpacketEndpoint(fds[0]) if len(fds) == 1 else stream.StreamEndpoint(fds[0], fds[1])


def from_socket(fd: int) -> Endpoint:
    """Make an end that no other process holds, from a connected socket of either type; takes it over."""
    sock = socket.socket(fileno=fd)
    packets = sock.type == getattr(socket, "SOCK_SEQPACKET", None)
    return seqpacket.SeqpacketEndpoint(sock.detach()) if packets else stream.StreamEndpoint(sock.detach())


def handover_size() -> int:
    """Number of descriptors in a ``handover()``."""
    return 1 if kind() == "seqpacket" else 2
