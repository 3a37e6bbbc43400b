"""The few numbers that a queue's processes share: who has taken how many questions, and which one is in hand.

Messages alone cannot tell an owner what a killed worker had in hand, nor when a worker that never answers is done. A
worker therefore notes each question it takes in a slot of its own. Invariants:

* A slot is written by one handle only, under that handle's lock; the owner only reads it. Words are 8 bytes and
  aligned, so that a reader sees an old or a new value, never a mixture.
* The order of writes in a slot is ``seq`` before ``busy`` before ``taken``: whoever sees the count sees the rest.
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
_WORDS: Final = 8  # per slot: one cache line
_TAKEN, _BUSY, _SEQ = range(3)
_NBYTES: Final = (SLOTS + 1) * _WORDS * 8


class Board:
    """A mapping of one queue's counters. ``fd`` is owned by this object."""

    def __init__(self, fd: int | None = None) -> None:
        self.fd = blocks.create(_NBYTES) if fd is None else fd
        self._mapping = mmap.mmap(self.fd, _NBYTES)
        self._words = memoryview(self._mapping).cast("Q")

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            self._words.release()
            self._mapping.close()
            os.close(fd)

    __del__ = close

    def slot(self, number: int) -> Slot:
        return Slot(self._words, (number + 1) * _WORDS)

    def set_asked(self, asked: bool) -> None:
        self._words[0] = int(asked)

    def asked(self) -> bool:
        return bool(self._words[0])


class Slot:
    """One handle's part of the board."""

    __slots__ = ("_base", "_words")

    def __init__(self, words: memoryview, base: int) -> None:
        self._words = words
        self._base = base

    def clear(self) -> None:
        for word in range(_WORDS):
            self._words[self._base + word] = 0

    def note_taken(self, seq: int, busy: int) -> None:
        words, base = self._words, self._base
        words[base + _SEQ] = seq
        words[base + _BUSY] = busy
        words[base + _TAKEN] += 1

    def set_busy(self, busy: int) -> None:
        self._words[self._base + _BUSY] = busy

    @property
    def taken(self) -> int:
        return int(self._words[self._base + _TAKEN])

    @property
    def busy(self) -> int:
        """Number of this handle's threads that have taken a question and not answered it."""
        return int(self._words[self._base + _BUSY])

    @property
    def seq(self) -> int:
        """Number of the question taken last; questions count from 1."""
        return int(self._words[self._base + _SEQ])
