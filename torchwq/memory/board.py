"""The few numbers that a queue's processes share: which question each worker has taken last, and whether it is at it.

Messages alone cannot tell an owner what a killed worker had in hand, nor when a worker that never answers is done. A
worker therefore notes each question it takes in a slot of its own: one word, ``number + busy``, where ``number`` is the
question's (a multiple of ``STEP``) and ``busy``, the lowest byte, says how many threads of the handle are at a
question. A question's message carries its word with ``busy`` = 1, so that noting it is a copy of 8 bytes. Invariants:

* A slot is written by one handle only, under that handle's lock; the owner only reads it. It is one aligned word, so a
  reader sees an old or a new state, never a mixture.
* Questions are taken in the order of their numbers. So the highest number in any slot tells how many were taken.
* A worker killed between taking a question and noting it has taken one question more than its slot says. So the owner
  counts each death as one possible such loss, and believes it only when the socket is empty.
* ``asked`` in the head is set by an owner that waits for questions to be taken; workers then ping it.
"""

from __future__ import annotations

import mmap
import os
from typing import Final

from . import blocks

SLOTS: Final = 4096
#: Numbers of questions are multiples of this; what is below it counts busy threads.
STEP: Final = 1 << 8
#: Index of the word that says whether the owner waits for questions to be taken.
ASKED: Final = 0
_WORDS: Final = 8  # per slot: a cache line, so that workers do not slow each other down
_NBYTES: Final = (SLOTS + 1) * _WORDS * 8


class Board:
    """A mapping of one queue's counters. ``fd`` is owned by this object."""

    def __init__(self, fd: int | None = None) -> None:
        self.fd = blocks.create(_NBYTES) if fd is None else fd
        self._mapping = mmap.mmap(self.fd, _NBYTES)
        #: The same memory as words and as bytes.
        self.words = memoryview(self._mapping).cast("Q")
        self.bytes = memoryview(self._mapping)

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            self.words.release()
            self.bytes.release()
            self._mapping.close()
            os.close(fd)

    __del__ = close

    def slot(self, number: int) -> Slot:
        return Slot(self.words, (number + 1) * _WORDS)

    def offset(self, number: int) -> int:
        """Where the word of slot ``number`` is in ``bytes``."""
        return (number + 1) * _WORDS * 8

    def set_asked(self, asked: bool) -> None:
        self.words[ASKED] = int(asked)


class Slot:
    """One handle's part of the board."""

    __slots__ = ("_index", "_words")

    def __init__(self, words: memoryview, index: int) -> None:
        self._words = words
        self._index = index

    def clear(self) -> None:
        self._words[self._index] = 0

    @property
    def number(self) -> int:
        """Number of the question taken last."""
        return int(self._words[self._index]) // STEP * STEP

    @property
    def busy(self) -> int:
        """How many of the handle's threads have taken a question and not answered it."""
        return int(self._words[self._index]) % STEP
