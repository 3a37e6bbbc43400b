"""One pass, or with persistent workers all passes, over a loader's batches.

torch's ``_MultiProcessingDataLoaderIter`` is the model for everything a user can see: when it draws an index from the
sampler, which worker gets it, and that it sends the next index before it returns a batch or raises its failure. But
there is no result queue. Each worker has a connection of its own and answers in order, so the next batch is the next
message of the worker whose turn it is. Early batches wait in their socket, and no thread moves them.

The ``dispatcher`` draws indices and gives them to workers, the ``worker_pool`` receives the answers, ``progress`` knows
the state.

Invariants:

* After a death without a restart, and after ``close``, nothing is in flight and no process is left.
* An interruption of ``next`` or ``_reset``, such as Ctrl-C, may have come between a message and its count. So it closes
  the iterator; the loader's next epoch has a new one.
* ``__del__`` ends it, as no other object of torchwq. ``weakref.finalize`` would keep what closing needs, and so the
  sampler, the dataset and the collation. In a subclass these are often methods of the loader, and a loader with
  persistent workers has this iterator: it would never be garbage.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from torch.utils.data import IterableDataset

from .. import tracebacks, warning
from ..marshalling import exceptions
from ..memory import recycling, state_lock
from ..transport import reactor
from ..transport.fork import closed_in_child
from ..transport.waiting import cores
from ..workers import shutdown
from ..workers.backend import find
from . import generators, internals, sampler_rng
from .autoscaling import Autoscaler
from .config import LoaderConfig, WorkerConfig
from .dispatcher import Dispatcher
from .messages import Answer, Batch, End, Failure, Snapshot
from .plain_data import is_stateful
from .progress import Progress
from .state import State
from .statistics import StatsCollector
from .worker_handle import WorkerHandle
from .worker_pool import SHORT_END_TIMEOUT, WorkerPool


class Iterator(internals.BaseIterator):  # type: ignore[misc]
    """What ``iter(loader)`` gives.

    Args:
        loader: the DataLoader.
        stats: the loader's counts.
        resume: where to go on; None for the beginning.
    """

    def __init__(self, loader: Any, stats: StatsCollector, resume: State | None = None) -> None:
        self._handles: list[WorkerHandle] = []
        self._closed, self._begun = True, False  # there is nothing to close yet
        self._stats = stats
        self._backend = find(loader.backend)
        #: Each further use raises this.
        self._broken: Exception | None = None
        #: Answers that ``capture`` has received ahead of their turn.
        self._received_early: deque[tuple[WorkerHandle, Any]] = deque()
        #: Whether workers go on from the end of an epoch, as persistent ones do.
        self._continues_workers = resume is not None and resume.finished and loader.persistent_workers
        draws = self._begin_as_torch(loader, resume)
        if loader.prefetch_factor <= 0:
            raise AssertionError("prefetch_factor must be greater than 0 for a loader with workers")
        #: Whether the dataset or its iterator may have a state.
        self._has_dataset_state = is_stateful(self._dataset) or internals.may_have_state(
            self._dataset_kind, self._dataset
        )
        self._config = LoaderConfig.from_loader(self, loader, stats)
        max_workers = loader._max_workers
        self._autoscaler: Autoscaler | None = None
        if max_workers > self._num_workers:
            self._autoscaler = Autoscaler(stats, self._config.counters, max_workers, cores())
        self._dispatcher = Dispatcher(loader, self._handles, max_workers > self._num_workers, self._pin_memory)
        needs_replay = self._dataset_kind != internals.ITERABLE and self._config.snapshot_every != 1
        needs_replay = needs_replay and (self._has_dataset_state or self._config.saves_rng)
        self._progress = Progress(self._handles, self._dispatcher, self._persistent_workers, needs_replay)
        self._pool = WorkerPool(self._handles, self._dispatcher, self._config, loader, stats)
        self._closed = False
        try:
            snapshots = None
            if resume is not None and (self._continues_workers or not resume.begins):
                snapshots = resume.snapshots
            for worker_id in range(self._num_workers):
                self._start_worker(worker_id, snapshots[worker_id] if snapshots else Snapshot())
            internals.new_shared_seed(self._dataset, loader.generator, self._pg)  # torch draws one more here
            if self._pin_memory:
                self._pool.pin(self._pin_memory_device)
            self._begin(resume, draws)
            self._begun = True
            _open.add(self)
            closed_in_child(self)
        except BaseException as error:
            self.close()
            tracebacks.trim(error)
            raise error

    def _begin_as_torch(self, loader: Any, resume: State | None) -> dict[str, Any] | None:
        """torch's own beginning, which draws a seed for the workers. Returns what the sampler draws again, if anything.

        If ``resume`` says what was drawn, this draws nothing, unless ``resume`` is the beginning of an epoch and the
        global generator is still as it was.
        """
        draws = None
        if resume is not None:
            if resume.begins:
                sampler_rng.restore_own(loader._index_sampler, loader.generator, resume.draws)
            if not resume.begins or not sampler_rng.is_current(resume.draws):
                draws = resume.draws
        with generators.fork_torch_rng() if draws is not None or self._continues_workers else contextlib.nullcontext():
            super().__init__(loader)
        if resume is not None and (self._continues_workers or not resume.begins):
            self._base_seed = resume.base_seed
            sampler_rng.restore_own(loader._index_sampler, loader.generator, resume.draws)  # torch has drawn from them
        elif draws is not None:
            self._base_seed = draws.get("base_seed", self._base_seed)
        return draws

    def _start_worker(self, worker_id: int, resume: Snapshot) -> WorkerHandle:
        worker_config = WorkerConfig(worker_id, self._num_workers, self._shared_seed, resume, self._continues_workers)
        return self._pool.start_worker(worker_config)

    # Epochs

    def _reset(self, loader: Any, first_iter: bool = False) -> None:
        """A persistent iterator's next epoch. (torch calls this.)"""
        if self._broken is not None:
            raise _without_frames(self._broken)
        try:
            self._IterableDataset_len_called = loader._IterableDataset_len_called
            if self._dispatcher.begin_prefetched_epoch():
                self._progress.begin_prefetched_epoch()
                self._num_yielded, self._finished = 0, False
                self._stats.start()
                return
            self._shared_seed = internals.new_shared_seed(self._dataset, loader.generator, self._pg)
            self._receive_stale()
            while self._received_early:
                self._received_early.popleft()[0].consumed()
            self._dispatcher.abandon()
            for worker in self._handles:
                worker.begin_epoch(self._shared_seed)
            self._begin(None, None)
        except BaseException as error:
            if not isinstance(error, Exception):
                self._abort(error)
            raise

    def _begin(self, resume: State | None, draws: dict[str, Any] | None) -> None:
        self._stats.start()
        goes_on = resume is not None and not resume.begins
        self._num_yielded = resume.yielded if resume is not None and goes_on else 0
        self._finished = False
        rng_may_differ = self._config.saves_rng and (self._begun or self._continues_workers)
        self._progress.begin(resume, starts_unknown=not goes_on and (self._has_dataset_state or rng_may_differ))
        self._dispatcher.begin(resume, draws)
        self._sampler_iter = self._dispatcher.current.cursor.indices

    def _receive_stale(self) -> None:
        """Wait for the stale answers of earlier epochs, as torch's loader does.

        ``abandon_tasks`` relies on it: LIMIT is one number, for one abandoned epoch.
        """
        for worker in self._handles:
            while worker.stale:
                found = self._receive(worker)
                if found is not None:
                    self._received_early.append(found)

    # Batches

    def __next__(self) -> Any:
        if internals.is_profiled():
            return super().__next__()
        data = self._next_data()
        self._num_yielded += 1
        if self._IterableDataset_len_called is not None and self._num_yielded > self._IterableDataset_len_called:
            _warn_of_length(self._dataset, self._IterableDataset_len_called, self._num_yielded)
        return data

    def _next_data(self) -> Any:
        if self._broken is not None:
            shutdown.block_daemon_at_exit()
            raise _without_frames(self._broken)
        try:
            data = self._next_batch()
            self._stats.handed_out()
            return data
        except Exception as error:
            shutdown.block_daemon_at_exit()
            tracebacks.trim(error)
            raise error
        except BaseException as error:
            self._abort(error)
            tracebacks.trim(error)
            raise error

    def _next_batch(self) -> Any:
        dispatcher, progress = self._dispatcher, self._progress
        while True:
            in_flight = dispatcher.in_flight
            if not in_flight or in_flight[0].epoch is not dispatcher.current:
                self._finished = True
                self._stats.stop()
                if not self._persistent_workers:
                    self.close()
                raise StopIteration
            found = self._received_early.popleft() if self._received_early else self._receive(in_flight[0].worker)
            if found is None:
                continue
            worker, answer = found
            task = dispatcher.take(worker)
            worker.consumed()
            if progress.unknown_starts:
                progress.record_start(worker, answer)
            if type(answer) is Failure:
                progress.fail(task, answer.after)
                dispatcher.dispatch_next()
                try:
                    raise _error_of(answer, f"{self._backend.name} {worker.worker_id}")
                finally:
                    del found, answer  # they have a thread's error, whose traceback keeps this frame
            if type(answer) is End:
                worker.snapshot = answer.after or Snapshot()
                worker.active = False
                dispatcher.dispatch_next()
                continue
            progress.hand_out(task, answer)
            dispatcher.dispatch_next()
            if self._autoscaler is not None and not dispatcher.sampler_ended:
                self._grow(self._autoscaler)
            return answer.data if type(answer) is Batch else answer

    def _receive(self, worker: WorkerHandle) -> tuple[WorkerHandle, Any] | None:
        """Receive the next answer: ``worker``'s, if batches come in order. None if it is stale."""
        deadline = time.monotonic() + self._timeout if self._timeout > 0 else None
        try:
            return self._pool.receive(worker, deadline)
        except Exception as error:
            if isinstance(error, TimeoutError) and deadline is not None and time.monotonic() >= deadline:
                late = self._pool.describe_late_workers()
                raise RuntimeError(f"DataLoader timed out after {self._timeout} seconds{late and ': '}{late}") from None
            # A worker has died; or descriptors have run out, or a signal handler has raised: a message may be lost.
            self._abort(error)
            raise

    def _grow(self, autoscaler: Autoscaler) -> None:
        """Add as many workers as the autoscaler says, as long as there are indices for them."""
        if not autoscaler.is_due(self._num_yielded):
            return
        for _ in range(autoscaler.workers_to_add(self._handles)):
            if self._dispatcher.sampler_ended:
                break
            self._num_workers += 1
            worker = self._start_worker(len(self._handles), Snapshot())
            self._stats.workers = self._num_workers
            self._dispatcher.feed(worker)
        if autoscaler.has_ended:
            self._autoscaler = None
            self._dispatcher.stop_growing()
        self._dispatcher.flush()

    # State and end

    def capture(self) -> State:
        """The state after the batch that was handed out last."""
        if self._closed:
            return self._last_state
        in_flight = self._dispatcher.in_flight
        while self._progress.unknown_starts and not self._finished and len(self._received_early) < len(in_flight):
            found = self._receive(in_flight[len(self._received_early)].worker)
            if found is not None:
                if not isinstance(found[1], Answer):
                    self._progress.unknown_starts.clear()  # the workers have no state
                self._progress.record_start(*found)
                self._received_early.append(found)
        return self._capture()

    def _capture(self) -> State:
        return self._progress.capture(self._base_seed, self._num_yielded, self._finished)

    def _abort(self, error: BaseException) -> None:
        """Close it, and let each further use say why."""
        if isinstance(error, Exception):
            self._broken = _without_frames(error)
        else:
            self._broken = RuntimeError(
                f"{type(error).__name__} has interrupted this iterator of a DataLoader, and its workers were ended: "
                f"begin again with iter(loader)"
            )
        recycling.expire_in_flight()
        self._close(self._pool.end_in_background)

    def close(self) -> None:
        """End the workers, and wait until they have finished what they are doing. May be called again."""
        self._close(self._pool.end)

    def close_at_exit(self) -> None:
        """End the workers at the interpreter's exit. As with torch's loader, only persistent ones may finish."""
        if self._persistent_workers and not shutdown.interrupted():
            self.close()
        else:
            self._close(lambda: self._pool.end(SHORT_END_TIMEOUT))

    def _close(self, end: Callable[[], None]) -> None:
        if self._closed:
            return
        if self._begun:
            self._last_state = self._stats.state = self._capture()
            self._last_state.is_drawn_ahead = False  # what was drawn ahead is lost
        self._closed = True
        self._stats.stop()
        self._dispatcher.in_flight = deque()
        end()

    def abandon(self) -> None:
        """In a forked child: the workers are the parent's."""
        self._closed = True
        self._broken = RuntimeError(
            "this iterator of a DataLoader was made before a fork and belongs to the parent process: make one here"
        )

    @property
    def has_finished(self) -> bool:
        """Whether its epoch has ended."""
        return self._finished

    @property
    def is_closed(self) -> bool:
        """Whether no more batches can come from it, in this epoch or another."""
        return self._closed

    #: torch's name of ``close``, which frameworks call.
    _shutdown_workers = close

    @property
    def _workers(self) -> list[Any]:
        """torch's name of the workers, which programs use. They have the methods of ``multiprocessing.Process``."""
        return [worker.process.handle for worker in self._handles]

    def __del__(self) -> None:
        if self._closed or sys.is_finalizing():
            return
        # Garbage is collected at any time, in any thread. ``close`` waits for other threads, so a thread for which they
        # may wait must not call it.
        receives = threading.current_thread().name.startswith("torchwq-ray")
        busy = self._pool.is_in_own_thread or state_lock.is_locked_by_this_thread() or receives
        if busy or reactor.get().is_in_current_thread:
            threading.Thread(target=self.close, name="torchwq-close", daemon=True).start()
        else:
            self.close()


_open: weakref.WeakSet[Iterator] = weakref.WeakSet()


def _close_all() -> None:
    """At exit, before multiprocessing waits for its children."""
    for iterator in list(_open):
        iterator.close_at_exit()


shutdown.at_close(_close_all)


def _error_of(failure: Failure, worker: str) -> BaseException:
    error = exceptions.unpack(failure.error)
    exceptions.add_note(error, f"in DataLoader worker {worker}, {failure.where}")
    return error


def _without_frames(error: Exception) -> Exception:
    """A copy of ``error`` without traceback, whose frames would keep the iterator."""
    try:
        return copy.copy(error)
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def _warn_of_length(dataset: Any, promised: int, yielded: int) -> None:
    if isinstance(dataset, IterableDataset):
        warning.warn(
            f"Length of IterableDataset {dataset} was reported to be {promised}(when accessing len(dataloader)), but "
            f"{yielded} samples have been fetched. For multiprocessing data-loading, this could be caused by not "
            f"properly configuring the IterableDataset replica at each worker. Please see "
            f"https://pytorch.org/docs/stable/data.html#torch.utils.data.IterableDataset for examples."
        )
