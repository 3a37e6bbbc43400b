"""Notes which samples took a worker the longest, in the words that it shares with its loader.

The time of a sample is measured from outside: torch's fetcher takes the indices of a batch one by one, and asks the
dataset for a sample between two of them. Each look at the clock costs a fraction of a microsecond, so samples are timed
only while they take much longer than that. Where the dataset gets all indices at once (``__getitems__``), or has none,
no sample can be told from another.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from .counters import SLOWEST, SLOWEST_KEPT

#: Nanoseconds that a sample must take for it to be worth timing, by the batch before.
_WORTH_TIMING: Final = 20_000
#: No word holds it.
_TOO_LARGE: Final = 1 << 64


class SlowSamples:
    """Those of one worker. ``words`` are the worker's own; for each sample one for its time, one for its index + 1."""

    def __init__(self, words: memoryview) -> None:
        self._words = words
        #: Nanoseconds that the last batch took, all in all; the first one is timed.
        self.last_batch = 1 << 62

    def begin_epoch(self) -> None:
        for word in range(SLOWEST, SLOWEST + 2 * SLOWEST_KEPT):
            self._words[word] = 0

    def fetch(self, fetch: Callable[[Any], Any], index: Any, *, is_batch: bool) -> Any:
        """``fetch(index)``; if ``is_batch``, ``index`` is the indices of several samples."""
        if is_batch:
            is_timed = isinstance(index, (list, tuple)) and self.last_batch >= _WORTH_TIMING * len(index)
            return fetch(self._timed(index) if is_timed else index)
        if self.last_batch < _WORTH_TIMING:
            return fetch(index)
        began = time.perf_counter_ns()
        sample = fetch(index)
        self.note(index, time.perf_counter_ns() - began)
        return sample

    def _timed(self, indices: Sequence[Any]) -> Iterator[Any]:
        """``indices``; measures how long it is until the next one is asked for."""
        for index in indices:
            began = time.perf_counter_ns()
            yield index
            self.note(index, time.perf_counter_ns() - began)

    def note(self, index: Any, took: int) -> None:
        """A sample took so many nanoseconds. An index that is no number is not kept, as it fits into no word."""
        words, last = self._words, SLOWEST + 2 * (SLOWEST_KEPT - 1)
        if took <= words[last]:
            return
        try:
            number = operator.index(index) + 1
        except Exception:  # it is the user's
            return
        if not 0 < number < _TOO_LARGE:
            return
        place = last
        while place > SLOWEST and words[place - 2] < took:
            words[place], words[place + 1] = words[place - 2], words[place - 1]
            place -= 2
        words[place], words[place + 1] = took, number
