"""Words of 64 bits in shared memory, in which processes count what other processes look at.

A process can look at any time, without a message, also when the process that has counted is dead.

Invariants:

* A word is aligned: a reader sees the old value or the new one, never a mixture.
* Only one process at a time writes a word. The module that lays the words out says which.
* The words of new memory are 0.
* ``close`` gives up the descriptor and this object's own view. A thread that has a view of some words keeps them.
* A forked child shares the memory. Where the child must not use an object, the object's owner calls ``abandon`` there.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from .. import _native
from ..transport import descriptors

WORD: Final = 8


class SharedWords:
    """A mapping of shared words: a header, and then slots of equal width. Safe to use from several threads.

    Args:
        header: how many words come before the first slot.
        slots: how many slots there are.
        width: how many words a slot has.
        fd: the memory, which this object takes over even if it raises; None makes new memory.
        name: what new memory is called. ``python -m torchwq top`` finds it by that.

    Raises ResourceError if descriptors or memory have run out.
    """

    def __init__(self, header: int, slots: int, width: int, fd: int | None = None, name: str = "torchwq") -> None:
        self.header, self.slots, self.width = header, slots, width
        nbytes = WORD * (header + slots * width)
        self.fd = descriptors.memory_file(name, nbytes) if fd is None else fd
        self._closing = descriptors.close_with(self, self.fd)
        try:
            self.words = memoryview(descriptors.map_file(self.fd, nbytes)).cast("Q")
            self._native_words: list[Any] = []
        except BaseException:
            self._closing()
            raise

    def slot_offset(self, slot: int) -> int:
        """Index of a slot's first word."""
        return self.header + slot * self.width

    def column(self, word: int, slots: int | None = None) -> memoryview:
        """One word of each slot, or of the first ``slots`` of them."""
        end = self.header + (self.slots if slots is None else slots) * self.width
        return self.words[self.header + word : end : self.width]

    def address(self, index: int) -> int:
        """Where a word is in memory, as long as this is not closed."""
        return int(np.frombuffer(self.words, np.uint64, count=1).ctypes.data) + WORD * index

    def native_word(self, index: int) -> Any:
        """A word as the native part reads it, and adds to it, until ``close``; None where there is no native part."""
        if _native.core is None:
            return None
        word = _native.core.SharedWord(self.address(index), self.words[index : index + 1])
        self._native_words.append(word)
        return word

    def close(self) -> None:
        """Give up the descriptor and the words. May be called again."""
        if self.fd >= 0:
            for word in self._native_words:
                word.close()
            self.words.release()
            self.abandon()

    def abandon(self) -> None:
        """Give up the descriptor only: other threads may be using the words, or another process owns them."""
        self.fd = -1
        self._closing()
