"""The state of a loader after the batch that its consumer got last.

Workers and the sampler are ahead of the consumer. So each batch comes with the worker's ``Snapshot`` after it, and each
index with the sampler's state. ``Progress`` keeps those that belong to the batches that the consumer has.

Invariants:

* ``worker.snapshot`` is the worker's last snapshot, and counts the batches since then.
* A failure counts from the next batch on: a loader that goes on after that batch does not try it again, one that goes
  on from before does.
"""

from __future__ import annotations

from typing import Any

from .dispatcher import Dispatcher, Task
from .messages import Answer, Batch, Snapshot
from .state import State
from .worker_handle import WorkerHandle


class Progress:
    """How far an epoch has come at its consumer.

    Args:
        workers: those of the loader; they may grow.
        dispatcher: knows what is in flight.
        persistent: whether workers go on with the next epoch.
        needs_replay: whether a snapshot lists the indices of the batches since then, which are made again.
    """

    def __init__(
        self, workers: list[WorkerHandle], dispatcher: Dispatcher, persistent: bool, needs_replay: bool
    ) -> None:
        self._workers = workers
        self._dispatcher = dispatcher
        self._persistent = persistent
        self._needs_replay = needs_replay
        self.begin(None, starts_unknown=False)

    def begin(self, resume: State | None, *, starts_unknown: bool) -> None:
        """An epoch begins, or goes on.

        Args:
            resume: from where; None for the beginning.
            starts_unknown: whether workers send with their first answers the snapshot from before these.
        """
        #: Workers whose snapshot from before their first answer has not come yet.
        self.unknown_starts = set(self._workers) if starts_unknown else set()
        #: Tasks that have failed since the last batch, with the workers' snapshots after them; and how many before it.
        self._failures: list[tuple[Task, Snapshot | None]] = []
        self._failed = 0
        for number, worker in enumerate(self._workers):
            worker.active = True
            if resume is not None and resume.begins:
                worker.snapshot = Snapshot()
            elif resume is not None:
                worker.active = resume.active[number]
        if resume is not None and not resume.begins:
            self._failed = resume.position - resume.yielded - len(resume.pending or ())

    def begin_prefetched_epoch(self) -> None:
        """Begin the epoch of which workers have made batches already."""
        for task, after in self._failures:  # at the end of the epoch before
            if after is not None:
                task.worker.snapshot = after
        self._failures, self._failed = [], 0

    def record_start(self, worker: WorkerHandle, answer: Any) -> None:
        """Take a worker's snapshot from before its first answer, if it is unknown."""
        if worker in self.unknown_starts:
            self.unknown_starts.discard(worker)
            if isinstance(answer, Answer) and answer.before is not None:
                worker.snapshot = answer.before

    def hand_out(self, task: Task, answer: Any) -> None:
        """The consumer gets this batch."""
        if self._failures:
            self._pass_failures()
        dispatcher, worker = self._dispatcher, task.worker
        if task.sampler_state is not None or dispatcher.sampler_state is not None:
            dispatcher.advance_sampler(task.sampler_state)
        if type(answer) is Batch:
            if answer.after is not None:
                worker.snapshot = answer.after
                return
        elif self.unknown_starts:
            self.unknown_starts.clear()  # the workers have no state
        snapshot = worker.snapshot
        snapshot.batches += 1
        if self._needs_replay:
            if snapshot.replay is None:
                snapshot.replay = []
            snapshot.replay.append(task.index)

    def fail(self, task: Task, after: Snapshot | None) -> None:
        """The consumer gets an error in place of this task's batch."""
        self._failures.append((task, after))

    def _pass_failures(self) -> None:
        failures, self._failures = self._failures, []
        for task, after in failures:
            self._failed += 1
            if after is not None:
                task.worker.snapshot = after
            self._dispatcher.advance_sampler(task.sampler_state)

    def capture(self, base_seed: int, yielded: int, finished: bool) -> State:
        """The state after the last batch that was handed out.

        Args:
            base_seed: that of the workers.
            yielded: how many batches of the epoch were handed out.
            finished: whether the epoch is over.
        """
        dispatcher = self._dispatcher
        failed = [task for task, _ in self._failures]
        pending = None
        if dispatcher.records_pending and not finished:
            pending = [*(task.index for task in failed), *dispatcher.pending()]
        first = next((task.worker for task in [*failed, *list(dispatcher.in_flight)[:1]]), self._workers[0])
        ahead = dispatcher.prefetched_rng() if finished else None
        goes_on = self._persistent or not finished  # other workers begin the next epoch anew
        return State(
            iterable=dispatcher.iterable,
            num_workers=len(self._workers),
            base_seed=base_seed,
            yielded=yielded,
            position=yielded + self._failed + len(pending or ()),
            finished=finished,
            begins=finished,
            draws=(ahead or dispatcher.current.rng).to_plain(),
            is_drawn_ahead=ahead is not None,
            sampler=dispatcher.sampler_end if finished else dispatcher.captured_sampler_state(),
            snapshots=[worker.snapshot.copied() if goes_on else Snapshot() for worker in self._workers],
            active=[worker.active for worker in self._workers],
            next_worker=first.worker_id,
            pending=pending,
        )
