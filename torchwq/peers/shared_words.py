"""Words in shared memory: processes count there what all of them may look at, which costs no message.

Why memory and not messages: whoever has to know may look at any moment, also when the one who has written is dead.

Invariants:

* A word has 8 bytes and is aligned: a reader sees the old value or the new one, never a mixture.
* One process writes a word at a time. The module that lays the words out says which.
* A new mapping's words are 0.
* The memory lives as long as a view of it does: closing gives up the descriptor and this object's own view, and does
  not take the words from a thread that still has a view of some of them.
* A forked child shares the memory. An object that must not be used there has ``abandon`` called by its owner.
"""

from __future__ import annotations

from typing import Final

from ..transport import descriptors

WORD: Final = 8


class SharedWords:
    """A mapping of shared words: a head, and then slots of equal width. Safe to use from several threads.

    Args:
        head: how many words come before the first slot.
        slots: how many slots there are.
        width: how many words a slot has.
        fd: the memory, which this object takes over, also if it fails; None to make new memory.

    Raises ResourceError if descriptors or memory have run out.
    """

    def __init__(self, head: int, slots: int, width: int, fd: int | None = None) -> None:
        self.head, self.slots, self.width = head, slots, width
        nbytes = WORD * (head + slots * width)
        self.fd = descriptors.memory_file("torchwq", nbytes) if fd is None else fd
        self._closing = descriptors.close_with(self, self.fd)
        try:
            self.words = memoryview(descriptors.map_file(self.fd, nbytes)).cast("Q")
        except BaseException:
            self._closing()
            raise

    def slot_offset(self, slot: int) -> int:
        """Index of a slot's first word."""
        return self.head + slot * self.width

    def column(self, word: int, slots: int | None = None) -> memoryview:
        """One word of each slot, or of the first ``slots`` of them."""
        end = self.head + (self.slots if slots is None else slots) * self.width
        return self.words[self.head + word : end : self.width]

    def close(self) -> None:
        """Give up the descriptor and the words. May be called again."""
        if self.fd >= 0:
            self.words.release()
            self.abandon()

    def abandon(self) -> None:
        """Give up the descriptor alone: other threads may be using the words, or another process owns them."""
        self.fd = -1
        self._closing()
