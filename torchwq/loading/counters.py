"""What a loader and its workers count, in shared memory, so that looking at it costs no message.

Each worker has a line of words of its own, however many there are. In a loader's statistics only the worker writes to
its line. In the line that governs the *flow*, the iterator writes ``CONSUMED``, ``GENERATION`` and ``LIMIT``, and the
worker ``ASLEEP``.
"""

from __future__ import annotations

from typing import Any, Final

from ..marshalling import reducers
from ..peers.shared_words import SharedWords

#: Words of a worker: nanoseconds at work, nanoseconds waiting for something to do, batches, bytes.
BUSY, WAITED, BATCHES, NBYTES = range(4)
#: Words that govern the flow: how many of the worker's answers were taken; which tasks are still wanted, counted by how
#: often others were abandoned; whether the worker sleeps until CONSUMED has grown; up to which of its answers it makes
#: batches that nobody wants any more; how many of its answers were lost: see Note [in-band promises].
CONSUMED, GENERATION, ASLEEP, LIMIT, LOST = range(5)
_WORDS: Final = 8  # a cache line for each worker


class Counters(SharedWords):
    """One mapping of the counters of ``workers`` workers of a loader. Used again for those that come after them."""

    def __init__(self, workers: int, fd: int | None = None) -> None:
        super().__init__(0, workers, _WORDS, fd)

    def of(self, worker_id: int) -> memoryview:
        """The words of one worker."""
        if worker_id >= self.slots:
            raise IndexError(f"worker {worker_id} has no counters: there are {self.slots}")
        first = self.slot_offset(worker_id)
        return self.words[first : first + _WORDS]

    def grown(self, workers: int) -> Counters:
        """Others for more workers, which go on with these counts. Whoever counts in these is not seen any more."""
        more = Counters(workers)
        more.words[: len(self.words)] = self.words
        return more

    def sum(self, word: int) -> int:
        """What all workers together have counted in this word."""
        return sum(self.column(word))


def _reduce(encoder: reducers.Encoder, counters: Counters) -> Any:
    return _rebuild, (counters.slots, encoder.attach_fd(counters.fd, counters))


def _rebuild(workers: int, index: int) -> Counters:
    return Counters(workers, reducers.take_inbound_fd(index))


reducers.register(Counters, _reduce)
