"""Captures a worker's snapshots, which it sends with its batches.

A snapshot has ``state_dict()`` of the dataset and its iterator, if they have ``load_state_dict`` too. If the loader
saves them, it also has the states of random number generators, but only of those that were drawn from since the worker
was seeded: another worker is seeded in the same way. An error of ``state_dict`` goes into the snapshot, because it
does not harm the batch: only the loader's ``state_dict`` raises it.
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
    """Captures one worker's snapshots. ``copies``: it copies states, because the message does not."""

    def __init__(self, kind: int, every: int, generators: GeneratorStates | None, copies: bool) -> None:
        self._kind = kind
        self._every = every
        self._generators = generators
        self._copies = copies
        self._dataset: Any = None
        self._fetcher: Any = None
        self._with_dataset = self._with_iterator = False
        self._rng_changed = False
        self._error: tuple[str, PackedException] | None = None
        #: Whether snapshots have anything in them.
        self.has_state = False

    def begin(self, dataset: Any, fetcher: Any) -> None:
        """The epoch's batches are made of these."""
        self._dataset, self._fetcher = dataset, fetcher
        iterator = getattr(fetcher, "dataset_iter", None)
        self._with_iterator = self._kind == internals.ITERABLE and is_stateful(iterator)
        self._with_dataset = is_stateful(dataset) and dataset is not iterator
        self.has_state = self._with_dataset or self._with_iterator or self._generators is not None

    def is_due(self, batches: int) -> bool:
        """Whether the worker's batch of this number has a snapshot, if there is a state."""
        return bool(self._every) and batches % self._every == 0

    def capture_dataset(self, batches: int) -> Snapshot:
        """The present snapshot, without random number generators. Raises what ``state_dict`` raises."""
        now = Snapshot(batches, captured_at=batches, ended=bool(getattr(self._fetcher, "ended", False)))
        if self._with_iterator:
            now.iterator = self._copied(self._fetcher.dataset_iter.state_dict())
        if self._with_dataset:
            now.dataset = self._copied(self._dataset.state_dict())
        return now

    def capture(self, batches: int) -> Snapshot:
        """The same with random number generators, and with what ``state_dict`` raises."""
        try:
            now = self.capture_dataset(batches)
        except Exception as error:
            now = Snapshot(batches, captured_at=batches, error=self._packed(error))
        if self._generators is not None:
            now.rng = self._generators.changed()
        return now

    def is_redundant(self, after: Snapshot) -> bool:
        """Whether a new worker would have the same state, so that the snapshot need not be sent.

        A snapshot of an iterable dataset is needed, because it says how far the worker has come.
        """
        self._rng_changed = self._rng_changed or after.rng is not None
        return not (self._rng_changed or self._with_dataset or self._kind == internals.ITERABLE)

    def _packed(self, error: Exception) -> PackedException:
        """Pack an error, unless it is the same as before: it may come with each batch."""
        text = repr(error)
        if self._error is None or self._error[0] != text:
            self._error = text, exceptions.pack(error)
        return self._error[1]

    def _copied(self, state: Any) -> Any:
        return copy_of_state(state) if self._copies else state
