"""Snapshots of a worker: from where it could go on after a batch.

With a batch travels what the dataset and its iterator tell of themselves (``state_dict``, if there is
``load_state_dict`` too), and, for loaders that were asked for it, the states of the generators of random numbers. Only
what was moved: a generator that nobody has drawn from since the worker was seeded is as it will be when another worker
is seeded like it. An error of ``state_dict`` is a note too. Nobody may ever ask for it: the batch is none the worse.

The first answer of an epoch also brings from where the worker began.
"""

from __future__ import annotations

from typing import Any

from ..marshalling import exceptions
from ..marshalling.exceptions import PackedException
from . import internals
from .generators import GeneratorStates
from .messages import Snapshot
from .plain_data import copy_of_state, is_stateful


class SnapshotRecorder:
    """What a worker tells of an epoch. ``copies``: states are copied, because the message that brings them does not."""

    def __init__(self, kind: int, every: int, generators: GeneratorStates | None, copies: bool) -> None:
        self._kind = kind
        self._every = every
        self._generators = generators
        self._copies = copies
        self._dataset: Any = None
        self._fetcher: Any = None
        self._with_dataset = self._with_iterator = False
        self._moved = False
        self._error: tuple[str, PackedException] | None = None
        #: Whether there is anything to tell.
        self.has_state = False

    def begin(self, dataset: Any, fetcher: Any) -> None:
        """These are what the epoch's batches are made of."""
        self._dataset, self._fetcher = dataset, fetcher
        iterator = getattr(fetcher, "dataset_iter", None)
        self._with_iterator = self._kind == internals.ITERABLE and is_stateful(iterator)
        self._with_dataset = is_stateful(dataset) and dataset is not iterator
        self.has_state = self._with_dataset or self._with_iterator or self._generators is not None

    def is_due(self, batches: int) -> bool:
        """Whether the worker's batch of this number brings a note, if there is anything to tell."""
        return bool(self._every) and batches % self._every == 0

    def capture_dataset(self, batches: int) -> Snapshot:
        """From where the worker would go on now. Raises what ``state_dict`` raises."""
        now = Snapshot(batches, captured_at=batches, ended=bool(getattr(self._fetcher, "ended", False)))
        if self._with_iterator:
            now.iterator = self._apart(self._fetcher.dataset_iter.state_dict())
        if self._with_dataset:
            now.dataset = self._apart(self._dataset.state_dict())
        return now

    def capture(self, batches: int) -> Snapshot:
        """The same, with the generators of random numbers; what ``state_dict`` raises is in it."""
        try:
            now = self.capture_dataset(batches)
        except Exception as error:
            now = Snapshot(batches, captured_at=batches, error=self._packed(error))
        if self._generators is not None:
            now.rng = self._generators.changed()
        return now

    def is_redundant(self, after: Snapshot) -> bool:
        """Whether a worker that is made anew would be there too, but for the sampler: then it is not worth a word.

        Not of an iterable dataset: there it tells how far the worker has come.
        """
        self._moved = self._moved or after.rng is not None
        return not (self._moved or self._with_dataset or self._kind == internals.ITERABLE)

    def _packed(self, error: Exception) -> PackedException:
        """The same error as before is not packed again: it may come with each batch."""
        text = repr(error)
        if self._error is None or self._error[0] != text:
            self._error = text, exceptions.pack(error)
        return self._error[1]

    def _apart(self, state: Any) -> Any:
        return copy_of_state(state) if self._copies else state
