"""Messages within one process: a pickle, and beside it the objects that must not be copied.

Threads could hand each other the objects themselves. But a user who changes ``backend="thread"`` to ``"process"``, or
back, must not notice: both copy the same things and refuse the same things. So values are pickled within a process
too, or copied where copying has the same effect (``copies.try_copy``). Tensors need not move to shared memory for that.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any, Final

from .reducers import InboundMessage

#: Takes the place of a message's descriptors. It is not empty: a message without descriptors is a bare pickle.
LOCAL_FDS: Final = [-1]


class LocalMessage:
    """An object marshalled for this process. It can be decoded once.

    Args:
        data: its pickle; None if the object itself is the only one of ``objects``.
        objects: the tensors, storages and handles to which the pickle refers.
        buffers: the pickle's out-of-band buffers, which the reader gets.
    """

    __slots__ = ("buffers", "data", "objects")

    def __init__(self, data: bytes | None, objects: Sequence[Any], buffers: Sequence[bytearray] = ()) -> None:
        self.data = data
        self.objects = objects
        self.buffers = buffers

    def decode(self, *, original_tensors: bool = False) -> Any:
        """The object. Raises whatever unpickling raises.

        Args:
            original_tensors: use the writer's own tensors, for a caller that only sends them elsewhere.
        """
        if self.data is None:
            return self.objects[0]
        with InboundMessage([], None, self.objects, original_tensors):
            return pickle.loads(self.data, buffers=self.buffers)

    def copy(self) -> LocalMessage:
        """Another message with the same content, which the caller can decode instead."""
        return LocalMessage(self.data, self.objects, [bytearray(buffer) for buffer in self.buffers])
