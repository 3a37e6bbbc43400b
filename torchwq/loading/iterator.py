"""One pass, or with persistent workers all passes, over a loader's batches.

torch's ``_MultiProcessingDataLoaderIter`` is the model for everything a user can see: when an index is drawn from the
sampler, which worker it goes to, that the next index is sent before a batch is handed out or its failure raised. What
differs is below that. There is no result queue: each worker has a connection of its own, and since each answers in
order, the next batch is simply the next message of the worker whose turn it is. Batches that are early wait in their
socket, not in a dictionary; no thread moves anything.

Invariants:

* ``_turns`` has one entry for each index under way, in the order in which batches are handed out; each worker's
  ``tasks`` has the same indices, in the order in which that worker answers.
* A worker's ``received`` is the state after the last answer of this epoch that was taken, so also after the last one
  before a death, which is heard of when everything before it was taken.
* After a death that is not restarted, and after ``close``, nothing is under way and no process is left.
* What interrupts ``next`` or ``_reset`` in any other place than a user's code, Ctrl-C above all, may have come between
  a message and its count. So it closes the iterator; the loader's next epoch has a new one.
* It ends by ``__del__``, as nothing else does in torchwq. ``weakref.finalize`` would keep what closing needs, and with
  it the sampler, the dataset and the collation. Those of a subclass are often methods of the loader, and a loader with
  persistent workers has this iterator: it would never be garbage.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from .. import warning
from ..marshalling import exceptions
from ..memory import recycling
from ..transport import reactor
from ..transport.process import closed_in_child
from ..workers import shutdown
from ..workers.backend import Backend
from . import internals, sampler_rng, state, worker_pool
from .autoscaling import Autoscaler
from .counters import Counters
from .messages import Batch, End, Failure, NewEpoch, Snapshot
from .pinning import Pinner
from .plain import after, is_stateful, taken
from .result_receiver import ResultReceiver
from .sampler_cursor import SamplerCursor, SamplerState
from .sampler_rng import SamplerRng
from .statistics import StatsCollector
from .worker_loop import LoaderConfig, WorkerConfig, describe_index
from .worker_pool import Gone, WorkerHandle

log = logging.getLogger("torchwq")

#: Seconds that workers may take to end by themselves when the interpreter ends.
_END_TIMEOUT_AT_EXIT: Final = 0.5
#: The same when a worker has died or Ctrl-C has come, which is to be told at once; a thread waits for longer.
_END_TIMEOUT_AT_ERRORS: Final = 0.5
#: How many indices a worker knows of beyond those for which it may make batches now, where that is no difference to
#: anyone: a message then brings several.
_AHEAD: Final = 8
#: How many batches an automatic number of workers is looked at after.
_AUTOSCALING_PERIOD: Final = 64
#: Stands where a sampler has no more indices.
_NONE_LEFT: Final = object()


@dataclass
class Options:
    """What torch's DataLoader does not have."""

    backend: Backend
    restarts: int = 0
    prefetch_across_epochs: bool = False
    most_workers: int = 0
    cores: int = 1
    snapshots: bool = False
    every: int = 1


@dataclass
class _Ahead:
    """The next epoch's sampler, from which was drawn before this epoch was over, and what it depended on."""

    cursor: SamplerCursor
    draws: SamplerRng
    epoch: Any
    state: SamplerState | None


@dataclass(slots=True)
class _Failed:
    """An index that has failed: whose, and what the worker and the sampler have told with it."""

    worker: WorkerHandle
    index: Any
    after: Snapshot | None
    told: SamplerState | None


