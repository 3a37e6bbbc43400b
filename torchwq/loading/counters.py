"""What a loader and its workers count in shared memory, where a look costs no message.

A worker on another machine has words of its own there: its messages, and those to it, have their values beside them.

Each worker has words of its own, in two mappings. Only the worker writes its words of the statistics. Of its words that
govern the *flow* (``messages`` has Note [Flow of batches]), the iterator writes ``CONSUMED``, ``GENERATION`` and
``LIMIT``, and the worker the others.
"""

from __future__ import annotations

from typing import Any, Final

from ..marshalling import reducers
from ..peers.shared_words import SharedWords

#: Words of a worker: nanoseconds at work, nanoseconds waiting for something to do, batches, bytes. Of the first,
#: nanoseconds in the collate function, sending, on the processor, and ready to run while others had the processor; of
#: the second, those for which it was far enough ahead.
COUNTS: Final = 9
BUSY, WAITED, BATCHES, NBYTES, COLLATE, SEND, CPU, READY, AHEAD = range(COUNTS)
#: After the counts: the first word of the slowest samples of the epoch, and how many samples are kept. See SlowSamples.
SLOWEST: Final = COUNTS
SLOWEST_KEPT: Final = 3
#: How many words tell something of a worker.
TOLD: Final = SLOWEST + 2 * SLOWEST_KEPT
#: Words that govern the flow: how many of the worker's answers the consumer has taken; how often it has abandoned
#: tasks, so that only later ones are wanted; whether the worker sleeps until CONSUMED has grown; up to which of its
#: answers it makes batches of abandoned tasks; how many of its answers were lost: see Note [in-band promises]; how many
#: it has sent, and what it is doing now, which only ``python -m torchwq top`` looks at.
CONSUMED, GENERATION, ASLEEP, LIMIT, LOST, MADE, AT_WORK = range(7)
#: What AT_WORK says of a worker that is there, and waits; else it is when the worker began its present answer
#: (time.perf_counter_ns), or 0, if it is not there.
IDLE: Final = 1
WORDS: Final = 16  # two cache lines for each worker
#: What the names of the memory begin with. That of the flow goes on with the inode of the other.
MEMORY_NAME: Final = "torchwq-loader:"
FLOW_MEMORY_NAME: Final = "torchwq-flow:"


class Counters(SharedWords):
    """One mapping of the counters of ``workers`` workers of a loader. Their successors use it again.

    ``name`` is that of new memory, by which ``python -m torchwq top`` finds it.
    """

    def __init__(self, workers: int, fd: int | None = None, name: str = "torchwq") -> None:
        super().__init__(0, workers, WORDS, fd, name)

    def of(self, worker_id: int) -> memoryview:
        """The words of one worker."""
        if worker_id >= self.slots:
            raise IndexError(f"worker {worker_id} has no counters: there are {self.slots}")
        first = self.slot_offset(worker_id)
        return self.words[first : first + WORDS]

    def grown(self, workers: int, name: str = "torchwq") -> Counters:
        """Counters for more workers, with the same counts. What processes count in these is not seen any more."""
        more = Counters(workers, name=name)
        more.words[: len(self.words)] = self.words
        return more

    def sum(self, word: int) -> int:
        """Sum of a word over all workers."""
        return sum(self.column(word))


def _reduce(encoder: reducers.Encoder, counters: Counters) -> Any:
    if not encoder.peer.shares_memory:
        return Counters, (counters.slots,)
    return _rebuild, (counters.slots, encoder.attach_fd(counters.fd, counters))


def _rebuild(workers: int, index: int) -> Counters:
    return Counters(workers, reducers.take_inbound_fd(index))


reducers.register(Counters, _reduce)
