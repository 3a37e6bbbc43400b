"""Makes a worker's batches, from the beginning of an epoch or from a snapshot.

It follows torch's ``_worker_loop`` step by step where users can see it: seeds, ``get_worker_info``, ``worker_init_fn``,
fetchers. A failure is an answer, and the worker goes on with the next index.

Invariants:

* Each index gets exactly one answer. What ``worker_init_fn`` or the beginning of an epoch raises is the first answer.
* The first answer of an epoch has the snapshot from before it, if the worker has a state.
"""

from __future__ import annotations

import contextlib
import copy
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .. import tracebacks
from . import collation, internals
from .config import LoaderConfig, WorkerConfig
from .counters import COLLATE
from .failure_place import describe_failure_place
from .generators import GeneratorStates, set_generators
from .messages import Batch, End, Failure, Snapshot
from .sampler_cursor import skip
from .slow_samples import SlowSamples
from .snapshots import SnapshotRecorder


class _Timed:
    """A collate function whose time is counted in a worker's words."""

    __slots__ = ("_function", "_words")

    def __init__(self, function: Callable[[Any], Any], words: memoryview) -> None:
        self._function = function
        self._words = words

    def __call__(self, samples: Any) -> Any:
        began = time.perf_counter_ns()
        try:
            return self._function(samples)
        finally:
            self._words[COLLATE] += time.perf_counter_ns() - began


