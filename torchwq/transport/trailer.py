"""The end of a message: its number and its kind, which are laid down and read here and nowhere else.

A payload of plain bytes is a pickle, and a pickle ends with a full stop. Sent without a number it travels as it is, and
is *bare*: the full stop is its kind. Any other message has a trailer: the number (8 bytes) and the kind of the payload
(1 byte, never a full stop). The trailer stands at the end because pickle stops reading before it by itself: nobody has
to cut it off.

What each kind means is no business of this room: see :mod:`torchwq.marshalling.wire`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

_TRAILER: Final = struct.Struct("<QB")
_NUMBER: Final = struct.Struct("<Q").unpack_from

#: Bytes of a trailer.
SIZE: Final = _TRAILER.size
#: Where in a message its kind stands: ``data[KIND]`` is ``kind_of(data)`` where a call is too dear.
KIND: Final = -1
#: Kind of a message without a trailer.
BARE: Final = ord(".")
#: Kind of a message that is a pickle and a trailer.
PICKLE: Final = 0

#: ``trailer(number, kind)``: the bytes to put behind a payload.
trailer: Final[Callable[[int, int], bytes]] = _TRAILER.pack


def number_of(data: bytes) -> int:
    """The number in the trailer of a message that has one."""
    number: int = _NUMBER(data, -SIZE)[0]
    return number


def kind_of(data: bytes | memoryview) -> int:
    """The kind of a message."""
    return data[KIND]


def size_of_payload(data: bytes | memoryview) -> int:
    """How many bytes of a message are its payload: where its trailer begins, if it has one."""
    return len(data) if data[KIND] == BARE else len(data) - SIZE


def payload_of(data: bytes) -> bytes:
    """A message without its trailer."""
    return data[: size_of_payload(data)]
