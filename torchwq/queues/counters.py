"""The few numbers that a queue's processes share: how many questions each worker has taken, and whether it is at one.

Messages alone cannot tell an owner what a killed worker had in hand, nor when a worker that never answers is done. A
worker therefore notes each question it takes in a slot of its own, of two words: the number of the question taken last,
and ``taken * BUSY + busy``, where ``taken`` counts questions and ``busy`` the threads that are at one. Invariants:

* A slot is written by one handle only, under that handle's lock; the owner reads it, and clears it when nobody has it.
  The number is written first.
* A question that was taken and not noted is in no slot. So the owner knows that something is under way as long as the
  counts do not add up to what it has sent.
* A worker killed between taking a question and noting it leaves the counts short for ever. So the owner counts each
  death as one possible such loss, and believes it only when the socket is empty and nothing moves.
* ``ASKED`` in the head says whether the owner waits for questions to be taken: see Note [Waiting for room].
"""

from __future__ import annotations

import contextlib
from typing import Final

from ..peers.shared_words import SharedWords

SLOTS: Final = 4096
#: What the name of the memory begins with.
MEMORY_NAME: Final = "torchwq-queue:"
#: The state word counts questions in multiples of this; what is below it counts busy threads.
BUSY: Final = 1 << 24
#: Index of the word that says whether the owner waits for questions to be taken.
ASKED: Final = 0
#: Index of the word in which the owner counts the answers that it has lost: see Note [in-band promises].
LOST: Final = 1
#: Index of the words in which the owner counts the questions that it has sent, those that handles which are gone had
#: taken, those that threads of its process have taken from the socket, and the handles that other processes have. Only
#: ``python -m torchwq top`` looks at them.
SENT: Final = 2
TAKEN_BY_GONE: Final = 3
TAKEN_BY_THREADS: Final = 4
HANDLES: Final = 5
WIDTH: Final = 8  # words of the head, and of each slot: a cache line, so that workers do not slow each other down


class Counters(SharedWords):
    """A mapping of one queue's counters. Takes over ``fd``. ``name``: the queue's, for new ones."""

    def __init__(self, fd: int | None = None, name: str = "") -> None:
        super().__init__(WIDTH, SLOTS, WIDTH, fd, MEMORY_NAME + name)

    def count(self, word: int) -> None:
        """Add one to a word of the head, if these are open. The caller has the lock of who else does."""
        with contextlib.suppress(ValueError):
            self.words[word] += 1

    def slot(self, number: int) -> Slot:
        return Slot(self.words, self.slot_offset(number))


class Slot:
    """One handle's part of the counters."""

    __slots__ = ("_words", "number_index", "state_index")

    def __init__(self, words: memoryview, index: int) -> None:
        self._words = words
        #: Where its two words are in the counters' ``words``.
        self.number_index = index
        self.state_index = index + 1

    def clear(self) -> None:
        self._words[self.state_index] = 0
        self._words[self.number_index] = 0

    @property
    def number(self) -> int:
        """Number of the question taken last."""
        return int(self._words[self.number_index])

    @property
    def taken(self) -> int:
        """How many questions the handle has taken."""
        return int(self._words[self.state_index]) // BUSY

    @property
    def busy(self) -> int:
        """How many of the handle's threads have taken a question and not answered it."""
        return int(self._words[self.state_index]) % BUSY
