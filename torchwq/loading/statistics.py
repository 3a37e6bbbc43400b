"""Measures where the time of a loader goes, and whether it or the training that it feeds is the slower one.

Workers count in words that they share with their loader (``counters``), so a look costs no message, and nothing is
counted that a batch would feel.
"""

from __future__ import annotations

import html
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from ..transport.waiting import cores
from .counters import (
    AHEAD,
    BATCHES,
    BUSY,
    COLLATE,
    COUNTS,
    CPU,
    MEMORY_NAME,
    NBYTES,
    READY,
    SEND,
    SLOWEST,
    TOLD,
    WAITED,
    Counters,
)

#: A consumer that waits for less than this part of its time is fed well enough.
_MUCH_WAITING: Final = 0.1
#: Workers that have the processor for less than this part of their busy time wait for something else.
_MOSTLY_COMPUTING: Final = 0.5
#: How many of the slowest samples are shown.
_SHOWN: Final = 5


@dataclass(frozen=True, slots=True)
class SlowSample:
    """A sample that took long.

    Attributes:
        index: the dataset's index of it.
        seconds: how long the dataset took for it.
    """

    index: int
    seconds: float


@dataclass(frozen=True, slots=True)
class WorkerStatistics:
    """What one worker has done.

    Attributes:
        batches: batches that it has made.
        fetch: seconds for which it was getting samples from the dataset.
        collate: seconds in the collate function.
        send: seconds for which it was sending batches.
        waited: seconds for which it waited for something to do.
        ahead: of these, seconds for which it had made as many batches ahead as it may.
        processor: seconds of processor time. Much less than ``fetch`` and ``collate`` together, without ``ready``: it
            waits itself, for a disk or a network.
        ready: seconds for which it could have run, and others had the processor; 0 if the system does not tell.
        slowest: of the last epoch, the samples that took it the longest, the slowest first.
    """

    batches: int
    fetch: float
    collate: float
    send: float
    waited: float
    ahead: float
    processor: float
    ready: float = 0.0
    slowest: Sequence[SlowSample] = ()


