"""The workers of one iterator: starts them, receives from them, replaces dead ones, and ends them together.

Invariants:

* A death is raised, or the worker replaced, when everything that the worker had sent has been received.
* ``end`` leaves no process behind. It waits for a worker at most ``END_TIMEOUT`` seconds before it uses force, which no
  thread can be ended by.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Sequence
from typing import Any, Final

from .. import warning
from ..memory import recycling
from ..workers.backend import find
from . import startup
from .config import LoaderConfig, WorkerConfig
from .dispatcher import Dispatcher
from .failure_place import describe_index
from .messages import Answer
from .pinning import Pinner
from .processes import END_TIMEOUT
from .result_receiver import ResultReceiver
from .statistics import StatsCollector
from .worker_handle import WorkerGone, WorkerHandle

#: Seconds that all workers together may take to end by themselves if an error is to be raised, or at exit.
SHORT_END_TIMEOUT: Final = 0.5
#: Seconds that a worker may take to end after a signal.
_SIGNAL_TIMEOUT: Final = 1.0


class WorkerPool:
    """The workers of one iterator, and the receiver of their answers.

    Args:
        workers: the list to which workers are added.
        dispatcher: knows their indices in flight.
        config: their common configuration.
        loader: the DataLoader.
        stats: the loader's counts.
    """

    def __init__(
        self,
        workers: list[WorkerHandle],
        dispatcher: Dispatcher,
        config: LoaderConfig,
        loader: Any,
        stats: StatsCollector,
    ) -> None:
        self._workers = workers
        self._dispatcher = dispatcher
        self._config = config
        self._backend = find(loader.backend)
        self._max_restarts: int = loader.max_restarts if loader.on_worker_death == "restart" else 0
        self._stats = stats
        self._receiver = ResultReceiver(workers, loader.in_order, stats)
        self._pinner: Pinner | None = None
        self._source: ResultReceiver | Pinner = self._receiver
        self._start = startup.starter(loader.multiprocessing_context, config, self._backend)
        self._restarts = 0
        self._closed = False

    def start_worker(self, worker_config: WorkerConfig) -> WorkerHandle:
        """Add a worker."""
        worker = WorkerHandle(self._start, worker_config, self._config, self._backend)
        self._workers.append(worker)
        return worker

    def pin(self, device: Any) -> None:
        """From now on a thread receives the answers, and pins batches for ``device``."""
        self._source = self._pinner = Pinner(self._receiver, device)
        self._dispatcher.expect = self._pinner.expect

    def receive(self, worker: WorkerHandle, deadline: float | None) -> tuple[WorkerHandle, Any] | None:
        """The next answer, and the worker that has sent it; None if the answer is stale.

        Args:
            worker: the worker whose answer is the next, in order.
            deadline: when to stop waiting (time.monotonic); None for never.

        Raises:
            TimeoutError: after ``deadline``.
            WorkerDied: a worker has died, and may not be replaced.
        """
        while True:
            try:
                found = self._source.receive(worker, deadline)
            except WorkerGone as gone:
                dead = gone.worker
            else:
                worker, answer = found
                if worker.stale:
                    worker.drop_stale(answer)
                    return None
                if isinstance(answer, Answer) and answer.after is not None:
                    worker.received = answer.after
                return found
            self._replace(dead)  # outside of the except block: WorkerGone should not be the context of an error

    def _replace(self, worker: WorkerHandle) -> None:
        """Restart a dead worker, or raise WorkerDied."""
        indices = self._dispatcher.indices_of(worker)
        death = worker.death(describe_index(indices[0]) if indices else "")
        if self._restarts >= self._max_restarts or self._closed:
            if self._max_restarts:
                death.args = (f"{death}. It was not restarted: {self._restarts} restarts were allowed (max_restarts)",)
            try:
                raise death
            finally:
                del death
        self._restarts += 1
        self._stats.restarts += 1
        warning.warn(f"{death}. It is restarted ({self._restarts} of {self._max_restarts})")
        worker.restart(indices)
        if self._pinner is not None:
            self._pinner.restarted()

    def describe_late_workers(self) -> str:
        """Says which workers have not answered."""
        first = self._dispatcher.next_worker()
        missing = []
        for worker in self._workers if first is None else [first]:
            indices = self._dispatcher.indices_of(worker)
            if worker.unreceived or indices:
                in_hand = f", with {describe_index(indices[0])} in hand" if indices else ""
                missing.append(f"worker {worker.worker_id} (pid {worker.process.pid}) has not answered{in_hand}")
        return "; ".join(missing)

    @property
    def is_in_own_thread(self) -> bool:
        """Whether ``end`` would wait for the current thread."""
        return self._pinner is not None and self._pinner.is_in_current_thread

    def end(self, in_all: float | None = None) -> None:
        """End the workers, and wait for that; see :func:`end`."""
        with contextlib.ExitStack() as stack:
            stack.callback(end, self._workers, in_all)
            self._stop_pinning(END_TIMEOUT if in_all is None else in_all)

    def end_in_background(self) -> None:
        """The same without a long wait; see :func:`end_in_background`."""
        with contextlib.ExitStack() as stack:
            stack.callback(end_in_background, self._workers)
            self._stop_pinning(END_TIMEOUT)

    def _stop_pinning(self, timeout: float) -> None:
        self._closed = True
        if self._pinner is not None:
            self._pinner.stop(timeout)


def end(workers: Sequence[WorkerHandle], in_all: float | None = None) -> None:
    """End workers by closing their connections, and processes that do not end in time by force.

    Args:
        workers: all of them.
        in_all: seconds that all of them together may take to end by themselves; None for ``END_TIMEOUT`` for each
            process, one after the other, as torch's loader waits for them.
    """
    with contextlib.ExitStack() as stack:  # after another Ctrl-C it does the rest
        stack.callback(recycling.retire_orphans)  # or the workers' blocks would stay for a while, of no use to anyone
        stack.callback(_wait_or_kill, workers, in_all)
        for worker in workers:
            stack.callback(worker.close)


def end_in_background(workers: Sequence[WorkerHandle]) -> None:
    """The same, but after ``SHORT_END_TIMEOUT`` seconds a thread goes on with it."""
    left = list(workers)
    try:
        for worker in workers:
            worker.close()
        left = _wait(workers, SHORT_END_TIMEOUT)
    finally:
        recycling.note_worker_exit()  # takes no lock: this may be a finalizer
        if left:
            threading.Thread(target=end, args=(left,), name="torchwq-close", daemon=True).start()


def _wait_or_kill(workers: Sequence[WorkerHandle], in_all: float | None) -> None:
    left = [worker for worker in _wait(workers, in_all) if worker.process.can_be_killed]
    for number in (signal.SIGTERM, signal.SIGKILL):
        for worker in left:
            worker.process.kill(number)
        left = _wait(left, _SIGNAL_TIMEOUT) if left else left


def _wait(workers: Sequence[WorkerHandle], in_all: float | None) -> list[WorkerHandle]:
    """Wait for workers to end, and return those that have not."""
    until = time.monotonic() + (END_TIMEOUT if in_all is None else in_all)
    for worker in workers:
        worker.process.wait(max(0.0, until - time.monotonic()))
        if in_all is None and worker.process.can_be_killed:
            until = time.monotonic() + END_TIMEOUT
    return [worker for worker in workers if not worker.process.wait(0.0)]
