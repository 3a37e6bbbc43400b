"""Counts references in the words of the reference table: see ``ref_table`` for what they mean.

Each message with tensors counts here at both of its ends, so this is part of the native part, with a twin in Python.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from .. import _native

SLOTS: Final = 512
ROWS: Final = 32768

#: What a message says of a block that has no row.
UNTRACKED: Final = 2**64 - 1

#: What other processes do with a block. The second and the third are also the flags that say so.
FREE, IN_USE, ESCAPED, IN_FLIGHT = range(4)

# A word, from its low bits: two flags; the count, in units of _REFERENCE; from bit 32 on, the generation.
_FLAGS: Final = IN_USE | ESCAPED
_REFERENCE: Final = 4
LOW: Final = 0xFFFFFFFF
_COUNT: Final = LOW - _FLAGS

# In words of 8 bytes: the header (how many slots were ever used; the random number with which generations begin); the
# generation of each row; the tiles, with two words of each of the tile's slots for each row.
USED_SLOTS: Final = 0
FIRST_GENERATION: Final = 1
GENERATIONS: Final = 512
TILES: Final = GENERATIONS + ROWS
TILE: Final = 64
STRIDE: Final = 2 * TILE
WORDS_OF_TILE: Final = ROWS * STRIDE
LENGTH: Final = TILES + SLOTS // TILE * WORDS_OF_TILE
#: With more processes than this, numpy adds faster than a loop.
_NUMPY_FROM: Final = 24


def first_index(slot: int) -> int:
    """Index of the words of a slot for row 0."""
    return TILES + slot // TILE * WORDS_OF_TILE + slot % TILE * 2


class PythonCounts:
    """The words of one process, ``slot``, and what they say together with those of the others.

    Args:
        mapping: the whole table.
        slot: that of this process.
        is_alive: tells whether the process of a slot lives.
    """

    def __init__(self, mapping: mmap.mmap, slot: int, is_alive: Callable[[int], bool]) -> None:
        self._words = memoryview(mapping).cast("Q")
        self._array = np.frombuffer(mapping, np.uint64, offset=8 * TILES).reshape(-1, ROWS, TILE, 2)
        self._first = first_index(slot)
        self._is_alive = is_alive

    def is_current(self, number: int) -> bool:
        """Whether the number still stands for its block."""
        row = number & LOW
        return row < ROWS and bool(self._words[GENERATIONS + row] == number >> 32)

    def count_sent(self, number: int) -> None:
        """A message with a reference is about to be sent. A reference by an old number is not counted."""
        row, generation = number & LOW, number >> 32
        if row >= ROWS:
            return
        words = self._words
        index = self._first + STRIDE * row
        word = words[index]
        if word >> 32 == generation and word & _COUNT != _COUNT:
            words[index] = word + _REFERENCE  # if the number is old, nobody believes the word
        elif self.is_current(number):
            count = word & LOW if word >> 32 == generation else 0
            words[index] = generation << 32 | (count + _REFERENCE & LOW)

    def count_received(self, number: int, flags: int) -> None:
        """A reference was taken out of a message. ``flags``: IN_USE if this process uses the block from now on."""
        row, generation = number & LOW, number >> 32
        if row >= ROWS:
            return
        words = self._words
        index = self._first + STRIDE * row + 1
        word = words[index]
        if word >> 32 == generation and word & _COUNT != _COUNT:
            words[index] = word + _REFERENCE | flags
        elif self.is_current(number):
            count = word & LOW if word >> 32 == generation else 0
            words[index] = generation << 32 | (count + _REFERENCE & LOW) | flags

    def set_flag(self, number: int, flag: int) -> None:
        """Set one of this process's flags for a block."""
        if number & LOW >= ROWS:
            return
        generation = number >> 32
        index = self._first + STRIDE * (number & LOW) + 1
        word = self._words[index]
        if word >> 32 == generation:
            self._words[index] = word | flag
        elif self.is_current(number):
            self._words[index] = generation << 32 | flag

    def clear_flag(self, number: int, flag: int) -> None:
        """Clear one of this process's flags for a block."""
        if number & LOW >= ROWS:
            return
        index = self._first + STRIDE * (number & LOW) + 1
        word = self._words[index]
        if word >> 32 == number >> 32:
            self._words[index] = word & ~flag

    def state(self, number: int) -> int:
        """FREE, IN_FLIGHT, IN_USE (by a living process) or ESCAPED."""
        words = self._words
        used = words[USED_SLOTS]
        if number & LOW >= ROWS:
            return IN_FLIGHT
        if used > _NUMPY_FROM:
            return self._state_of_many(number, used)
        generation = number >> 32
        first = TILES + STRIDE * (number & LOW)
        end = first + 2 * used
        received = sent = 0
        for slot, word in enumerate(words[first + 1 : end : 2]):
            if word >> 32 == generation:
                if word & _FLAGS:
                    if word & ESCAPED:
                        return ESCAPED
                    if self._is_alive(slot):
                        return IN_USE
                received += word & ~_FLAGS
        for word in words[first:end:2]:  # see Note [order of loads]
            if word >> 32 == generation:
                sent += word
        if sent - received & LOW or words[USED_SLOTS] != used:
            return IN_FLIGHT
        return FREE

    def _state_of_many(self, number: int, used: int) -> int:
        generation, row = number >> 32, number & LOW
        tiles = -(-used // TILE)
        received = self._array[:tiles, row, :, 1].reshape(-1)  # a copy
        received = np.where(received >> np.uint64(32) == generation, received & np.uint64(LOW), 0)
        for slot in np.flatnonzero(received & np.uint64(_FLAGS)):
            if int(received[slot]) & ESCAPED:
                return ESCAPED
            if self._is_alive(int(slot)):
                return IN_USE
        sent = self._array[:tiles, row, :, 0].reshape(-1)  # see Note [order of loads]
        sent = np.where(sent >> np.uint64(32) == generation, sent & np.uint64(LOW), 0)
        if int(sent.sum()) - int((received & ~np.uint64(_FLAGS)).sum()) & LOW or self._words[USED_SLOTS] != used:
            return IN_FLIGHT
        return FREE

    def close(self) -> None:
        """Let the mapping go. Nothing is counted after that."""
        del self._array
        self._words.release()


def native_counts(mapping: mmap.mmap, slot: int, is_alive: Callable[[int], bool]) -> Any:
    """The same in C."""
    address = np.frombuffer(mapping, np.uint64, count=1).ctypes.data
    return _native.core.Counts(address, LENGTH, slot, is_alive)


#: ``Counts(mapping, slot, is_alive)``: see ``PythonCounts``.
Counts: Final[Callable[[mmap.mmap, int, Callable[[int], bool]], Any]] = (
    native_counts if _native.core is not None else PythonCounts
)
