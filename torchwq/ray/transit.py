"""How messages look while Ray carries them, and what an owner and its worker say to each other.

A message in transit is bytes, or a tuple with the parts of a ``ValueMessage``. Its large parts are arrays on the memory
itself: Ray copies them into its object store, and the reader gets arrays on that, which it must not write to.

To the worker goes one *signal* with each call of the actor, and with some a message in transit; back come lists of
signals. A signal is a tuple whose first element says which:

* to the worker: ``MESSAGE``; ``CLOSE``, its owner will send no more; ``(REPLY, request, good)``;
* to the owner: ``(HELLO, pid, node, address)``; ``(MESSAGE, message)``; ``(REQUEST, number, thread, handle, method,
  message)``, to do something with a handle; ``(CLOSED, handle)``; ``(FAILED, message)``, the function has raised this;
  ``(END, exitcode)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ..marshalling.value_message import ValueMessage
from ..memory.packing import Row

HELLO, MESSAGE, CLOSE, REPLY, REQUEST, CLOSED, FAILED, END = range(8)

#: In the place of a handle: its number, its kind, and what the far object shows of it.
Handle = tuple[int, str, dict[str, Any]]


@dataclass(frozen=True)
class Shared:
    """A message that is in the object store."""

    ref: Any


def _none(obj: Any) -> Any:
    raise AssertionError(f"{obj!r} has no place in this message")


def pack(payload: Any, handle: Callable[[Any], Any] = _none) -> Any:
    """The payload of a message in transit. ``handle`` gives what stands for each of its objects."""
    if not isinstance(payload, ValueMessage):
        return payload
    parts = [np.frombuffer(part, np.uint8) for part in payload.parts]
    rows = [tuple(row) for row in payload.rows]
    return payload.pickled, rows, parts, [handle(obj) for obj in payload.objects]


def unpack(message: Any, object_of: Callable[[Any], Any] = _none) -> bytes | ValueMessage:
    """The reverse: something that ``codec.decode`` takes."""
    if isinstance(message, bytes):
        return message
    pickled, rows, parts, handles = message
    return ValueMessage(pickled, _rows(rows), parts, [object_of(each) for each in handles])


def _rows(rows: Sequence[Any]) -> list[Row]:
    return [Row(*row) for row in rows]


#: A call that waits for messages of the worker, and so do this many before it, makes the first of them return.
MAX_WAITING: Final = 4
