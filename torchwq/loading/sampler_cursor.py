"""A cursor through a loader's sampler, which knows from where to go on after each index.

The sampler is always ahead of the batches, so its state is noted with each index (each ``every``-th, if that is asked
for) and told when the batch is handed out. Two may have a state: the batch sampler or else the sampler in it, and the
iterator of either. They are asked if they have ``state_dict`` and ``load_state_dict``. Where none has, going on means
to draw and drop.
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
    """What ``state_dict`` of the sampler and of its iterator gave; ``steps`` indices were drawn since. None: not asked.

    ``error`` is what one of them has raised; it is for whoever asks for the state.
    """

    sampler: Any = None
    iterator: Any = None
    steps: int = 0
    error: Exception | None = None

    def copy_if_set(self) -> SamplerState | None:
        """A copy, if anything was told."""
        return None if self.sampler is None and self.iterator is None else replace(self)


class SamplerCursor:
    """Indices of one epoch: ``next(cursor.indices)``."""

    def __init__(self, sampler: Any, every: int = 1) -> None:
        self._sampler = sampler
        self._every = every
        #: What has a state and lives longer than the epoch.
        self._source = next((each for each in internals.sampler_chain(sampler) if is_stateful(each)), None)
        #: What may have a state and ends with the epoch.
        self._iterator: Any = None
        self._steps = 0
        #: Whether an index may have moved something that has a state.
        self.may_have_state = not internals.has_no_state(sampler)
        self._makes_batches = self.may_have_state and type(sampler) is BatchSampler
        #: Indices that come before the sampler's next.
        self.pending: deque[Any] = deque()
        self.indices: Iterator[Any] = iter(())

    def begin(self, iterator: Any = None) -> None:
        """Begin an epoch. ``iterator`` is one of the sampler that was made already."""
        if self._makes_batches:
            self.indices = self._batches(self._sampler)
        else:
            self.indices = self._iterator = iter(self._sampler) if iterator is None else iterator

    def restore_source(self, resume: SamplerState | None) -> None:
        """Give what lives longer than an epoch its state."""
        if resume is not None and resume.sampler is not None and self._source is not None:
            self._source.load_state_dict(copy_of_state(resume.sampler))

    def resume(
        self, resume: SamplerState | None, position: int, pending: Iterable[Any] = (), *, draws_next: bool = False
    ) -> None:
        """Be where ``resume`` says; if it says nothing, ``position`` indices after the first.

        Args:
            resume: what the sampler has told.
            position: how many indices had been drawn.
            pending: indices that come before the next one.
            draws_next: whether, if there is no state, the sampler's next index is drawn now and not when it is asked
                for, because the random numbers are those of that time only now.
        """
        resume = resume or SamplerState()
        self.restore_source(resume)
        self.begin()
        self.start()
        if resume.iterator is not None:
            self._iterator.load_state_dict(copy_of_state(resume.iterator))
        told = resume.iterator is not None or (resume.sampler is not None and self._source is not None)
        self._steps = resume.steps if told else 0
        skip(self.indices, resume.steps if told else position)
        self.pending.extend(pending)
        drawn: deque[Any] = deque()
        if draws_next and self.state() is None:
            with contextlib.suppress(StopIteration):
                drawn.append(next(self.indices))
        if self.pending or drawn:
            self.indices = _joined(self.pending, drawn, self.indices)

    def start(self) -> None:
        """Call ``iter`` of the sampler in a batch sampler, which waits for the first index as with torch."""
        if self._makes_batches and self._iterator is None:
            self._iterator = iter(self._sampler.sampler)

    def _batches(self, sampler: BatchSampler) -> Iterator[list[Any]]:
        """As ``BatchSampler`` does it, with the sampler's iterator where it can be asked for its state."""
        self.start()
        if sampler.drop_last:
            for batch in zip(*[self._iterator] * sampler.batch_size, strict=False):
                yield list(batch)
            return
        while batch_of_any := list(itertools.islice(self._iterator, sampler.batch_size)):
            yield batch_of_any

    def note(self) -> SamplerState | None:
        """After an index: the state, or None if it is not one of those after which it is noted."""
        self._steps += 1
        if not self._every or self._steps % self._every:
            return None
        return self.state()

    def end(self) -> SamplerState | None:
        """The state between two epochs: without that of an iterator."""
        return None if self._source is None else _state_of(self._source, None)

    def state(self) -> SamplerState | None:
        """The state as it is now; None if there is nothing that has one."""
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
    """Take and drop so many. Not by ``islice``: that asks for ``iter(iterator)``, with which some begin anew."""
    for _ in range(count):
        try:
            next(iterator)
        except StopIteration:
            return


def _joined(pending: deque[Any], drawn: deque[Any], indices: Iterator[Any]) -> Iterator[Any]:
    """What is in the queues, which lose it, and then ``indices``, of which nothing is asked but ``next``."""
    while first := pending or drawn:
        yield first.popleft()
    while True:
        try:
            index = next(indices)
        except StopIteration:
            return
        yield index