class Iterator(internals.BaseIterator):  # type: ignore[misc]
    """What ``iter(loader)`` gives. ``resume`` is a state of ``state.capture``."""

    def __init__(self, loader: Any, options: Options, stats: StatsCollector, resume: state.State | None = None) -> None:
        self._handles: list[WorkerHandle] = []
        self._closed = self._begun = False
        self._stats = stats
        self._pinner: Pinner | None = None
        # What the sampler draws again. A state that stands for the beginning of an epoch may need no such thing.
        self._again: dict[str, Any] | None = None
        #: Whether workers go on from the end of an epoch, as persistent ones do.
        self._goes_on = resume is not None and resume.finished and loader.persistent_workers
        if resume is not None:
            if resume.begins:
                sampler_rng.restore_own(loader._index_sampler, loader.generator, resume.draws)
            if not resume.begins or not sampler_rng.is_current(resume.draws):
                self._again = resume.draws
        with sampler_rng.kept() if self._again is not None or self._goes_on else contextlib.nullcontext():
            super().__init__(loader)
        if resume is not None and (self._goes_on or not resume.begins):
            self._base_seed = resume.base_seed
            sampler_rng.restore_own(loader._index_sampler, loader.generator, resume.draws)  # that was drawn from them
        elif self._again is not None:
            self._base_seed = self._again.get("base_seed", self._base_seed)
        if loader.prefetch_factor <= 0:
            raise AssertionError("prefetch_factor must be greater than 0 for a loader with workers")
        self._prefetch = loader.prefetch_factor
        self._in_order = loader.in_order
        self._loader_generator = loader.generator
        self._options = options
        #: What each further use of it raises.
        self._broken: Exception | None = None
        self._restarts = 0
        # How many indices more than are needed now are drawn, and how many are sent in one message. While the number of
        # workers may grow, none: a new worker would have to wait until what the others know of is done.
        self._can_draw_ahead = (
            self._in_order and not self._pin_memory and internals.can_be_drawn_ahead(self._index_sampler)
        )
        may_grow = options.most_workers > self._num_workers
        bulk = self._can_draw_ahead and not may_grow
        self._ahead_of_need, self._bulk = (_AHEAD, _AHEAD // 2) if bulk else (0, 1)
        self._ahead: _Ahead | None = None
        #: Whether workers may have to tell something of the dataset.
        self._tells = is_stateful(self._dataset) or internals.may_have_state(self._dataset_kind, self._dataset)
        init_fn = internals.sharding_init(self._dataset, loader.worker_init_fn, self._world_size, self._rank)
        most = max(self._num_workers, options.most_workers)
        self._config = LoaderConfig(
            kind=self._dataset_kind,
            dataset=self._dataset,
            auto_collation=self._auto_collation,
            collate_fn=self._collate_fn,
            drop_last=self._drop_last,
            base_seed=self._base_seed,
            init_fn=init_fn,
            batch_size=loader.batch_size,
            snapshots=options.snapshots or options.restarts > 0,
            every=1 if options.restarts else options.every and max(1, options.every // self._num_workers),
            counters=stats.counters(most),
            flow=Counters(most),
            prefetch=self._prefetch,
        )
        #: Whether batches that came without a note need their indices to be made again.
        self._makes_again = (
            self._dataset_kind != internals.ITERABLE
            and self._config.every != 1
            and (self._tells or self._config.snapshots)
        )
        self._autoscaler: Autoscaler | None = None
        if may_grow:
            self._autoscaler = Autoscaler(stats, self._config.counters, options.most_workers, options.cores)
        self._receiver = ResultReceiver(self._handles, self._in_order, stats)
        self._start = worker_pool.starter(loader.multiprocessing_context, self._config, options.backend)
        try:
            for worker_id in range(self._num_workers):
                goes_on = resume is not None and (self._goes_on or not resume.begins)
                self._start_worker(worker_id, resume.snapshots[worker_id] if resume and goes_on else Snapshot())
            # torch draws one more here, although its workers have been given the first.
            internals.new_shared_seed(self._dataset, loader.generator, self._pg)
            if self._pin_memory:
                self._pinner = Pinner(self._receiver, self._pin_memory_device)
            self._begin(resume)
            self._begun = True
            _open.add(self)
            closed_in_child(self)
        except BaseException:
            self.close()
            raise

    def _start_worker(self, worker_id: int, resume: Snapshot) -> WorkerHandle:
        worker_config = WorkerConfig(worker_id, self._num_workers, self._shared_seed, resume, self._goes_on)
        worker = WorkerHandle(self._start, worker_config, self._config.flow.of(worker_id), self._options.backend)
        self._handles.append(worker)
        return worker

    # Epochs

    def _reset(self, loader: Any, first_iter: bool = False) -> None:
        """A persistent iterator's next epoch. (torch calls this.)"""
        if self._broken is not None:
            raise _without_frames(self._broken)
        try:
            self._IterableDataset_len_called = loader._IterableDataset_len_called
            if self._goes_on_ahead():
                return
            self._shared_seed = internals.new_shared_seed(self._dataset, loader.generator, self._pg)
            self._receive_stale()
            self._abandon_tasks()
            for worker in self._handles:
                worker.snapshot = worker.received = Snapshot(random=worker.received.random)
                worker.send(NewEpoch(self._shared_seed))
            self._begin(None)
        except Exception:
            raise
        except BaseException as error:
            self._break_off(error)
            raise

    def _begin(self, resume: state.State | None) -> None:
        self._stats.start()
        self._turns: deque[tuple[WorkerHandle, int]] = deque()
        self._epoch = 0
        self._ahead = None
        self._num_yielded = 0
        self._finished = False
        self._next_hand = 0
        self._sampler_ended = False
        #: What the sampler has told after each index under way, and after the last one whose batch was handed out.
        self._sampler_states: deque[SamplerState | None] = deque()
        self._sampler_state: SamplerState | None = None
        #: What the next epoch of the sampler begins with, once this one is over.
        self._sampler_end: SamplerState | None = None
        #: Answers that were received to learn something, and are to be handed out.
        self._early: deque[tuple[WorkerHandle, Any]] = deque()
        #: Indices that have failed since the last batch, and how many did before.
        self._failures: list[_Failed] = []
        self._failed = 0
        #: Indices that come before the sampler's next.
        self._pending: deque[Any] = deque()
        self._tells_pending = not self._in_order
        for worker in self._handles:
            worker.active = True
        self._cursor = SamplerCursor(self._index_sampler, self._options.every)
        if resume is None or resume.begins:
            self._begin_epoch(resume)
        else:
            self._go_on(resume)

    def _begin_epoch(self, resume: state.State | None) -> None:
        # Those of which nothing is known of where they begin, until their first answer tells it.
        moved = self._config.snapshots and (self._begun or self._goes_on)
        self._unknown = set(self._handles) if self._tells or moved else set()
        if resume is not None:
            self._cursor.restore_source(resume.sampler)
            for worker in self._handles:
                worker.snapshot = Snapshot()
        again, self._again = self._again, None
        self._sampler_rng = (
            sampler_rng.now(self._index_sampler, self._loader_generator) if again is None else SamplerRng.of(again)
        )
        with (
            sampler_rng.again(self._index_sampler, self._loader_generator, again) if again else contextlib.nullcontext()
        ):
            self._cursor.begin()
            self._cursor.start()
            self._begin_walk()

    def _go_on(self, resume: state.State) -> None:
        for worker, active in zip(self._handles, resume.active, strict=True):
            worker.active = active
        self._unknown = set()
        self._next_hand = resume.next_worker
        self._sampler_rng = SamplerRng.of(resume.draws)
        self._pending.extend(resume.pending or ())
        self._tells_pending = self._tells_pending or bool(self._pending)
        self._num_yielded = resume.yielded
        self._failed = resume.position - resume.yielded - len(self._pending)
        with sampler_rng.again(self._index_sampler, self._loader_generator, resume.draws):
            self._cursor.go_on(resume.sampler, 0 if self._dataset_kind == internals.ITERABLE else resume.position)
            self._begin_walk(resume.sampler)

    def _begin_walk(self, resume: SamplerState | None = None) -> None:
        cursor = self._cursor
        self._sampler_iter = after(taken(self._pending), cursor.indices) if self._pending else cursor.indices
        if cursor.watches:
            told = resume is not None and (resume.sampler is not None or resume.iterator is not None)
            self._sampler_state = replace(resume) if resume is not None and told else cursor.state()
        self._prime()

    def _prime(self) -> None:
        for _ in range((self._prefetch + self._ahead_of_need) * len(self._handles)):
            self._put_index()
        self._flush()

    def _flush(self) -> None:
        for worker in self._handles:
            worker.flush()

    def _receive_stale(self) -> None:
        """Wait for what an epoch before this one has left under way.

        ``abandon_tasks`` counts on it: up to which answer a worker still makes batches is one number, for one epoch
        that was broken off. torch's loader waits here for as much.
        """
        source = self._receiver if self._pinner is None else self._pinner
        deadline = time.monotonic() + self._timeout if self._timeout > 0 else None
        while True:
            try:
                source.receive_stale(deadline)
                return
            except Gone as gone:
                dead = gone.worker
            except TimeoutError:
                raise self._timed_out() from None
            self._restart(dead)  # not where Gone is handled: nobody else should see it

    def _abandon_tasks(self) -> None:
        """What is under way will be received and thrown away."""
        for worker, _ in self._early:
            worker.tasks.popleft()
            worker.consumed()
        for worker in self._handles:
            worker.abandon_tasks(self._pinner is None, self._prefetch)
        if self._pinner is not None:
            self._pinner.abandon()

    def _goes_on_ahead(self) -> bool:
        """Begin the epoch whose first batches are under way already, if it is the one that is wanted."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or (self._turns and self._turns[0][1] == self._epoch):
            return False
        if _epoch_of(self._index_sampler) != ahead.epoch:
            return False  # set_epoch was called meanwhile
        self._epoch += 1
        self._sampler_iter, self._sampler_ended = ahead.cursor.indices, False
        self._sampler_rng, self._cursor, self._sampler_state = ahead.draws, ahead.cursor, ahead.state
        self._num_yielded = self._failed = 0
        self._finished = False
        self._stats.start()
        return True

    # Indices

    def _put_index(self) -> None:
        """Draw the next index and send it to the worker whose turn it is."""
        if self._ahead is not None:
            self._put_index_ahead()
            return
        index = next(self._sampler_iter, _NONE_LEFT)
        if index is _NONE_LEFT:
            if not self._sampler_ended:
                self._sampler_ended = True
                self._sampler_end = self._cursor.end()
                self._flush()
                if self._options.prefetch_across_epochs:
                    sampler, cursor = self._index_sampler, SamplerCursor(self._index_sampler, self._options.every)
                    drawn = sampler_rng.now(sampler, self._loader_generator)
                    cursor.begin()
                    self._ahead = _Ahead(cursor, drawn, _epoch_of(sampler), self._sampler_end)
                    self._put_index_ahead()
            return
        if self._cursor.watches:
            self._sampler_states.append(self._cursor.note())
        self._assign(index, self._epoch)

    def _put_index_ahead(self) -> None:
        assert self._ahead is not None
        cursor = self._ahead.cursor
        index = next(cursor.indices, _NONE_LEFT)
        if index is _NONE_LEFT:
            self._flush()
            return
        if cursor.watches:
            self._sampler_states.append(cursor.note())
        self._assign(index, self._epoch + 1)

    def _assign(self, index: Any, epoch: int) -> None:
        count = len(self._handles)
        for _ in range(count):
            worker = self._handles[self._next_hand]
            self._next_hand = (self._next_hand + 1) % count
            if worker.active and (self._in_order or len(worker.tasks) < self._share()):
                break
        else:
            return
        worker.assign(index)
        self._turns.append((worker, epoch))
        worker.flush(self._bulk)
        if self._pinner is not None:
            self._pinner.expect(worker)

    def _share(self) -> int:
        """How many indices a worker may have where order does not matter."""
        return int(self._prefetch * len(self._handles) // max(1, sum(worker.active for worker in self._handles)))

    # Batches

    def __next__(self) -> Any:
        if internals.is_profiled():
            return super().__next__()
        data = self._next_data()
        self._stats.handed_out += 1
        self._num_yielded += 1
        if self._IterableDataset_len_called is not None and self._num_yielded > self._IterableDataset_len_called:
            self._warn_of_length()
        return data

    def _warn_of_length(self) -> None:
        if self._dataset_kind == internals.ITERABLE:
            warning.warn(
                f"Length of IterableDataset {self._dataset} was reported to be {self._IterableDataset_len_called}"
                f"(when accessing len(dataloader)), but {self._num_yielded} samples have been fetched. For "
                f"multiprocessing data-loading, this could be caused by not properly configuring the IterableDataset "
                f"replica at each worker. Please see https://pytorch.org/docs/stable/data.html"
                f"#torch.utils.data.IterableDataset for examples.",
            )

    def _next_data(self) -> Any:
        if self._broken is not None:
            shutdown.hold_daemon()
            raise _without_frames(self._broken)
        try:
            return self._next_batch()
        except Exception:
            shutdown.hold_daemon()
            raise
        except BaseException as error:
            self._break_off(error)
            raise

    def _break_off(self, error: BaseException) -> None:
        """Close it, and let each further use say why."""
        if isinstance(error, Exception):
            self._broken = _without_frames(error)
        else:
            self._broken = RuntimeError(
                f"{type(error).__name__} has interrupted this iterator of a DataLoader, and its workers were ended: "
                f"begin again with iter(loader)"
            )
        recycling.suspect_losses()
        self._close(lambda: worker_pool.end_in_background(self._handles, _END_TIMEOUT_AT_ERRORS))

    def _next_batch(self) -> Any:
        while True:
            if not self._turns or self._turns[0][1] != self._epoch:
                self._finished = True
                self._stats.stop()
                if not self._persistent_workers:
                    self.close()
                raise StopIteration
            worker, answer = self._next_answer()
            told = self._sampler_states.popleft() if self._sampler_states else None
            if type(answer) is Failure:
                self._failures.append(_Failed(worker, self._index, answer.after, told))
                self._put_index()
                try:
                    raise self._error(worker, answer)
                finally:
                    del answer  # a thread's has the error, and so this frame would be kept by it
            if type(answer) is End:
                worker.snapshot = answer.after
                worker.active = False
                self._put_index()
                continue
            if self._failures:
                self._pass_failures()
            if told is not None or self._sampler_state is not None:
                self._hand_out_index(told)
            if type(answer) is Batch:
                self._hand_out(worker, answer)
                answer = answer.data
            else:
                worker.snapshot.batches += 1
                if self._makes_again:
                    self._remember(worker)
                if self._unknown:
                    self._unknown.clear()  # it has nothing to tell
            self._put_index()
            if self._autoscaler is not None and not self._sampler_ended:
                self._grow(self._autoscaler)
            return answer

    def _error(self, worker: WorkerHandle, failure: Failure) -> BaseException:
        error = exceptions.unpack(failure.error)
        kind = self._options.backend.name
        exceptions.add_note(error, f"in DataLoader worker {kind} {worker.worker_id}, {failure.where}")
        return error

    def _next_answer(self) -> tuple[WorkerHandle, Any]:
        """The next batch, and who has made it; restarts a worker that has died, or raises."""
        worker, answer = self._early.popleft() if self._early else self._receive()
        self._index = worker.tasks.popleft()
        worker.consumed()
        self._take_turn(worker)
        if self._unknown:
            self._learn(worker, answer)
        return worker, answer

    def _receive(self) -> tuple[WorkerHandle, Any]:
        """The next answer after those that are here already."""
        deadline = time.monotonic() + self._timeout if self._timeout > 0 else None
        while True:
            try:
                if self._pinner is not None:
                    worker, answer = self._pinner.get(deadline)
                else:
                    worker, received = self._receiver.receive(self._turns[len(self._early)][0], deadline)
                    if received is None:
                        raise TimeoutError
                    answer = self._receiver.unpack(received)
            except Gone as gone:
                dead = gone.worker
            except Exception as error:
                if isinstance(error, TimeoutError) and deadline is not None and time.monotonic() >= deadline:
                    raise self._timed_out() from None
                # Descriptors have run out, or a signal handler has raised it: a message may be lost.
                self._break_off(error)
                raise
            else:
                if type(answer) in (Batch, End, Failure) and answer.after is not None:
                    worker.received = answer.after
                return worker, answer
            self._restart(dead)  # not where Gone is handled: nobody else should see it

    def _timed_out(self) -> RuntimeError:
        late = [self._turns[0][0]] if self._in_order and self._turns else self._handles
        missing = [
            f"worker {worker.worker_id} (pid {worker.process.pid}) has not answered"
            + (f", with {describe_index(worker.tasks[0])} in hand" if worker.tasks else "")
            for worker in late
            if worker.unreceived or worker.tasks
        ]
        told = f": {'; '.join(missing)}" if missing else ""
        return RuntimeError(f"DataLoader timed out after {self._timeout} seconds{told}")

    def _take_turn(self, worker: WorkerHandle) -> None:
        if self._turns[0][0] is worker:
            self._turns.popleft()
        else:
            for position, (other, _) in enumerate(self._turns):
                if other is worker:
                    del self._turns[position]
                    break

    # Workers that die, and workers that are missing

    def _restart(self, worker: WorkerHandle) -> None:
        """Put another worker in the place of one that has died, or raise."""
        death = worker.died()
        if self._restarts >= self._options.restarts or self._closed:
            if self._options.restarts:
                death.args = (f"{death}. It was not restarted: {self._restarts} restarts were allowed (max_restarts)",)
            self._break_off(death)
            try:
                raise death
            finally:
                del death
        self._restarts += 1
        self._stats.restarts += 1
        warning.warn(f"{death}. It is restarted ({self._restarts} of {self._options.restarts})")
        try:
            worker.restart(self._shared_seed)
        except Exception as error:
            self._break_off(error)
            raise
        if self._pinner is not None:
            self._pinner.restarted()

    def _grow(self, autoscaler: Autoscaler) -> None:
        """Add workers if there is a need, as long as there is something for them to do."""
        if not autoscaler.is_due(_AUTOSCALING_PERIOD, self._num_yielded):
            return
        for _ in range(autoscaler.look(self._handles)):
            if self._sampler_ended:
                break
            self._num_workers += 1
            worker = self._start_worker(len(self._handles), Snapshot())
            self._stats.workers = self._num_workers
            for _ in range(self._prefetch + self._ahead_of_need):
                self._next_hand = worker.worker_id
                self._put_index()
        if autoscaler.has_ended:
            self._autoscaler = None
            if self._can_draw_ahead:
                self._ahead_of_need, self._bulk = _AHEAD, _AHEAD // 2
                for _ in range(_AHEAD * len(self._handles)):
                    self._put_index()
        self._flush()

    # State and end

    def _hand_out(self, worker: WorkerHandle, answer: Batch) -> None:
        """The worker tells from where it would go on now; or from where it has begun, and not each time."""
        if answer.after is not None:
            worker.snapshot = answer.after
            return
        worker.snapshot.batches += 1
        if self._makes_again:
            self._remember(worker)

    def _remember(self, worker: WorkerHandle) -> None:
        """Whoever goes on from this worker's snapshot makes this batch again."""
        if worker.snapshot.again is None:
            worker.snapshot.again = []
        worker.snapshot.again.append(self._index)

    def _hand_out_index(self, told: SamplerState | None) -> None:
        """The sampler's state is that after this index."""
        if told is not None:
            self._sampler_state = told
        elif self._sampler_state is not None:
            self._sampler_state.steps += 1

    def _pass_failures(self) -> None:
        """A batch comes after them: so whoever goes on from here does not try them again."""
        failures, self._failures = self._failures, []
        for each in failures:
            self._failed += 1
            if each.after is not None:
                each.worker.snapshot = each.after
            self._hand_out_index(each.told)

    def _learn(self, worker: WorkerHandle, answer: Any) -> None:
        """From where a worker has begun, if that is not known, of its first answer."""
        if worker not in self._unknown:
            return
        self._unknown.discard(worker)
        if type(answer) in (Batch, End, Failure) and answer.before is not None:
            worker.snapshot = answer.before

    def _learn_beginnings(self) -> None:
        """Wait until it is known of all workers from where they have begun."""
        while self._unknown and len(self._early) < len(self._turns):
            worker, answer = self._receive()
            if type(answer) not in (Batch, End, Failure):
                self._unknown.clear()
            self._learn(worker, answer)
            self._early.append((worker, answer))

    def capture(self) -> state.State:
        """From where the loader can go on after the batch that was handed out last."""
        if self._closed:
            return self._last_state
        if self._unknown and not self._finished:
            self._learn_beginnings()
        return self._capture()

    def _capture(self) -> state.State:
        finished = self._finished
        tells = self._persistent_workers or not finished  # others begin the next epoch as they began this one
        pending = self._indices_under_way() if self._tells_pending and not finished else None
        first = self._failures[0].worker if self._failures else self._turns[0][0] if self._turns else self._handles[0]
        return state.State(
            iterable=self._dataset_kind == internals.ITERABLE,
            num_workers=len(self._handles),
            base_seed=self._base_seed,
            yielded=self._num_yielded,
            position=self._num_yielded + self._failed + len(pending or ()),
            finished=finished,
            begins=finished,
            draws=self._sampler_rng.to_plain(),
            sampler=self._sampler_end if finished else self._told_sampler_state(),
            snapshots=[worker.snapshot.copied() if tells else Snapshot() for worker in self._handles],
            active=[worker.active for worker in self._handles],
            next_worker=first.worker_id,
            pending=pending,
        )

    def _told_sampler_state(self) -> SamplerState | None:
        if self._sampler_state is None:
            return None
        # Where indices come back in any order, the last one that was drawn counts.
        return self._cursor.state() if self._tells_pending else replace(self._sampler_state)

    def _indices_under_way(self) -> list[Any]:
        tasks = {worker: iter(worker.tasks) for worker in self._handles}
        under_way = [(next(tasks[worker], None), epoch) for worker, epoch in self._turns]
        return [
            *(each.index for each in self._failures),
            *(index for index, epoch in under_way if epoch == self._epoch),
            *self._pending,
        ]

    def close(self) -> None:
        """End the workers, and wait until they have finished what they are at. May be called again."""
        self._close(lambda: worker_pool.end(self._handles))

    def close_at_exit(self) -> None:
        """End the workers because the interpreter ends. As with torch's loader, only persistent ones have the time."""
        if self._persistent_workers and not shutdown.interrupted():
            self.close()
        else:
            self._close(lambda: worker_pool.end(self._handles, _END_TIMEOUT_AT_EXIT), _END_TIMEOUT_AT_EXIT)

    def _close(self, end: Callable[[], None], pinner_timeout: float = worker_pool.END_TIMEOUT) -> None:
        if self._closed:
            return
        if self._begun:
            self._last_state = self._stats.state = self._capture()
        self._closed = True
        self._stats.stop()
        self._turns = deque()
        try:
            if self._pinner is not None:
                self._pinner.stop(pinner_timeout)
        finally:
            end()

    def abandon(self) -> None:
        """In a fork: the workers are the parent's."""
        self._closed = True
        self._broken = RuntimeError(
            "this iterator of a DataLoader was made before a fork and belongs to the parent process: make one here"
        )

    @property
    def is_closed(self) -> bool:
        """Whether no more batches can come from it, in this epoch or another."""
        return self._closed

    #: torch's name for it, which frameworks call.
    _shutdown_workers = close

    @property
    def _workers(self) -> list[Any]:
        """torch's name for its workers, which programs look for: with the methods of ``multiprocessing.Process``."""
        return [worker.process.handle for worker in self._handles]

    def __del__(self) -> None:
        if self._closed or sys.is_finalizing():
            return
        # Garbage is collected at any moment, in any thread. Some must not wait for what close waits for, because that
        # waits for them.
        pins = self._pinner is not None and self._pinner.is_in_current_thread
        if pins or recycling.is_locked_here() or reactor.get().is_in_current_thread:
            threading.Thread(target=self.close, name="torchwq-close", daemon=True).start()
        else:
            self.close()


_open: weakref.WeakSet[Iterator] = weakref.WeakSet()


def _close_all() -> None:
    """At exit, before multiprocessing waits for its children."""
    for iterator in list(_open):
        iterator.close_at_exit()


shutdown.at_close(_close_all)


def _without_frames(error: Exception) -> Exception:
    """A copy of ``error``, to be kept: the frames in the traceback of one that was raised would keep the iterator."""
    try:
        return copy.copy(error)
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def _epoch_of(sampler: Any) -> Any:
    """What ``set_epoch`` sets: of a batch sampler's sampler, or its own."""
    return [getattr(each, "epoch", None) for each in (sampler, getattr(sampler, "sampler", None))]
