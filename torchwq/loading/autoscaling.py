"""How many workers ``num_workers="auto"`` comes to: it adds workers while the consumer waits and more of them help.

Workers that need the processor help while a core is idle, so there is at most one for each core. Workers that wait for
a disk, a network or a sleep help beyond that. They are recognised by how little of their busy time they had the
processor, not counting the time for which they were runnable and other processes had it. If a batch takes each worker
longer the more workers there are, they all wait for the same thing, and no more are added.

The autoscaler checks every few batches or every quarter of a second, from words in which workers count anyway. No
batch costs more for it.
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

#: Batches, and seconds, between two checks: whichever is over first.
_BATCHES_PER_CHECK: Final = 64
_CHECK_INTERVAL: Final = 0.25
#: The consumer may wait for this part of its time.
_MAX_WAIT_FRACTION: Final = 0.1
#: Seconds for which workers must have been busy before a check judges them.
_MIN_BUSY_TIME: Final = 0.2
#: Workers that have the processor for less than this part of their busy time wait for something else.
_MAX_IO_BOUND_CPU_FRACTION: Final = 0.5
#: More workers must make so many times the batches that fewer made.
_MIN_SPEEDUP: Final = 1.2


def max_workers(cores: int) -> int:
    """How many workers there may be if they mostly wait."""
    return max(8, 4 * cores)


@dataclass
class _Window:
    """The counts at the time from which all present workers were at work."""

    busy: int
    batches: int
    #: Nanoseconds for which workers had the processor, and for which they were runnable without it; None if unknown.
    processor: tuple[int, int] | None


class Autoscaler:
    """Decides for one iterator, which may have ``limit`` workers."""

    def __init__(self, stats: StatsCollector, counters: Counters, limit: int, cores: int) -> None:
        self._stats = stats
        self._counters = counters
        self._limit = limit
        self._cores = cores
        self._window: _Window | None = None
        #: Batches per nanosecond that all workers could make, before the last were added; 0.0 if unknown.
        self._previous_rate = 0.0
        self._last_check = time.monotonic()
        #: Whether no more workers will be added.
        self.has_ended = False
        stats.since_last_check()  # the first check begins here

    def is_due(self, yielded: int) -> bool:
        """Whether to check now, after ``yielded`` batches."""
        return yielded % _BATCHES_PER_CHECK == 0 or time.monotonic() - self._last_check > _CHECK_INTERVAL

    def workers_to_add(self, workers: Sequence[WorkerHandle]) -> int:
        """How many workers to add now."""
        self._last_check = time.monotonic()
        count = len(workers)
        waited, idle = self._stats.since_last_check()
        if waited < _MAX_WAIT_FRACTION:
            if self._window is not None:
                self._log_once(count, f"the consumer waits for {waited:.0%} of its time, which is not much", " for now")
            return 0
        # The limit is older than the number of cores: a process may have been given more of them in between.
        if count < min(self._cores, self._limit) and idle:
            return self._add(count, 1, waited)
        if not all(worker.has_answered for worker in workers):
            return 0
        if self._window is None:
            self._window = self._new_window(workers)
            return 0
        then, now = self._window, self._new_window(workers)
        busy, batches = now.busy - then.busy, now.batches - then.batches
        if busy < _MIN_BUSY_TIME * 1e9 or batches < count:
            return 0
        self._window = now
        rate = count * batches / busy
        if rate < _MIN_SPEEDUP * self._previous_rate:
            return self._end(count, f"together they make no more than fewer did: {rate * 1e9:.1f} batches a second")
        if now.processor is None or then.processor is None:
            io_bound = idle
        else:
            running, runnable = (after - before for after, before in zip(now.processor, then.processor, strict=True))
            io_bound = running < _MAX_IO_BOUND_CPU_FRACTION * max(0, busy - runnable)
        if not io_bound and count >= self._cores:
            return self._end(count, f"they need the processor, and the machine has {self._cores} cores for them")
        if not io_bound:
            self._log_once(count, "they need the processor, and no core is idle", " for now")
            return 0
        if count >= self._limit:
            return self._end(count, f"it starts no more on {self._cores} cores")
        self._previous_rate = rate
        return self._add(count, min(count, self._limit - count), waited)

    def _add(self, count: int, more: int, waited: float) -> int:
        self._window = None
        self._stats.why_no_more = ""
        log.info(
            "DataLoader: %d workers now, because the consumer waited %.0f %% of its time", count + more, 100 * waited
        )
        return more

    def _end(self, count: int, why: str) -> int:
        self.has_ended = True
        self._log_once(count, why)
        return 0

    def _log_once(self, count: int, why: str, for_now: str = "") -> None:
        """Log why the number of workers stays, once for each number of a loader."""
        self._stats.why_no_more = f"it stays at {count} worker{'s' if count > 1 else ''}{for_now}: {why}"
        if count != self._stats.logged_num_workers:
            self._stats.logged_num_workers = count
            log.info("DataLoader: %s", self._stats.why_no_more)

    def _new_window(self, workers: Sequence[WorkerHandle]) -> _Window:
        return _Window(self._counters.sum(BUSY), self._counters.sum(BATCHES), _processor_time(workers))


def _processor_time(workers: Sequence[WorkerHandle]) -> tuple[int, int] | None:
    if workers[0].process.peer.same_process:
        return time.process_time_ns(), 0  # that of all threads
    running = runnable = 0
    try:
        for worker in workers:
            with open(f"/proc/{worker.process.pid}/schedstat", encoding="ascii") as stat:
                times = stat.read().split()
            running, runnable = running + int(times[0]), runnable + int(times[1])
    except (OSError, ValueError, IndexError):
        return None
    return (running, runnable) if running else None
