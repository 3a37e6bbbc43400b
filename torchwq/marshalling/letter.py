"""What travels within one process: a pickle, and beside it what must not be copied.

Threads could hand each other the objects themselves. But whoever changes ``backend="thread"`` to ``"process"``, or
back, must not have to look for what that changes: what is a copy there is a copy here, what is refused there is refused
here. So values are pickled here too, or copied in another way where that gives the same (``codec.copied``). Tensors
need not be moved to shared memory for it: the same memory is there.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any, Final

from .reducers import Unpacking

#: Stands in a message where descriptors would; never empty, so that nobody takes the letter for a bare pickle.
ENCLOSED: Final = [-1]


class Letter:
    """An object marshalled for this process. It is opened once.

    Args:
        data: its pickle; None if the object itself is all there is.
        enclosed: what the pickle refers to: tensors, storages, handles.
        buffers: the pickle's out-of-band buffers, which become the reader's own.
    """

    __slots__ = ("buffers", "data", "enclosed")

    def __init__(self, data: bytes | None, enclosed: Sequence[Any], buffers: Sequence[bytearray] = ()) -> None:
        self.data = data
        self.enclosed = enclosed
        self.buffers = buffers

    def open(self, *, as_it_is: bool = False) -> Any:
        """The object. Raises whatever unpickling it raises.

        Args:
            as_it_is: with the writer's own tensors in it, for one who only looks at them, to send them elsewhere.
        """
        if self.data is None:
            return self.enclosed[0]
        with Unpacking([], None, self.enclosed, as_it_is):
            return pickle.loads(self.data, buffers=self.buffers)

    def copy(self) -> Letter:
        """Another letter with the same content, to be opened in its place."""
        return Letter(self.data, self.enclosed, [bytearray(buffer) for buffer in self.buffers])
