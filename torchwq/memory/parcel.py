"""What travels: the bytes of one message, its descriptors, and what must stay alive until it is sent.

A plain small object is just ``bytes``, its pickle, and is sent as it is: a pickle ends with a full stop. Everything
else is a :class:`Parcel`, and everything that is numbered has a trailer: the number (8 bytes) and the kind of the
payload (1 byte, never a full stop). It stands at the end because pickle stops reading there by itself: nothing has
to be cut off.
"""

from __future__ import annotations

import os
from typing import Any, Final, NamedTuple

#: Last byte of a message: a pickle with a trailer; a trailer after what says where in a shared block the pickle and its
#: buffers are; a bare pickle.
PICKLE: Final = 0
BLOCK: Final = 1
BARE: Final = ord(".")
TRAILER: Final = 9


class Parcel(NamedTuple):
    data: bytes
    fds: list[int]
    #: Owners of ``fds``: storages, blocks, sockets.
    keep: list[Any]
    kind: int = PICKLE

    def copy(self) -> tuple[bytes, list[int]]:
        """The message as its reader would get it, with descriptors of its own."""
        return self.data + bytes(TRAILER - 1) + bytes((self.kind,)), [os.dup(fd) for fd in self.fds]


Payload = bytes | Parcel
