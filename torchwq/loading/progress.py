"""From where a loader could go on after the batch that its consumer was given last.

Workers and the sampler are ahead of the consumer. So a worker tells with a batch from where it would go on after it
(``Snapshot``), and the sampler is asked after each index. Here is what of that belongs to the batches that the consumer
has.

Invariants:

* ``worker.snapshot`` is the worker's last snapshot, and counts the batches since then.
* What has failed counts once a batch after it was handed out: whoever goes on from there does not try it again, whoever
  goes on from before that does.
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
        dispatcher: knows what is under way.
        persistent: whether workers go on with the next epoch.
        needs_replay: whether batches that came without a snapshot need their indices to be made again.
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
            resume: from where; None: from the beginning.
            starts_unknown: whether workers tell with their first answers from where they have begun.
        """
        #: Those of which it is not known yet from where they have begun.
        self.unknown_starts = set(self._workers) if starts_unknown else set()
        #: Tasks that have failed since the last batch, with the workers' snapshots after them, and how many did before.
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
        """The next epoch begins, of which workers have made batches already."""
        for task, after in self._failures:  # that ended the epoch before
            if after is not None:
                task.worker.snapshot = after
        self._failures, self._failed = [], 0

    def record_start(self, worker: WorkerHandle, answer: Any) -> None:
        """Take from a worker's first answer from where it has begun, if that is not known."""
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
            self.unknown_starts.clear()  # workers have nothing to tell
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
            base_seed: of the workers.
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
        tells = self._persistent or not finished  # others begin the next epoch as they began this one
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
            snapshots=[worker.snapshot.copied() if tells else Snapshot() for worker in self._workers],
            active=[worker.active for worker in self._workers],
            next_worker=first.worker_id,
            pending=pending,
        )
