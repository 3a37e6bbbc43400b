"""What travels: the bytes of one message, its descriptors, and what must stay alive until it is sent.

A plain small object is just ``bytes``, its pickle; everything else is a :class:`Parcel`. Either becomes a message by a
trailer of ``TRAILER`` bytes: a number (a question's; 0 for everything else), and the kind of the payload. It stands
at the end because pickle stops reading there by itself: the fast path needs no slice.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

#: Payload kinds: a pickle, or a table that says where in a shared block the pickle and its buffers are.
PICKLE: Final = 0
BLOCK: Final = 1
TRAILER: Final = 9
PLAIN_TRAILER: Final = bytes(TRAILER)


class Parcel(NamedTuple):
    data: bytes
    fds: list[int]
    #: Owners of ``fds``: storages, blocks, sockets.
    keep: list[Any]
    kind: int = PICKLE


Payload = bytes | Parcel