@dataclass(frozen=True, slots=True)
class LoaderStatistics:
    """What a loader has done. ``print`` shows it as a table, and a notebook too.

    Attributes:
        batches: batches that were made.
        batches_per_second: handed out, while the loader was iterated over.
        bytes: size of the batches, as they travel; 0 without workers.
        consumer_waited: seconds for which the consumer waited for a batch; without workers, for which it made them.
        workers_waited: seconds for which workers waited for something to do, all of them together.
        workers_busy: seconds for which workers were making batches, all of them together.
        num_workers: how many workers there are.
        restarts: how often a worker that had died was replaced.
        verdict: which side is the slower one, and what would help, in one line.
        seconds: for how long the loader was iterated over.
        workers: each worker by itself.
        autoscaling: with ``num_workers="auto"``, why no more workers were added; empty while they are.
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
    seconds: float = 0.0
    workers: Sequence[WorkerStatistics] = ()
    autoscaling: str = ""

    @property
    def slowest(self) -> list[SlowSample]:
        """The samples of the last epoch that took the longest, the slowest first: up to three of each worker.

        Those of workers, and of datasets with indices that are numbers, if they take longer than some microseconds. A
        dataset that gets all indices of a batch at once (``__getitems__``, as ``Subset`` has it) tells no sample from
        another.
        """
        return sorted((each for worker in self.workers for each in worker.slowest), key=lambda each: -each.seconds)

    def _rows(self) -> list[tuple[str, ...]]:
        columns = "fetch", "collate", "send", "waited", "far ahead", "processor", "ready"
        rows: list[tuple[str, ...]] = [("worker", "batches", *(f"{column} s" for column in columns))]
        for number, each in enumerate(self.workers):
            times = each.fetch, each.collate, each.send, each.waited, each.ahead, each.processor, each.ready
            rows.append((str(number), f"{each.batches:,}", *(f"{seconds:.2f}" for seconds in times)))
        return rows

    def _summary(self) -> str:
        rate = f"{self.batches:,} batches, {self.batches_per_second:,.1f} a second"
        return f"{rate}; the consumer waited {self.consumer_waited:.2f} of {self.seconds:.2f} s"

    def __str__(self) -> str:
        rows = self._rows() if self.workers else []
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([self._summary(), *table, *self._remarks()])

    def _remarks(self) -> list[str]:
        slowest = ", ".join(f"{each.index} ({each.seconds * 1e3:,.1f} ms)" for each in self.slowest[:_SHOWN])
        return [line for line in (slowest and f"slowest samples: {slowest}", self.verdict, self.autoscaling) if line]

    def _repr_html_(self) -> str:
        rows = self._rows() if self.workers else []
        cells = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
        table = "".join(f"<tr>{row}</tr>" for row in cells)
        remarks = "".join(f"<p>{html.escape(remark)}</p>" for remark in self._remarks())
        return f"<p>{html.escape(self._summary())}</p><table>{table}</table>{remarks}"


@dataclass(slots=True)
class _Totals:
    """All counts at one moment."""

    words: list[list[int]]
    waited: int = 0
    handed_out: int = 0
    iterated: int = 0
    processor: int = 0
    restarts: int = 0

    def since(self, earlier: _Totals) -> _Totals:
        words = [
            [*(now - then for now, then in zip(row[:COUNTS], earlier.words[n], strict=False)), *row[COUNTS:]]
            if n < len(earlier.words)
            else row
            for n, row in enumerate(self.words)
        ]
        return _Totals(
            words,
            self.waited - earlier.waited,
            self.handed_out - earlier.handed_out,
            self.iterated - earlier.iterated,
            self.processor - earlier.processor,
            self.restarts - earlier.restarts,
        )


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
        #: Why the autoscaler adds no more workers, in one line.
        self.why_no_more = ""
        #: Nanoseconds for which the consumer has waited; and, without workers, of processor time meanwhile.
        self.waited = self.processor = 0
        self.num_handed_out = 0
        #: Nanoseconds of all epochs that have ended; when the present one began, 0 if there is none; and when its last
        #: batch was handed out: an epoch that is broken off ends there.
        self._iterated = self._since = self._last = 0
        #: From where ``read`` counts; and at the beginning of the last epoch.
        self._from = self._epoch = _Totals([])
        # The last check: when, how long the consumer had waited, how long cores had been idle.
        self._last_check = 0, 0, 0.0

    def __reduce__(self) -> Any:
        """A copy of a loader begins to count anew."""
        return StatsCollector, (self.workers,)

    def counters(self, workers: int, dataset: Any) -> Counters:
        """Counters for so many workers. They take a descriptor, so they are made when they are needed."""
        name = MEMORY_NAME + type(dataset).__qualname__
        if self._counters is None:
            self._counters = Counters(workers, name=name)
        elif self._counters.slots < workers:
            self._counters = self._counters.grown(workers, name)
        return self._counters

    def start(self) -> None:
        """An epoch begins."""
        if self._since:
            self._iterated += self._last - self._since
        self._since = 0
        self._epoch = self._totals()
        self._since = self._last = time.perf_counter_ns()

    def handed_out(self) -> None:
        """The consumer gets a batch."""
        self.num_handed_out += 1
        self._last = time.perf_counter_ns()

    def stop(self) -> None:
        """The epoch has ended."""
        if self._since:
            self._iterated += time.perf_counter_ns() - self._since
            self._since = 0

    def reset(self) -> None:
        """Let ``read`` count from now on."""
        self._from = self._totals()

    def since_last_check(self) -> tuple[float, bool]:
        """For which part of the time since the last call the consumer waited, and whether a core was idle."""
        now, waited, idle = time.perf_counter_ns(), self.waited, _idle_time()
        then, waited_then, idle_then = self._last_check
        idle_cores = (idle - idle_then) * 1e9 / max(1, now - then)
        self._last_check = now, waited, idle
        return (waited - waited_then) / max(1, now - then), idle_cores > 0.5

    def _totals(self) -> _Totals:
        iterated = self._iterated + (self._last - self._since if self._since else 0)
        counters = self._counters
        words = [] if counters is None else [list(counters.of(n)[:TOLD]) for n in range(counters.slots)]
        return _Totals(words, self.waited, self.num_handed_out, iterated, self.processor, self.restarts)

    def read(self, *, last_epoch: bool = False) -> LoaderStatistics:
        """The counts since the beginning or ``reset``; or of the last epoch."""
        counts = self._totals().since(self._epoch if last_epoch else self._from)
        seconds, waited = counts.iterated / 1e9, counts.waited / 1e9
        workers = [_of_worker(words) for words in counts.words[: self.workers]]
        batches = sum(words[BATCHES] for words in counts.words)
        if not self.workers:
            verdict = _verdict_without_workers(counts.handed_out, waited, seconds, counts.processor / 1e9)
        else:
            verdict = _verdict(waited, seconds, batches, workers, self.why_no_more)
        return LoaderStatistics(
            batches=batches if self.workers else counts.handed_out,
            batches_per_second=counts.handed_out / seconds if seconds else 0.0,
            bytes=sum(words[NBYTES] for words in counts.words),
            consumer_waited=waited,
            workers_waited=sum(words[WAITED] for words in counts.words) / 1e9,
            workers_busy=sum(words[BUSY] for words in counts.words) / 1e9,
            num_workers=self.workers,
            restarts=counts.restarts,
            verdict=verdict,
            seconds=seconds,
            workers=tuple(workers),
            autoscaling=self.why_no_more,
        )


def _of_worker(words: Sequence[int]) -> WorkerStatistics:
    collate, send = words[COLLATE] / 1e9, words[SEND] / 1e9
    return WorkerStatistics(
        batches=words[BATCHES],
        fetch=max(0.0, words[BUSY] / 1e9 - collate - send),
        collate=collate,
        send=send,
        waited=words[WAITED] / 1e9,
        ahead=words[AHEAD] / 1e9,
        processor=words[CPU] / 1e9,
        ready=words[READY] / 1e9,
        slowest=tuple(
            SlowSample(words[place + 1] - 1, words[place] / 1e9) for place in range(SLOWEST, TOLD, 2) if words[place]
        ),
    )


def _verdict(
    waited: float, seconds: float, batches: int, workers: Sequence[WorkerStatistics], autoscaling: str = ""
) -> str:
    if not batches:
        return "no batch was made by a worker yet"
    busy = sum(each.fetch + each.collate + each.send for each in workers)
    idle, processor = sum(each.waited for each in workers), sum(each.processor for each in workers)
    part, spare = waited / max(seconds, 1e-9), idle / max(idle + busy, 1e-9)
    computing = processor / max(busy - sum(each.ready for each in workers), processor, 1e-9)
    if part <= _MUCH_WAITING:
        return f"compute-bound: the consumer waited {part:.0%} of the time, workers {spare:.0%} of theirs"
    begin = f"data-bound: the consumer waited {part:.0%} of the time"
    if spare >= 0.5:
        return f"{begin}, although workers waited {spare:.0%} of theirs: a larger prefetch_factor may help"
    if computing < _MOSTLY_COMPUTING:
        advice = "" if autoscaling else ": more of them help, also more than cores"
        return f"{begin} and workers were busy, mostly waiting themselves{advice}"
    if len(workers) >= cores():
        return f"{begin} and workers compute on all {cores()} cores: more of them will not help, cheaper samples will"
    advice = "" if autoscaling else f"; more of them may help, up to the {cores()} cores"
    return f"{begin} and workers were busy computing{advice}"


def _verdict_without_workers(batches: int, waited: float, seconds: float, processor: float) -> str:
    if not batches:
        return "no batch was made yet"
    part, computing = waited / max(seconds, 1e-9), processor / max(waited, 1e-9)
    if part <= _MUCH_WAITING:
        return f"compute-bound: making batches takes {part:.0%} of the time; workers would not help"
    if computing < _MOSTLY_COMPUTING:
        return f"data-bound: making batches takes {part:.0%} of the time, mostly waiting: workers help, or threads"
    return f"data-bound: making batches takes {part:.0%} of the time, computing: workers help if cores are free"


def _idle_time() -> float:
    """Seconds for which the cores of this machine have been idle, all together; 0.0 if unknown."""
    try:
        with open("/proc/stat", encoding="ascii") as stat:
            return int(stat.readline().split()[4]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0
