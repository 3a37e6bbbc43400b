"""Messages to another machine: a pickle, and beside it the memory of tensors and arrays, and handles.

Nothing of it refers to memory or descriptors of this machine. Whoever carries it sends ``pickled``, ``rows``, and the
``parts``, which are the memory itself and not a copy of it: so a transport that copies a message anyway, as an object
store does, makes the only copy at the sender. The reader copies each part once, into memory of its own.

Handles are objects that the carrier replaces: it gives the reader an object in the place of each (see
``handles.reference``).
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

from ..memory.packing import Row
from ..memory.received_blocks import ReceivedBlocks
from .reducers import InboundMessage


class ValueMessage:
    """An object marshalled by value.

    Args:
        pickled: its pickle.
        rows: which part is which storage or buffer of the pickle.
        parts: memory. Nobody may write to it until the message has been sent.
        objects: the references to handles in the pickle; at the reader, what it gets in their place.
    """

    __slots__ = ("objects", "parts", "pickled", "rows")

    def __init__(
        self,
        pickled: bytes,
        rows: Sequence[Row] = (),
        parts: Sequence[Any] = (),
        objects: Sequence[Any] = (),
    ) -> None:
        self.pickled = pickled
        self.rows = rows
        self.parts = parts
        self.objects = objects

    @property
    def nbytes(self) -> int:
        """Bytes of the pickle and of the memory beside it."""
        return len(self.pickled) + sum(row.nbytes for row in self.rows)

    def decode(self) -> Any:
        """The object. Raises whatever unpickling raises."""
        received = ReceivedBlocks((), [], rows=self.rows, data=self.parts)
        try:
            with InboundMessage([], received, self.objects):
                return pickle.loads(self.pickled, buffers=received.buffers())
        finally:
            received.done()
