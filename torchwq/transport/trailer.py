"""The end of a message: its number and its kind. This file alone writes and reads them.

A payload of plain bytes is a pickle, and a pickle ends with a full stop. Without a number it travels as it is: it is
*bare*, and the full stop is its kind. Any other message has a trailer: the number (8 bytes) and the kind of the payload
(1 byte, never a full stop). The trailer stands at the end because pickle stops before it by itself, so the reader need
not cut it off. :mod:`torchwq.marshalling.wire` says what each kind means.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

_TRAILER: Final = struct.Struct("<QB")
_NUMBER: Final = struct.Struct("<Q").unpack_from

#: Bytes of a trailer.
SIZE: Final = _TRAILER.size
#: The place of the kind in a message: ``data[KIND]`` is ``kind_of(data)`` without a call.
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
    """How many bytes of a message are its payload."""
    return len(data) if data[KIND] == BARE else len(data) - SIZE


def payload_of(data: bytes) -> bytes:
    """A message without its trailer."""
    return data[: size_of_payload(data)]
