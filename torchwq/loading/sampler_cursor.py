"""A cursor through a loader's sampler, which captures the sampler's state after each index.

The sampler is always ahead of the batches, so its state is captured with an index (each ``every``-th) and counts when
the batch is handed out. Two objects may have a state (``state_dict`` and ``load_state_dict``): the batch sampler or
else the sampler in it, and the iterator of either. If none has, going on means to draw indices and drop them.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch.utils.data import BatchSampler

from . import internals
from .plain_data import copy_of_state, is_stateful


@dataclass(slots=True)
class SamplerState:
    """What ``state_dict`` of the sampler and of its iterator gave, or None; ``steps`` indices were drawn since.

    ``error`` is what one of them has raised. The loader's ``state_dict`` raises it.
    """

    sampler: Any = None
    iterator: Any = None
    steps: int = 0
    error: Exception | None = None

    def copy_if_set(self) -> SamplerState | None:
        """A copy; None if neither has a state."""
        return None if self.sampler is None and self.iterator is None else replace(self)


class SamplerCursor:
    """Indices of one epoch: ``next(cursor.indices)``."""

    def __init__(self, sampler: Any, every: int = 1) -> None:
        self._sampler = sampler
        self._every = every
        #: The sampler, if it has a state. It outlives the epoch.
        self._source = next((each for each in internals.sampler_chain(sampler) if is_stateful(each)), None)
        #: The sampler's iterator, which may have a state and ends with the epoch.
        self._iterator: Any = None
        self._steps = 0
        #: Whether the sampler or its iterator may have a state.
        self.may_have_state = not internals.has_no_state(sampler)
        self._makes_batches = self.may_have_state and type(sampler) is BatchSampler
        #: Indices that come before the sampler's next.
        self.pending: deque[Any] = deque()
        self.indices: Iterator[Any] = iter(())

    def begin(self, iterator: Any = None) -> None:
        """Begin an epoch, with ``iterator`` if one of the sampler was made already."""
        if self._makes_batches:
            self.indices = self._batches(self._sampler)
        else:
            self.indices = self._iterator = iter(self._sampler) if iterator is None else iterator

    def restore_source(self, resume: SamplerState | None) -> None:
        """Give the sampler its state."""
        if resume is not None and resume.sampler is not None and self._source is not None:
            self._source.load_state_dict(copy_of_state(resume.sampler))

    def resume(
        self, resume: SamplerState | None, position: int, pending: Iterable[Any] = (), *, draws_next: bool = False
    ) -> None:
        """Go on where ``resume`` says; without a state, after ``position`` indices.

        Args:
            resume: the sampler's state.
            position: how many indices had been drawn.
            pending: indices that come before the next one.
            draws_next: whether, without a state, to draw the next index at once, because only now the random numbers
                are those of that time.
        """
        resume = resume or SamplerState()
        self.restore_source(resume)
        self.begin()
        self.start()
        if resume.iterator is not None:
            self._iterator.load_state_dict(copy_of_state(resume.iterator))
        has_state = resume.iterator is not None or (resume.sampler is not None and self._source is not None)
        self._steps = resume.steps if has_state else 0
        skip(self.indices, resume.steps if has_state else position)
        self.pending.extend(pending)
        drawn: deque[Any] = deque()
        if draws_next and self.state() is None:
            with contextlib.suppress(StopIteration):
                drawn.append(next(self.indices))
        if self.pending or drawn:
            self.indices = _joined(self.pending, drawn, self.indices)

    def start(self) -> None:
        """Call ``iter`` of the sampler in a batch sampler, which torch calls with the first index."""
        if self._makes_batches and self._iterator is None:
            self._iterator = iter(self._sampler.sampler)

    def _batches(self, sampler: BatchSampler) -> Iterator[list[Any]]:
        """What ``BatchSampler`` yields, from an iterator of the sampler that this object can ask for its state."""
        self.start()
        if sampler.drop_last:
            for batch in zip(*[self._iterator] * sampler.batch_size, strict=False):
                yield list(batch)
            return
        while batch_of_any := list(itertools.islice(self._iterator, sampler.batch_size)):
            yield batch_of_any

    def note(self) -> SamplerState | None:
        """Count an index. Returns the state after it, or None if none is due."""
        self._steps += 1
        if not self._every or self._steps % self._every:
            return None
        return self.state()

    def end(self) -> SamplerState | None:
        """The state between two epochs, when there is no iterator."""
        return None if self._source is None else _state_of(self._source, None)

    def state(self) -> SamplerState | None:
        """The present state; None if neither the sampler nor its iterator has one."""
        iterator = self._iterator if is_stateful(self._iterator) else None
        if self._source is None and iterator is None:
            self.may_have_state = self._makes_batches and self._iterator is None  # it has not begun
            return None
        return _state_of(self._source, iterator)


def _state_of(source: Any, iterator: Any) -> SamplerState:
    try:
        return SamplerState(
            None if source is None else copy_of_state(source.state_dict()),
            None if iterator is None else copy_of_state(iterator.state_dict()),
        )
    except Exception as error:
        return SamplerState(error=error)


def skip(iterator: Any, count: int) -> None:
    """Draw and drop ``count`` items. Not by ``islice``, which calls ``iter(iterator)``: with that some begin anew."""
    for _ in range(count):
        try:
            next(iterator)
        except StopIteration:
            return


def _joined(pending: deque[Any], drawn: deque[Any], indices: Iterator[Any]) -> Iterator[Any]:
    """Drain the two queues, and then ``indices``, of which this uses only ``next``."""
    while first := pending or drawn:
        yield first.popleft()
    while True:
        try:
            index = next(indices)
        except StopIteration:
            return
        yield index
