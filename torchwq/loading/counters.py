"""What a loader and its workers count, in shared memory, so that looking at it costs no message.

Each worker has a line of words of its own, however many there are. In a loader's statistics only the worker writes to
its line. In the line that governs the *flow*, the iterator writes ``CONSUMED``, ``GENERATION`` and ``LIMIT``, and the
worker ``ASLEEP``.
"""

from __future__ import annotations

import os
from typing import Any, Final

from ..marshalling import reducers
from ..memory import anonymous
from ..transport import descriptors

#: Words of a worker: nanoseconds at work, nanoseconds waiting for something to do, batches, bytes.
BUSY, WAITED, BATCHES, NBYTES = range(4)
#: Words that govern the flow: how many of the worker's answers were taken; which tasks are still wanted, counted by how
#: often others were abandoned; whether the worker sleeps until CONSUMED has grown; up to which of its answers it makes
#: batches that nobody wants any more.
CONSUMED, GENERATION, ASLEEP, LIMIT = range(4)
_WORDS: Final = 8  # a cache line for each worker


class Counters:
    """One mapping of the counters of ``workers`` workers of a loader. Used again for those that come after them."""

    def __init__(self, workers: int, fd: int | None = None) -> None:
        nbytes = 8 * _WORDS * workers
        self.workers = workers
        self.fd = anonymous.create(nbytes) if fd is None else fd
        self._mapping = descriptors.mapped(self.fd, nbytes)
        self._words = memoryview(self._mapping).cast("Q")

    def of(self, worker_id: int) -> memoryview:
        """The words of one worker."""
        if worker_id >= self.workers:
            raise IndexError(f"worker {worker_id} has no counters: there are {self.workers}")
        first = worker_id * _WORDS
        return self._words[first : first + _WORDS]

    def grown(self, workers: int) -> Counters:
        """Others for more workers, which go on with these counts. Whoever counts in these is not seen any more."""
        more = Counters(workers)
        more._words[: len(self._words)] = self._words
        return more

    def sum(self, word: int) -> int:
        return sum(self._words[word::_WORDS])

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            self._close_fd(self.fd)

    #: There when the interpreter ends, too, and module os may be gone.
    _close_fd = staticmethod(os.close)


def _reduce(encoder: reducers.Encoder, counters: Counters) -> Any:
    return _rebuild, (counters.workers, encoder.attach(counters.fd, counters))


def _rebuild(workers: int, index: int) -> Counters:
    return Counters(workers, reducers.take_inbound_fd(index))


reducers.register(Counters, _reduce)
