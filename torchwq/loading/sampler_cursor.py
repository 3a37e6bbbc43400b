"""A cursor through a loader's sampler, which knows from where to go on after each index.

The sampler is always ahead of the batches, so its state is noted with each index (each ``every``-th, if that is asked
for) and told when the batch is handed out. State have, in this order: the batch sampler or the sampler in it, and the
iterator of either, each if it has ``state_dict`` and ``load_state_dict``. Where none has, going on means to draw and
drop.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import BatchSampler

from . import internals
from .plain import detached, is_stateful, skip


@dataclass(slots=True)
class SamplerState:
    """What ``state_dict`` of the sampler and of its iterator gave; ``steps`` indices were drawn since. None: not asked.

    ``error`` is what one of them has raised; it is for whoever asks for the state.
    """

    sampler: Any = None
    iterator: Any = None
    steps: int = 0
    error: Exception | None = None


class SamplerCursor:
    """Indices of one epoch: ``next(cursor.indices)``."""

    def __init__(self, sampler: Any, every: int = 1) -> None:
        self._sampler = sampler
        self._every = every
        inner = getattr(sampler, "sampler", None)
        #: What has a state and lives longer than the epoch.
        self._source = next((each for each in (sampler, inner) if is_stateful(each)), None)
        self._inner: Any = None
        self._steps = 0
        #: Whether an index may have moved something that has a state.
        self.watches = not internals.has_no_state(sampler)
        self.indices: Iterator[Any] = iter(())

    def begin(self, iterator: Any = None) -> None:
        """Begin an epoch. ``iterator`` is one of the sampler that was made already."""
        if type(self._sampler) is BatchSampler and self.watches:
            self.indices = self._batches(self._sampler)
        else:
            self.indices = iter(self._sampler) if iterator is None else iterator

    def restore_source(self, resume: SamplerState | None) -> None:
        """Give what lives longer than an epoch its state."""
        if resume is not None and resume.sampler is not None and self._source is not None:
            self._source.load_state_dict(detached(resume.sampler))

    def go_on(self, resume: SamplerState | None, position: int) -> None:
        """Be where ``resume`` says; if it says nothing, ``position`` indices after the first."""
        resume = resume or SamplerState()
        self.restore_source(resume)
        iterator: Any = None
        if type(self._sampler) is BatchSampler and self.watches:
            self.indices = self._batches(self._sampler)
            self.start()
            iterator = self._inner
        else:
            self.indices = iterator = iter(self._sampler)
        if resume.iterator is not None:
            iterator.load_state_dict(detached(resume.iterator))
        told = resume.iterator is not None or (resume.sampler is not None and self._source is not None)
        self._steps = resume.steps if told else 0
        skip(self.indices, resume.steps if told else position)

    def start(self) -> None:
        """Call ``iter`` of the sampler in a batch sampler, which waits for the first index as with torch."""
        if type(self._sampler) is BatchSampler and self.watches and self._inner is None:
            self._inner = iter(self._sampler.sampler)

    def _batches(self, sampler: BatchSampler) -> Iterator[list[Any]]:
        """As ``BatchSampler`` does it, with the sampler's iterator where it can be asked for its state."""
        self.start()
        inner = self._inner
        if sampler.drop_last:
            for batch in zip(*[inner] * sampler.batch_size, strict=False):
                yield list(batch)
            return
        while batch_of_any := list(itertools.islice(inner, sampler.batch_size)):
            yield batch_of_any

    def note(self) -> SamplerState | None:
        """After an index: the state, or None if it is not one of those after which it is noted."""
        self._steps += 1
        if not self._every or self._steps % self._every:
            return None
        return self.state()

    def end(self) -> SamplerState | None:
        """The state between two epochs: without that of an iterator."""
        if self._source is None:
            return None
        try:
            return SamplerState(detached(self._source.state_dict()))
        except Exception as error:
            return SamplerState(error=error)

    def state(self) -> SamplerState | None:
        """The state as it is now; None if there is nothing that has one."""
        iterator: Any = self.indices if self._inner is None else self._inner
        stateful = is_stateful(iterator)
        if self._source is None and not stateful:
            if self._inner is not None or type(self._sampler) is not BatchSampler:
                self.watches = False
            return None
        try:
            return SamplerState(
                detached(self._source.state_dict()) if self._source is not None else None,
                detached(iterator.state_dict()) if stateful else None,
            )
        except Exception as error:
            return SamplerState(error=error)
