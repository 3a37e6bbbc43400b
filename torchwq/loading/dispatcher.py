"""Draws indices from the sampler, and says which worker makes the batch of each.

torch's loader is the model. The dispatcher draws an index when torch would, and gives them to the workers in turn,
except those whose part of an iterable dataset has ended. Where nobody can tell the difference, it draws further ahead,
and sends several indices in one message.

Invariants:

* ``in_flight`` has a task for each index of which the consumer has not taken the answer, in the order in which batches
  are handed out. The tasks of one worker are in the order in which that worker answers.
* Only the consumer's thread dispatches.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from . import internals, sampler_rng
from .sampler_cursor import SamplerCursor, SamplerState
from .sampler_rng import SamplerRng
from .state import State
from .worker_handle import WorkerHandle

#: How many indices a worker gets beyond those for which it may make batches now, where nobody can tell the difference.
_AHEAD: Final = 8
#: What ``next`` gives for a sampler that has ended.
_NONE_LEFT: Final = object()


@dataclass
class Epoch:
    """What the indices of one epoch are drawn from, and the epoch that ``set_epoch`` had set before the first one."""

    cursor: SamplerCursor
    rng: SamplerRng
    set_epoch: Any = None


@dataclass(slots=True)
class Task:
    """An index in flight: the worker that makes its batch, its epoch, and the sampler's state after it."""

    worker: WorkerHandle
    index: Any
    epoch: Epoch
    sampler_state: SamplerState | None


