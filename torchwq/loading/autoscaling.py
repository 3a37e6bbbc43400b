"""How many workers ``num_workers="auto"`` comes to: more while the consumer waits, and as long as more of them help.

Workers that need the processor help as long as a core is idle, so at most one for each core. Workers that wait, for a
disk, a network or a sleep, help beyond that: what tells is how much of the time for which they were busy they had the
processor, but for the time for which they stood in line for it, as they do on a machine that is loaded. Whether more
of them really helped is seen from how long a batch takes each: if it takes longer as there are more of them, they are
waiting for one and the same thing.

Looked at lazily, every few batches or every quarter of a second, from words that workers count in anyway; no batch
costs more for it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from .counters import BATCHES, BUSY, Counters
from .statistics import StatsCollector
from .worker_handle import WorkerHandle

log = logging.getLogger("torchwq")

#: It is looked at again after so many batches, or after so many seconds, if these have not come until then.
_BATCHES_PER_CHECK: Final = 64
_CHECK_INTERVAL: Final = 0.25
#: The part of the time that is too long a wait for the consumer.
_MAX_WAIT_FRACTION: Final = 0.1
#: Seconds for which workers must have been busy before it is judged what they do.
_MIN_BUSY_TIME: Final = 0.2
#: Workers that need the processor for less than this part of their time wait for something else.
_MAX_IO_BOUND_CPU_FRACTION: Final = 0.5
#: By how much more workers must do more, together, than before.
_MIN_SPEEDUP: Final = 1.2


def max_workers(cores: int) -> int:
    """How many workers there may be that mostly wait."""
    return max(8, 4 * cores)


@dataclass
class _Window:
    """What had been counted when the present workers were all at work."""

    busy: int
    batches: int
    #: Nanoseconds for which workers have had the processor, and stood in line for it; None where that is not known.
    processor: tuple[int, int] | None


class Autoscaler:
    """Decides for one iterator. ``limit``: how many workers there may be."""

    def __init__(self, stats: StatsCollector, counters: Counters, limit: int, cores: int) -> None:
        self._stats = stats
        self._counters = counters
        self._limit = limit
        self._cores = cores
        self._window: _Window | None = None
        #: Batches per nanosecond that all workers could make, before the last were added; 0.0 if that is not known.
        self._before = 0.0
        self._last_check = time.monotonic()
        #: Whether it is known that more workers do not help.
        self.has_ended = False
        stats.since_last_check()  # from now on

    def is_due(self, yielded: int) -> bool:
        """Whether it is time to look, when so many batches were handed out."""
        return yielded % _BATCHES_PER_CHECK == 0 or time.monotonic() - self._last_check > _CHECK_INTERVAL

    def workers_to_add(self, workers: Sequence[WorkerHandle]) -> int:
        """How many workers to add now."""
        self._last_check = time.monotonic()
        count = len(workers)
        waited, idle = self._stats.since_last_check()
        if waited < _MAX_WAIT_FRACTION:
            if self._window is not None:
                self._say(count, f"the consumer waits for {waited:.0%} of its time, which is not much")
            return 0
        if count < self._cores and idle:
            return self._add(count, 1, waited)
        if not all(worker.has_answered for worker in workers):
            return 0
        if self._window is None:
            self._window = self._now(workers)
            return 0
        then, now = self._window, self._now(workers)
        busy, batches = now.busy - then.busy, now.batches - then.batches
        if busy < _MIN_BUSY_TIME * 1e9 or batches < count:
            return 0
        self._window = now
        able = count * batches / busy
        if able < _MIN_SPEEDUP * self._before:
            return self._end(count, f"together they make no more than fewer did: {able * 1e9:.1f} batches a second")
        if now.processor is None or then.processor is None:
            waits = idle
        else:
            had, stood = (after - before for after, before in zip(now.processor, then.processor, strict=True))
            waits = had < _MAX_IO_BOUND_CPU_FRACTION * max(0, busy - stood)
        if not waits and count >= self._cores:
            return self._end(count, f"they need the processor, and the machine has {self._cores} cores for them")
        if not waits:
            self._say(count, "they need the processor, and no core is idle")
            return 0
        if count >= self._limit:
            return self._end(count, f"it starts no more on {self._cores} cores")
        self._before = able
        return self._add(count, min(count, self._limit - count), waited)

    def _add(self, count: int, more: int, waited: float) -> int:
        self._window = None
        log.info(
            "DataLoader: %d workers now, because the consumer waited %.0f %% of its time", count + more, 100 * waited
        )
        return more

    def _end(self, count: int, why: str) -> int:
        self.has_ended = True
        self._say(count, why)
        return 0

    def _say(self, count: int, why: str) -> None:
        """Once for each number of workers of a loader."""
        if count != self._stats.logged_num_workers:
            self._stats.logged_num_workers = count
            log.info("DataLoader: it stays at %d worker%s: %s", count, "s" if count > 1 else "", why)

    def _now(self, workers: Sequence[WorkerHandle]) -> _Window:
        return _Window(self._counters.sum(BUSY), self._counters.sum(BATCHES), _processor_time(workers))


def _processor_time(workers: Sequence[WorkerHandle]) -> tuple[int, int] | None:
    if workers[0].process.peer.same_process:
        return time.process_time_ns(), 0  # with what the other threads do
    had = stood = 0
    try:
        for worker in workers:
            with open(f"/proc/{worker.process.pid}/schedstat", encoding="ascii") as stat:
                times = stat.read().split()
            had, stood = had + int(times[0]), stood + int(times[1])
    except (OSError, ValueError, IndexError):
        return None
    return (had, stood) if had else None
