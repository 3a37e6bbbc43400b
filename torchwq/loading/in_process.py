"""An iterator without workers: torch's own, which can also capture its state and begin from one.

Nothing is drawn ahead. So a batch needs no snapshot, and the state is that of the dataset, its iterator and the sampler
as they are. Going on from a state leaves torch's global generator as it was, unless the dataset sets it when it is
given its state: the generator is the training's.
"""

from __future__ import annotations

import time
from typing import Any

from . import generators, internals, sampler_rng
from .plain_data import copy_of_state
from .sampler_cursor import SamplerCursor, skip
from .snapshots import SnapshotRecorder
from .state import State
from .statistics import StatsCollector


class InProcessIterator(internals.SingleProcessIterator):  # type: ignore[misc]
    """What ``iter(loader)`` gives for ``num_workers=0``."""

    def __init__(self, loader: Any, stats: StatsCollector, resume: State | None = None) -> None:
        self._stats = stats
        self._loader_generator = loader.generator
        self.finished = False
        #: How many indices failed before the last batch, and how many after it.
        self._failed = self._failing = 0
        #: None until the first index is drawn.
        self._sampler_rng: sampler_rng.SamplerRng | None = None
        self._cursor = SamplerCursor(loader._index_sampler)
        if resume is not None:
            self._give_state_to_dataset(loader.dataset, resume)
            if resume.begins:
                sampler_rng.restore_own(loader._index_sampler, loader.generator, resume.draws)
                self._cursor.restore_source(resume.sampler)
        if resume is None or (resume.begins and sampler_rng.is_current(resume.draws)):
            sampler = loader._index_sampler
            if sampler_rng.draws_when_iterated(sampler):
                self._sampler_rng = sampler_rng.capture(sampler, loader.generator)
            super().__init__(loader)
            self._cursor.begin(self._sampler_iter)
        else:
            self._resume(loader, resume)
        self._sampler_iter: Any = self._cursor.indices
        stats.start()

    def _resume(self, loader: Any, resume: State) -> None:
        # Nothing was drawn yet, and the dataset may have set the global generator to what it was.
        undrawn = "digest" in resume.draws and sampler_rng.is_current(resume.draws)
        with generators.fork_torch_rng():
            super().__init__(loader)
        if resume.begins:
            resume = resume.at_beginning()
        self._base_seed = resume.base_seed
        self._num_yielded = resume.yielded
        if undrawn:
            sampler_rng.restore_own(self._index_sampler, loader.generator, resume.draws)
            self._cursor.resume(resume.sampler, 0)
        else:
            self._sampler_rng = sampler_rng.SamplerRng.of(resume.draws)
            self._failed = resume.position - resume.yielded - len(resume.pending or ())
            iterable = self._dataset_kind == internals.ITERABLE
            with sampler_rng.replaying(self._index_sampler, loader.generator, resume.draws):
                position = 0 if iterable else resume.position
                self._cursor.resume(resume.sampler, position, resume.pending or (), draws_next=not iterable)
        self._give_state_to_samples(resume, loader.batch_size or 1)

    def _give_state_to_dataset(self, dataset: Any, resume: State) -> None:
        snapshot = resume.snapshots[0]
        if snapshot.dataset is not None:
            dataset.load_state_dict(copy_of_state(snapshot.dataset))
        if resume.begins and snapshot.iterator is not None:
            iter(dataset).load_state_dict(copy_of_state(snapshot.iterator))

    def _give_state_to_samples(self, resume: State, batch_size: int) -> None:
        samples, snapshot = getattr(self._dataset_fetcher, "dataset_iter", None), resume.snapshots[0]
        if samples is None:
            return
        if snapshot.iterator is not None:
            samples.load_state_dict(copy_of_state(snapshot.iterator))
        elif snapshot.dataset is None:
            skip(samples, resume.yielded * batch_size)
        if snapshot.ended:
            self._dataset_fetcher.ended = True

    @property
    def has_finished(self) -> bool:
        """Whether its epoch has ended."""
        return self.finished

    def _next_data(self) -> Any:
        if self._sampler_rng is None:
            self._sampler_rng = sampler_rng.capture(self._index_sampler, self._loader_generator)
        stats = self._stats
        began, cpu = time.perf_counter_ns(), time.process_time_ns()
        try:
            data = super()._next_data()
        except StopIteration:
            self.finished = True
            stats.stop()
            raise
        except Exception:
            self._failing += 1
            raise
        stats.waited += time.perf_counter_ns() - began
        stats.processor += time.process_time_ns() - cpu
        stats.handed_out()
        if self._failing:
            self._failed, self._failing = self._failed + self._failing, 0
        return data

    def capture(self) -> State:
        """From where the loader can go on after the batch that was handed out last. Raises what ``state_dict`` does."""
        cursor, draws = self._cursor, self._draws()
        recorder = SnapshotRecorder(self._dataset_kind, 1, None, copies=True)
        recorder.begin(self._dataset, self._dataset_fetcher)
        cursor.start()
        return State(
            iterable=self._dataset_kind == internals.ITERABLE,
            num_workers=0,
            base_seed=self._base_seed,
            yielded=self._num_yielded,
            position=self._num_yielded + self._failed + len(cursor.pending),
            finished=self.finished,
            begins=self.finished,
            draws=draws,
            sampler=cursor.end() if self.finished else cursor.state() if cursor.may_have_state else None,
            snapshots=[recorder.capture_dataset(self._num_yielded)],
            active=[True],
            pending=list(cursor.pending) or None,
        )

    def _draws(self) -> dict[str, Any]:
        if self._sampler_rng is not None:
            return self._sampler_rng.to_plain()
        return sampler_rng.draws_of_next_epoch(self._index_sampler, self._loader_generator, base_seed=False)
