"""Measures whether a loader or the training that it feeds is the slower one."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

from .counters import BATCHES, BUSY, NBYTES, WAITED, Counters


@dataclass(frozen=True, slots=True)
class LoaderStatistics:
    """What a loader has done since it was made.

    Attributes:
        batches: batches that workers have made.
        batches_per_second: handed out, while the loader was iterated over.
        bytes: size of the batches, as they travel.
        consumer_waited: seconds for which the consumer waited for a batch.
        workers_waited: seconds for which workers waited for something to do, all of them together.
        workers_busy: seconds for which workers were making batches, all of them together.
        num_workers: how many workers there are.
        restarts: how often a worker that had died was replaced.
        verdict: which side is the slower one, in one line.
    """

    batches: int
    batches_per_second: float
    bytes: int
    consumer_waited: float
    workers_waited: float
    workers_busy: float
    num_workers: int
    restarts: int
    verdict: str


class StatsCollector:
    """Counts for one loader, over all its iterators."""

    def __init__(self, workers: int) -> None:
        self._counters: Counters | None = None
        self.workers = workers
        #: The state of the last iterator, when that is gone.
        self.state: Any = None
        self.restarts = 0
        #: The last number of workers that the autoscaler has logged.
        self.logged_num_workers = 0
        #: Nanoseconds for which the consumer has waited.
        self.waited = 0
        self.num_handed_out = 0
        #: Nanoseconds of all epochs that have ended; and when the present one began, 0 if there is none.
        self._iterated = self._since = 0
        # The last check: when, how long the consumer had waited, how long cores had been idle.
        self._last_check = 0, 0, 0.0

    def __reduce__(self) -> Any:
        """A copy of a loader begins to count anew."""
        return StatsCollector, (self.workers,)

    def counters(self, workers: int) -> Counters:
        """Counters for so many workers. They take a descriptor, so they are made when they are needed."""
        if self._counters is None:
            self._counters = Counters(workers)
        elif self._counters.slots < workers:
            self._counters = self._counters.grown(workers)
        return self._counters

    def start(self) -> None:
        """An epoch begins."""
        self._since = self._since or time.perf_counter_ns()

    def stop(self) -> None:
        """The epoch has ended."""
        if self._since:
            self._iterated += time.perf_counter_ns() - self._since
            self._since = 0

    def since_last_check(self) -> tuple[float, bool]:
        """For which part of the time since the last call the consumer waited, and whether a core was idle."""
        now, waited, idle = time.perf_counter_ns(), self.waited, _idle_time()
        then, waited_then, idle_then = self._last_check
        idle_cores = (idle - idle_then) * 1e9 / max(1, now - then)
        self._last_check = now, waited, idle
        return (waited - waited_then) / max(1, now - then), idle_cores > 0.5

    def read(self) -> LoaderStatistics:
        """The counts until now."""
        now = time.perf_counter_ns()
        seconds = (self._iterated + (now - self._since if self._since else 0)) / 1e9
        counters = self._counters
        waited, idle, busy, batches, nbytes = self.waited / 1e9, 0.0, 0.0, 0, 0
        if counters is not None:
            idle, busy = counters.sum(WAITED) / 1e9, counters.sum(BUSY) / 1e9
            batches, nbytes = counters.sum(BATCHES), counters.sum(NBYTES)
        return LoaderStatistics(
            batches=batches,
            batches_per_second=self.num_handed_out / seconds if seconds else 0.0,
            bytes=nbytes,
            consumer_waited=waited,
            workers_waited=idle,
            workers_busy=busy,
            num_workers=self.workers,
            restarts=self.restarts,
            verdict=_verdict(waited, seconds, idle, busy, batches),
        )


def _verdict(waited: float, seconds: float, idle: float, busy: float, batches: int) -> str:
    if not batches:
        return "no batch was made by a worker yet"
    part, spare = waited / max(seconds, 1e-9), idle / max(idle + busy, 1e-9)
    if part > 0.1 and spare < 0.5:
        return f"data-bound: the consumer waited {part:.0%} of the time and workers were busy; more of them may help"
    if part > 0.1:
        return f"data-bound: the consumer waited {part:.0%} of the time, although workers waited {spare:.0%} of theirs"
    return f"compute-bound: the consumer waited {part:.0%} of the time, workers {spare:.0%} of theirs"


def _idle_time() -> float:
    """Seconds for which the cores of this machine have been idle, all together; 0.0 if unknown."""
    try:
        with open("/proc/stat", encoding="ascii") as stat:
            return int(stat.readline().split()[4]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0