class BatchMaker:
    """Makes the batches of one worker: of this process, or, ``in_thread``, of this thread.

    Args:
        config, worker_config: the configuration of all workers, and of this one.
        limit: how many bytes a message with a batch may have.
    """

    def __init__(self, config: LoaderConfig, worker_config: WorkerConfig, in_thread: bool, limit: int) -> None:
        self._config = config
        self._worker_config = worker_config
        self._in_thread = in_thread
        self._limit = limit
        collate_fn = collation.for_worker(config.collate_fn, in_thread=in_thread)
        #: The native part's, if it collates.
        self._collation = collate_fn if isinstance(collate_fn, collation.Collation) else None
        words = config.counters.of(worker_config.worker_id)
        self._collate_fn = _Timed(collate_fn, words)
        self._dataset = config.dataset
        self.slow_samples = SlowSamples(words)
        #: Whether samples can be told from one another.
        self._times_samples = False
        self._fetcher: Any = None
        self._recorder = SnapshotRecorder(config.kind, config.snapshot_every, None, copies=False)
        #: An error from before the first index.
        self._error: Exception | None = None
        self._ended = False
        self._batches = 0
        #: The snapshot from the beginning of this epoch, for the first answer.
        self._before: Snapshot | None = None

    def set_up(self) -> None:
        """Make this process, or thread, a worker, and begin at its snapshot.

        Threads share random number generators, and the dataset's data, but not its attributes.
        """
        config, worker_config = self._config, self._worker_config
        worker_id, seed = worker_config.worker_id, config.base_seed + worker_config.worker_id
        if self._in_thread:
            with contextlib.suppress(Exception):
                self._dataset = copy.copy(config.dataset)
        else:
            torch.set_num_threads(1)
            random.seed(seed)
            torch.manual_seed(seed)
            np.random.seed(internals.numpy_seed(config.base_seed, worker_id))
        collation.install(in_thread=self._in_thread)
        self._dataset = internals.seeded(self._dataset, worker_config.shared_seed)
        internals.set_worker_info(worker_id, worker_config.num_workers, seed, self._dataset, in_thread=self._in_thread)
        try:
            if config.init_fn is not None:
                config.init_fn(worker_id)
            generators = GeneratorStates() if config.saves_rng and not self._in_thread else None
            self._recorder = SnapshotRecorder(config.kind, config.snapshot_every, generators, copies=self._in_thread)
            resume = copy.deepcopy(worker_config.resume) if self._in_thread else worker_config.resume
            self._resume(resume, worker_config.begins)
        except Exception as error:
            self._error = error

    def begin_epoch(self, shared_seed: int | None) -> None:
        """Iterate anew. ``shared_seed`` is for datapipes."""
        self._dataset = internals.seeded(self._dataset, shared_seed)
        try:
            self._make_fetcher()
            self._capture_beginning()
        except Exception as error:
            self._error = error

    def make(self, index: Any) -> Any:
        """The answer to an index: a ``messages.Answer``; only the batch if there is nothing else to say, perhaps as a
        message."""
        try:
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            if self._ended:
                raise StopIteration
            fetch = self._fetcher.fetch
            if self._times_samples:
                data = self.slow_samples.fetch(fetch, index, is_batch=self._config.auto_collation)
            else:
                data = fetch(index)
        except StopIteration as stop:
            if self._config.kind != internals.ITERABLE:
                return self.failure(stop, index)
            self._ended = True
            return End(after=self._snapshot(), before=self._pop_before())
        except Exception as error:
            return self.failure(error, index)
        self._batches += 1
        recorder = self._recorder
        if not recorder.has_state:
            return data
        after = recorder.capture(self._batches) if recorder.is_due(self._batches) else None
        if self._before is None and (after is None or recorder.is_redundant(after)):
            return data
        return Batch(data, after=after, before=self._pop_before())

    def failure(self, error: Exception, index: Any) -> Failure:
        """The answer to an index whose batch could not be made or sent, because of ``error``."""
        after = self._recorder.capture(self._batches) if self._recorder.has_state else None
        place = describe_failure_place(error, index)
        return Failure(tracebacks.trim(error), place, after=after, before=self._pop_before())

    def _pop_before(self) -> Snapshot | None:
        before, self._before = self._before, None
        return before

    def _snapshot(self) -> Snapshot:
        if self._recorder.has_state:
            return self._recorder.capture(self._batches)
        return Snapshot(self._batches, ended=bool(getattr(self._fetcher, "ended", False)))

    def _make_fetcher(self) -> None:
        config = self._config
        self._fetcher = internals.make_fetcher(
            config.kind, self._dataset, config.auto_collation, self._collate_fn, config.drop_last
        )
        at_once = getattr(self._dataset, "__getitems__", None)
        self._times_samples = config.kind != internals.ITERABLE and not (config.auto_collation and at_once)
        self.slow_samples.begin_epoch()
        self._ended = False
        self._batches = 0

    def _capture_beginning(self) -> None:
        self._recorder.begin(self._dataset, self._fetcher)
        self._before = self._recorder.capture(self._batches) if self._recorder.has_state else None
        if self._collation is not None:  # a batch goes beside its state, if there is one
            self._collation.limit = 0 if self._recorder.has_state else self._limit

    def _resume(self, resume: Snapshot, begins: bool) -> None:
        """Go on from a snapshot; with ``begins``, it is the end of an epoch, and the next one begins."""
        if resume.dataset is not None:
            self._dataset.load_state_dict(resume.dataset)
        if not begins or resume.iterator is not None or resume.replay:
            self._make_fetcher()
        iterator: Any = getattr(self._fetcher, "dataset_iter", None)
        if resume.iterator is not None:
            iterator.load_state_dict(resume.iterator)
        elif not begins and self._config.kind == internals.ITERABLE and resume.dataset is None:
            # A dataset without a state is iterated again up to the snapshot.
            if resume.rng is None:
                resume.captured_at = resume.batches
            samples = self._config.batch_size if self._config.auto_collation and self._config.batch_size else 1
            skip(iterator, resume.captured_at * samples)
        if resume.rng is not None and not self._in_thread:
            set_generators(resume.rng)
        if not begins or resume.replay:
            self._replay(resume)
        if begins:
            self._make_fetcher()
        self._capture_beginning()

    def _replay(self, resume: Snapshot) -> None:
        """Make and drop the batches that were made after the rest of the snapshot was captured."""
        self._batches = resume.batches
        if resume.ended:
            self._fetcher.ended = True
        indices = resume.replay
        if indices is None and self._config.kind == internals.ITERABLE:
            size = self._config.batch_size if self._config.auto_collation else None
            indices = [None if size is None else [None] * size] * (resume.batches - resume.captured_at)
        for index in indices or ():
            with contextlib.suppress(Exception):  # the consumer has it already, or will get it
                self._fetcher.fetch(index)
