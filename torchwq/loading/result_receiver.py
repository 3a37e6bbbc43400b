"""Receives the answers of a loader's workers.

It is not part of the iterator, so that a thread that waits here does not keep the iterator alive.

Invariants:

* One thread receives: the consumer, or, after ``use_from_thread``, the pinning thread.
* The pinning thread clears ``_wake`` before it looks whether to stop and for whom to wait. A thread that changes either
  sets ``_wake`` afterwards.
"""

from __future__ import annotations

import time
from typing import Any, Final

from ..marshalling import exceptions
from ..transport import polling
from ..transport.alarm import Alarm
from ..transport.endpoint import Received
from .messages import Failure
from .statistics import StatsCollector
from .worker_handle import WorkerGone, WorkerHandle

#: A thread that waits for any of several workers looks at all of them this often, in seconds.
_POLL_INTERVAL: Final = 0.5


class ResultReceiver:
    """Receives from ``workers``, which may grow: ``in_order``, from the one that ``receive`` names, else from any."""

    def __init__(self, workers: list[WorkerHandle], in_order: bool, stats: StatsCollector) -> None:
        self._workers = workers
        self._in_order = in_order
        self._stats = stats
        self.stopped = False
        self._wake: Alarm | None = None

    def use_from_thread(self) -> None:
        """Let another thread receive from now on."""
        if not self._in_order:
            self._wake = Alarm()

    def recheck(self) -> None:
        """Have the pinning thread look again for which workers to wait."""
        if self._wake is not None:
            self._wake.set()

    def stop(self) -> None:
        """Wake the thread that waits, for good. Answers that have come can still be taken."""
        self.stopped = True
        self.recheck()
        for worker in self._workers:
            worker.stop_waiting()

    def close(self) -> None:
        """After ``stop``, when the thread has ended."""
        if self._wake is not None:
            self._wake.close()

    def receive(self, worker: WorkerHandle, deadline: float | None) -> tuple[WorkerHandle, Any]:
        """The next answer, and the worker that has sent it.

        Args:
            worker: the worker whose answer is the next, in order.
            deadline: when to stop waiting (time.monotonic); None for never.

        Raises:
            TimeoutError: after ``deadline``, and after ``stop``.
            WorkerGone: a worker has ended, and will not answer.
        """
        received = None
        if self._in_order:
            try:
                received = worker.take() or self._wait(worker, deadline)
            except EOFError:
                raise WorkerGone(worker) from None
        else:
            worker, received = self._wait_for_any(worker, deadline)
        if received is None:
            raise TimeoutError
        try:
            return worker, worker.answer_in(received)
        except Exception as error:
            where = "where its batch could not be rebuilt in the loader's process"
            return worker, Failure(exceptions.pack(error), where)

    def _wait(self, worker: WorkerHandle, deadline: float | None) -> Received | None:
        if not worker.unreceived:
            worker.flush()  # or this would wait for the answer to an index that was not sent
        began = time.perf_counter_ns()
        received = worker.wait(deadline)
        self._stats.waited += time.perf_counter_ns() - began
        return received

    def _wait_for_any(self, any_worker: WorkerHandle, deadline: float | None) -> tuple[WorkerHandle, Received | None]:
        began = 0
        while True:
            if self._wake is not None:
                self._wake.clear()
            if self.stopped:
                return any_worker, None
            busy = [worker for worker in self._workers if worker.unreceived]
            for worker in busy:
                try:
                    received = worker.take()
                except EOFError:
                    raise WorkerGone(worker) from None
                if received is not None:
                    if began:
                        self._stats.waited += time.perf_counter_ns() - began
                    return worker, received
            began = began or time.perf_counter_ns()
            left = _POLL_INTERVAL if deadline is None else min(_POLL_INTERVAL, deadline - time.monotonic())
            if left <= 0 or not self._poll(busy, left):
                return any_worker, None

    def _poll(self, busy: list[WorkerHandle], seconds: float) -> bool:
        """Wait until one of the ``busy`` workers may have answered; False if the iterator was closed."""
        fds = [] if self._wake is None else [self._wake.fileno()]
        for worker in busy:
            if worker.connection.fileno() < 0:
                return False
            fds.append(worker.connection.fileno())
        polling.readable(seconds, *fds)
        return True
