"""Where the answers of a loader's workers come in.

Apart from the iterator, so that a thread that waits here does not keep the iterator alive.

Invariants:

* One thread receives: the consumer, or, after ``leave_to_thread``, another one.
* That other one clears ``_wake`` before it looks at what it stands for, whether to stop and who is to be waited for;
  whoever changes that sets it afterwards.
"""

from __future__ import annotations

import time
from typing import Any, Final

from ..marshalling import codec, exceptions
from ..transport import polling
from ..transport.alarm import Alarm
from ..transport.endpoint import Received
from .messages import Failure
from .statistics import StatsCollector
from .worker_pool import Gone, WorkerHandle

#: Whoever waits for any of several looks at least so often, in seconds.
_POLL_INTERVAL: Final = 0.5
#: The same while nobody has anything to do.
_IDLE_POLL_INTERVAL: Final = 0.01


class ResultReceiver:
    """Receives from ``workers``, which may grow; ``in_order``, from the one that is asked for, or else from any."""

    def __init__(self, workers: list[WorkerHandle], in_order: bool, stats: StatsCollector) -> None:
        self._workers = workers
        self._in_order = in_order
        self._stats = stats
        self.stopped = False
        self._wake: Alarm | None = None

    def leave_to_thread(self) -> None:
        """Let another thread receive from now on."""
        if not self._in_order:
            self._wake = Alarm()

    def look_again(self) -> None:
        """Others are to be waited for than the thread that waits may know."""
        if self._wake is not None:
            self._wake.set()

    def stop(self) -> None:
        """Wake the thread that waits, and let it wait no more. What has come can still be taken."""
        self.stopped = True
        self.look_again()
        for worker in self._workers:
            worker.stop_waiting()

    def close(self) -> None:
        """After ``stop``, when the thread has ended."""
        if self._wake is not None:
            self._wake.close()

    def wait(self, worker: WorkerHandle) -> tuple[WorkerHandle, Any]:
        """The next answer, unpickled. Raises Gone if a worker has ended, EOFError after ``stop``."""
        found, received = self.receive(worker, None)
        if received is None:
            raise EOFError
        return found, self.unpack(received)

    def unpack(self, received: Received) -> Any:
        """The answer in a message. If it cannot be rebuilt here, that is a Failure."""
        try:
            return codec.decode(*received)
        except Exception as error:
            return Failure(exceptions.pack(error), "where its batch could not be rebuilt in the loader's process")

    def receive(self, worker: WorkerHandle, deadline: float | None) -> tuple[WorkerHandle, Received | None]:
        """The next answer that is not to be skipped; None after ``deadline`` (time.monotonic)."""
        while True:
            found, received = self._from_one(worker, deadline) if self._in_order else self._from_any(deadline)
            if received is None or not found.to_skip:
                return found, received
            found.to_skip -= 1
            found.consumed()
            codec.discard(*received)

    def receive_stale(self, deadline: float | None) -> None:
        """Receive what is to be skipped, of all workers. Raises TimeoutError after ``deadline``, Gone."""
        for worker in self._workers:
            while worker.to_skip:
                try:
                    received = worker.take() or worker.wait(deadline)
                except EOFError:
                    raise Gone(worker) from None
                if received is None:
                    raise TimeoutError
                worker.to_skip -= 1
                worker.consumed()
                codec.discard(*received)

    def _from_one(self, worker: WorkerHandle, deadline: float | None) -> tuple[WorkerHandle, Received | None]:
        try:
            received = worker.take()
            if received is None:
                worker.flush()  # so nobody waits for an answer to what was not asked
                began = time.perf_counter_ns()
                received = worker.wait(deadline)
                self._stats.waited += time.perf_counter_ns() - began
        except EOFError:
            raise Gone(worker) from None
        return worker, received

    def _from_any(self, deadline: float | None) -> tuple[WorkerHandle, Received | None]:
        began = 0
        wake = self._wake
        while True:
            if wake is not None:
                wake.clear()
            if self.stopped:
                return self._workers[0], None
            busy = [worker for worker in self._workers if worker.unreceived]
            for worker in busy:
                try:
                    received = worker.take()
                except EOFError:
                    raise Gone(worker) from None
                if received is not None:
                    if began:
                        self._stats.waited += time.perf_counter_ns() - began
                    return worker, received
            began = began or time.perf_counter_ns()
            for worker in self._workers:
                worker.flush()
            fds = [] if wake is None else [wake.fileno()]
            for worker in busy:
                if worker.connection.fileno() < 0:
                    return worker, None
                fds.append(worker.connection.fileno())
            longest = _POLL_INTERVAL if busy else _IDLE_POLL_INTERVAL
            left = longest if deadline is None else min(longest, deadline - time.monotonic())
            if left <= 0:
                return self._workers[0], None
            polling.readable(left, *fds)