class Dispatcher:
    """Draws indices of a loader's sampler and gives them to ``workers``, which may grow.

    Args:
        loader: the DataLoader.
        workers: where indices go.
        may_grow: whether workers may be added. Then nothing is drawn further ahead than torch does: a new worker would
            have to wait until the others have done the indices that they have.
        pins: whether a thread pins batches. ``expect`` tells it of each index.
    """

    def __init__(self, loader: Any, workers: list[WorkerHandle], may_grow: bool, pins: bool) -> None:
        self._sampler = loader._index_sampler
        self._generator = loader.generator
        self.iterable = loader._dataset_kind == internals.ITERABLE
        self._workers = workers
        self._every: int = loader.snapshot_every_n_steps or 0
        self._prefetch_across_epochs: bool = loader.prefetch_across_epochs
        self._prefetch: int = loader.prefetch_factor
        self._in_order: bool = loader.in_order
        self._can_draw_ahead = self._in_order and not pins and internals.can_draw_ahead(self._sampler)
        # How many indices are drawn beyond those that are needed now, and how many go in one message.
        self._extra_indices, self._indices_per_message = 0, 1
        if not may_grow:
            self._start_drawing_ahead()
        self.expect: Callable[[WorkerHandle], None] | None = None
        self.in_flight: deque[Task] = deque()

    def _start_drawing_ahead(self) -> None:
        if self._can_draw_ahead:
            self._extra_indices, self._indices_per_message = _AHEAD, _AHEAD // 2

    # Epochs

    def begin(self, resume: State | None, draws: dict[str, Any] | None) -> None:
        """Begin an epoch, and draw its first indices.

        Args:
            resume: from where; None for the beginning.
            draws: what the sampler draws again; None if it draws anew.
        """
        self.in_flight = deque()
        self._next_worker = 0
        #: Whether the sampler has no more indices; and the state with which the next epoch begins then.
        self.sampler_ended = False
        self.sampler_end: SamplerState | None = None
        #: The sampler's state after the last index whose batch was handed out.
        self.sampler_state: SamplerState | None = None
        #: Whether a saved state lists the indices in flight, because answers come in another order than indices.
        self.records_pending = not self._in_order
        cursor = SamplerCursor(self._sampler, self._every)
        if resume is not None and resume.begins:
            cursor.restore_source(resume.sampler)
        rng = SamplerRng.of(draws) if draws is not None else sampler_rng.capture(self._sampler, self._generator)
        #: The epoch whose batches are handed out, and the one whose indices are drawn: this one or the next.
        self.current = self._drawn = Epoch(cursor, rng)
        with contextlib.ExitStack() as stack:
            if draws is not None:
                stack.enter_context(sampler_rng.replaying(self._sampler, self._generator, draws))
            if resume is None or resume.begins:
                cursor.begin()
                cursor.start()
            else:
                self._next_worker = resume.next_worker
                self.records_pending = self.records_pending or bool(resume.pending)
                cursor.resume(resume.sampler, 0 if self.iterable else resume.position, resume.pending or ())
            if cursor.may_have_state:
                resumed = None if resume is None or resume.begins else resume.sampler
                self.sampler_state = (resumed and resumed.copy_if_set()) or cursor.state()
            for _ in range((self._prefetch + self._extra_indices) * len(self._workers)):
                self.dispatch_next()
            self.flush()

    def begin_prefetched_epoch(self) -> bool:
        """Begin the epoch whose first indices are in flight already; False if there is none, or another is wanted."""
        ahead = self._drawn
        if ahead is self.current or (self.in_flight and self.in_flight[0].epoch is self.current):
            return False
        if _set_epoch_of(self._sampler) != ahead.set_epoch:
            return False  # set_epoch was called meanwhile
        self.current = ahead
        self.sampler_ended = False
        self.sampler_state = self.sampler_end
        return True

    def prefetched_rng(self) -> SamplerRng | None:
        """What the next epoch is drawn from, if its first indices are in flight already."""
        ahead = self._drawn
        return None if ahead is self.current or _set_epoch_of(self._sampler) != ahead.set_epoch else ahead.rng

    def abandon(self) -> None:
        """Nobody wants what is in flight any more: its answers will be stale."""
        for worker in self._workers:
            worker.abandon_tasks(self._prefetch)

    # Indices

    def dispatch_next(self) -> None:
        """Draw the next index, if there is one, and give it to the worker whose turn it is."""
        cursor = self._drawn.cursor
        index = next(cursor.indices, _NONE_LEFT)
        if index is not _NONE_LEFT:
            self._assign(index, cursor.note() if cursor.may_have_state else None)
            return
        self.flush()
        if self._drawn is not self.current or self.sampler_ended:
            return
        self.sampler_ended = True
        self.sampler_end = cursor.end()
        if self._prefetch_across_epochs:
            following = SamplerCursor(self._sampler, self._every)
            self._drawn = Epoch(
                following, sampler_rng.capture(self._sampler, self._generator), _set_epoch_of(self._sampler)
            )
            following.begin()
            self.dispatch_next()

    def _assign(self, index: Any, sampler_state: SamplerState | None) -> None:
        count = len(self._workers)
        for _ in range(count):
            worker = self._workers[self._next_worker]
            self._next_worker = (self._next_worker + 1) % count
            if worker.active and (self._in_order or worker.unanswered < self._share()):
                break
        else:
            return
        worker.unsent.append(index)
        self.in_flight.append(Task(worker, index, self._drawn, sampler_state))
        if len(worker.unsent) >= self._indices_per_message:
            worker.flush()
        if self.expect is not None:
            self.expect(worker)

    def _share(self) -> int:
        """How many indices a worker may have where order does not matter."""
        return self._prefetch * len(self._workers) // max(1, sum(worker.active for worker in self._workers))

    def flush(self) -> None:
        """Send workers the indices that they do not know of."""
        for worker in self._workers:
            worker.flush()

    def feed(self, worker: WorkerHandle) -> None:
        """Give a new worker as many indices as the others have."""
        for _ in range(self._prefetch):
            self._next_worker = worker.worker_id
            self.dispatch_next()

    def stop_growing(self) -> None:
        """No more workers will be added."""
        self._start_drawing_ahead()
        for _ in range(self._extra_indices * len(self._workers)):
            self.dispatch_next()

    # Answers

    def take(self, worker: WorkerHandle) -> Task:
        """Remove and return the task to which this worker's next answer belongs."""
        in_flight = self.in_flight
        if in_flight[0].worker is worker:
            return in_flight.popleft()
        position = next(position for position, task in enumerate(in_flight) if task.worker is worker)
        task = in_flight[position]
        del in_flight[position]
        return task

    def next_worker(self) -> WorkerHandle | None:
        """The worker whose answer is the next; None if any worker's may be."""
        return self.in_flight[0].worker if self._in_order and self.in_flight else None

    def indices_of(self, worker: WorkerHandle) -> list[Any]:
        """The indices of this worker that are in flight, in order."""
        return [task.index for task in self.in_flight if task.worker is worker]

    def advance_sampler(self, sampler_state: SamplerState | None) -> None:
        """The consumer is past an index. ``sampler_state``: the sampler's state after it, if it was captured."""
        if sampler_state is not None:
            self.sampler_state = sampler_state
        elif self.sampler_state is not None:
            self.sampler_state.steps += 1

    def pending(self) -> list[Any]:
        """Indices of this epoch that were drawn, and whose answers have not been taken."""
        in_flight = [task.index for task in self.in_flight if task.epoch is self.current]
        return [*in_flight, *self.current.cursor.pending]

    def captured_sampler_state(self) -> SamplerState | None:
        """The sampler's state after the last batch that was handed out; None if it has none."""
        if self.sampler_state is None:
            return None
        # Where answers come in any order, the last index that was drawn counts.
        return self.current.cursor.state() if self.records_pending else replace(self.sampler_state)


def _set_epoch_of(sampler: Any) -> Any:
    """What ``set_epoch`` sets, in a sampler and in the one within it."""
    return [getattr(each, "epoch", None) for each in internals.sampler_chain(sampler)]
