"""``WorkerGroup``: workers that are addressed one by one, as simulators and agents are.

A workqueue does not say which worker takes a question. Here each worker has a queue of its own, so the owner can send
to one, to all, and gather an answer of each. All the rules of queues hold: order, deaths told once, no hangs.

Invariants:

* Worker i reads and writes queue i only, and nobody else has a handle on it. So "nobody is left" on queue i is the
  death of worker i.
* ``restart`` gives the new worker a new queue: it never reads what was written to the one before.
"""

from __future__ import annotations

import queue
import signal
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Final, final

from . import mapping
from .errors import QueueClosed
from .mapping import Map
from .queues import WorkQueue, workqueue
from .selecting import select
from .workers.backend import Backend, find
from .workers.starting import check_number

_USAGE: Final = "torchwq.WorkerGroup(number, function, *args)"
#: Seconds that a worker has to end after its queue was closed, and again after SIGTERM.
_END_TIMEOUT: Final = 5.0
_TERMINATE_TIMEOUT: Final = 2.0


@final
class WorkerGroup:
    """``n`` workers, each with a queue of its own: send to one or to all, gather an answer of each.

    Worker ``i`` runs ``f(q, *args)``, or ``f(q, *args, i)`` if ``f`` takes one more argument, as :func:`torchwq.map`
    decides. ``q`` is a worker's handle on its queue: ``for message in q:`` reads until None or the end, ``q.write``
    answers. ``with WorkerGroup(...) as group:`` ends the workers with the block. ``len(group)`` is their number.

    Args:
        n: number of workers.
        f: the function. It travels as code; see ``upvalues``.
        *args: its arguments, after the queue.
        backend: ``"process"``, ``"thread"`` or ``"ray"``; see :func:`torchwq.map`.
        upvalues: whether ``f`` may be a closure, and use global data of ``__main__``.

    Raises:
        ValueError, TypeError, ClosureError, MarshalError, ResourceError: as :func:`torchwq.map`.

    Source: ``gymnasium.vector.AsyncVectorEnv`` for one worker for each simulator; ``MPI_Bcast``, ``MPI_Gather``.
    """

    def __init__(
        self, n: int, f: Callable[..., Any], /, *args: Any, backend: str | Backend = "process", upvalues: bool = False
    ) -> None:
        self._backend = find(backend)
        n = check_number(n, _USAGE)
        mapping.check_function(f, _USAGE)
        self._call = f, args, upvalues
        self._queues: list[WorkQueue] = []
        self._maps: list[Map] = []
        #: Answers of each worker that an interrupted ``gather`` had read.
        self._early: dict[int, list[Any]] = {}
        self._heard = 0
        self._closed = False
        try:
            for index in range(n):
                self._queues.append(workqueue())
                self._maps.append(self._start(index, n))
        except BaseException:
            self.terminate()
            raise

    def _start(self, index: int, of: int) -> Map:
        f, args, upvalues = self._call
        call = self._queues[index], *args
        return mapping.start(f, call, range(index, index + 1), of, self._backend, upvalues)

    def _check(self) -> None:
        if self._closed:
            raise QueueClosed("the group is closed")

    # Messages

    def send(self, index: int, *objs: Any) -> None:
        """Write each of ``objs`` to worker ``index``. Never blocks.

        Raises:
            IndexError: there is no such worker.
            MarshalError, QueueClosed: as :meth:`WorkQueue.write`.
        """
        self._check()
        self._queues[index].write(*objs)

    def broadcast(self, obj: Any) -> None:
        """Write ``obj`` to each worker. A tensor in it is then shared by all."""
        self._check()
        for each in self._queues:
            each.write(obj)

    def recv(self, index: int, timeout: float | None = None) -> Any:
        """Read the next answer of worker ``index``.

        Args:
            index: which worker.
            timeout: how long to wait at most, in seconds; None waits for ever.

        Raises:
            queue.Empty: nothing came within ``timeout``.
            WorkerDied: the worker has died, or has ended, and everything that it had written has been read.
        """
        self._check()
        return self._read(index, timeout)

    def gather(self, timeout: float | None = None) -> list[Any]:
        """Read one answer of each worker.

        Args:
            timeout: how long to wait at most, in seconds, for all together; None waits for ever.

        Returns:
            The answers, in the order of the workers.

        Raises:
            queue.Empty: not all came within ``timeout``. Those that came are returned by the next ``gather``.
            WorkerDied: a worker has died, or has ended; the answers of the others are returned by the next ``gather``.
        """
        self._check()
        left = _countdown(timeout)
        answers: list[Any] = []
        try:
            for index in range(len(self._queues)):
                answers.append(self._read(index, left()))
        except BaseException:
            for index, answer in enumerate(answers):
                self._early.setdefault(index, []).insert(0, answer)
            raise
        return answers

    def recv_any(self, timeout: float | None = None) -> tuple[int, Any]:
        """Read the next answer of whichever worker has one.

        Args:
            timeout: how long to wait at most, in seconds; None waits for ever.

        Returns:
            The worker's number, and its answer.

        Raises:
            queue.Empty: nothing came within ``timeout``.
            WorkerDied: a worker has died, or has ended.
        """
        self._check()
        for index, early in self._early.items():
            if early:
                return index, early.pop(0)
        # Beginning after the last one that was heard: a fast worker does not keep the others from being heard.
        order = self._queues[self._heard :] + self._queues[: self._heard]
        found = next(iter(select(order, timeout)), None)
        if found is None:
            raise queue.Empty(f"no worker has answered within {timeout} s")
        index = self._index_of(found)
        self._heard = (index + 1) % len(self)
        return index, self._read(index, None)

    # Workers

    def restart(self, index: int) -> None:
        """End worker ``index``, at once, and start another in its place, with a queue of its own.

        What was written to the old one and not read is lost, and so are its answers that were not read.
        """
        self._check()
        self._end(self._maps[index], 0.0)
        self._queues[index].close()
        self._early.pop(index, None)
        self._queues[index] = workqueue()
        self._maps[index] = self._start(index, len(self._queues))

    @property
    def pids(self) -> list[int | None]:
        """Process ids of the workers. None: the worker has not started yet, or is no process of this machine."""
        return [each.pids[0] for each in self._maps]

    def join(self, timeout: float | None = None) -> list[Any]:
        """Close the queues, wait until all workers have ended, and return what their functions returned.

        Raises:
            TimeoutError: a worker has not ended within ``timeout``; ``join`` can be called again.
            Exception: the error of the first worker that failed, as :meth:`Map.join` raises it.
        """
        self.close()
        deadline = None if timeout is None else time.monotonic() + timeout
        return [
            each.join(None if deadline is None else max(0.0, deadline - time.monotonic()))[0] for each in self._maps
        ]

    def close(self) -> None:
        """Close the queues: workers read what is left, and end. Does not wait for them. May be called again."""
        self._closed = True
        for each in self._queues:
            each.close()

    def terminate(self) -> None:
        """End all workers at once, and wait for that. May be called again."""
        self.close()
        for each in self._maps:
            each.terminate()
        for each in self._maps:
            self._end(each, 0.0)

    def _end(self, worker: Map, patience: float) -> None:
        """End a worker: let it end by itself for some seconds, then by force."""
        for number in (None, signal.SIGTERM, signal.SIGKILL):
            if number is not None:
                worker.terminate(number)
            if worker.wait(patience if number is None else _TERMINATE_TIMEOUT):
                return

    def __enter__(self) -> WorkerGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the workers; with the block's error, or one that has died, at once. Raises a worker's error."""
        self.close()
        for each in self._maps:
            self._end(each, _END_TIMEOUT if error is None else 0.0)
        if error is None:
            for each in self._maps:
                each.join()

    def __len__(self) -> int:
        return len(self._maps)

    def __iter__(self) -> Iterator[WorkQueue]:
        """The queues of the workers, for :func:`torchwq.select`, ``asyncio`` and ``drain``."""
        return iter(list(self._queues))

    def __repr__(self) -> str:
        running = sum(not each.wait(0.0) for each in self._maps)
        return f"<torchwq.WorkerGroup of {len(self)} workers, {running} running{', closed' * self._closed}>"

    def _index_of(self, found: WorkQueue) -> int:
        return next(index for index, each in enumerate(self._queues) if each is found)

    def _read(self, index: int, timeout: float | None) -> Any:
        early = self._early.get(index)
        if early:
            return early.pop(0)
        return self._queues[index].read(timeout=timeout)


def _countdown(timeout: float | None) -> Callable[[], float | None]:
    """What is left of ``timeout``, whenever it is called."""
    deadline = None if timeout is None else time.monotonic() + timeout
    return lambda: None if deadline is None else max(0.0, deadline - time.monotonic())
