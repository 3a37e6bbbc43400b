"""What travels within one process: a pickle, and beside it what must not be copied.

Threads could hand each other the objects themselves. But whoever changes ``backend="thread"`` to ``"process"``, or
back, must not have to look for what that changes: what is a copy there is a copy here, what is refused there is refused
here. So values are pickled here too, or copied in another way where that gives the same (``copies.try_copy``). Tensors
need not be moved to shared memory for it: the same memory is there.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any, Final

from .reducers import InboundMessage

#: Stands in a message where descriptors would; never empty, so that nobody takes the message for a bare pickle.
LOCAL_FDS: Final = [-1]


class LocalMessage:
    """An object marshalled for this process. It is decoded once.

    Args:
        data: its pickle; None if the object itself is all there is.
        objects: what the pickle refers to: tensors, storages, handles.
        buffers: the pickle's out-of-band buffers, which become the reader's own.
    """

    __slots__ = ("buffers", "data", "objects")

    def __init__(self, data: bytes | None, objects: Sequence[Any], buffers: Sequence[bytearray] = ()) -> None:
        self.data = data
        self.objects = objects
        self.buffers = buffers

    def decode(self, *, original_tensors: bool = False) -> Any:
        """The object. Raises whatever unpickling it raises.

        Args:
            original_tensors: use the writer's own tensors, for a caller that only sends them elsewhere.
        """
        if self.data is None:
            return self.objects[0]
        with InboundMessage([], None, self.objects, original_tensors):
            return pickle.loads(self.data, buffers=self.buffers)

    def copy(self) -> LocalMessage:
        """Another message with the same content, to be decoded in its place."""
        return LocalMessage(self.data, self.objects, [bytearray(buffer) for buffer in self.buffers])
