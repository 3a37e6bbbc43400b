"""``WorkerGroup``: workers that are addressed one by one, as simulators and agents are.

A workqueue does not say which worker takes a question. Here each worker has a queue of its own, so the owner can send
to one, to all, and gather an answer of each. All the rules of queues hold: order, deaths told once, no hangs.

Invariants:

* Worker i reads and writes queue i only, and nobody else has a handle on it. So "nobody is left" on queue i is the
  death of worker i.
* ``restart`` gives the new worker a new queue: it never reads what was written to the one before. The new worker takes
  the place of the old one when it has started: if that fails, the old one is there as before.
* The group notes each worker's end that it has told, until ``restart``. ``recv_any`` tells it once, and then hears the
  others; ``recv`` and ``gather`` tell it each time, at once.
* A ``gather`` that tells of a death has heard all the others first: the next one begins a new round.
"""

from __future__ import annotations

import operator
import queue
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Final, final

from . import mapping, tracebacks
from .errors import QueueClosed, WorkerDied
from .mapping import Map
from .marshalling import exceptions
from .queues import WorkQueue, labelled
from .selecting import select
from .workers.backend import Backend, find
from .workers.starting import check_number, name_of

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
        #: The worker whose turn to be heard is next.
        self._heard = 0
        #: How many messages each worker has got beyond the answers that it has given.
        self._unanswered = [0] * n
        #: Of the workers that have ended, what was told.
        self._ended: dict[int, WorkerDied] = {}
        self._closed = False
        try:
            for index in range(n):
                self._queues.append(self._make_queue(index))
                self._maps.append(self._start(self._queues[index], index, n))
        except BaseException:
            self.terminate()
            raise

    def _start(self, q: WorkQueue, index: int, of: int) -> Map:
        f, args, upvalues = self._call
        return mapping.start(f, (q, *args), range(index, index + 1), of, self._backend, upvalues)

    def _make_queue(self, index: int) -> WorkQueue:
        return labelled(f"{name_of(self._call[0])}[{index}]")

    def _check(self, index: int = 0) -> None:
        if self._closed:
            raise QueueClosed("the group is closed")
        try:
            if 0 <= operator.index(index) < len(self._queues):
                return
            error: Exception = IndexError(f"there is no worker {index}")
        except TypeError:
            error = TypeError(f"a worker is addressed by its number, not by {index!r}")
        error.args = (f"{error}: the group has {len(self._queues)}, with the numbers 0 to {len(self._queues) - 1}",)
        raise error

    # Messages

    def send(self, index: int, *objs: Any) -> None:
        """Write each of ``objs`` to worker ``index``. Never blocks.

        Raises:
            IndexError: there is no such worker.
            MarshalError, QueueClosed: as :meth:`WorkQueue.write`.
        """
        self._check(index)
        self._queues[index].write(*objs)
        self._unanswered[index] += len(objs)

    def broadcast(self, obj: Any) -> None:
        """Write ``obj`` to each worker. A tensor in it is then shared by all."""
        self._check()
        for index, each in enumerate(self._queues):
            each.write(obj)
            self._unanswered[index] += 1

    def recv(self, index: int, timeout: float | None = None) -> Any:
        """Read the next answer of worker ``index``.

        Args:
            index: which worker.
            timeout: how long to wait at most, in seconds; None waits for ever.

        Raises:
            queue.Empty: nothing came within ``timeout``.
            WorkerDied: the worker has died, or has ended, and everything that it had written has been read.
        """
        self._check(index)
        try:
            return self._read(index, timeout)
        except WorkerDied as death:
            tracebacks.trim(death)
            raise death

    def gather(self, timeout: float | None = None, *, return_exceptions: bool = False) -> list[Any]:
        """Read one answer of each worker. Each of them must have been asked: after a ``restart``, too.

        Args:
            timeout: how long to wait at most, in seconds, for all together; None waits for ever.
            return_exceptions: give the WorkerDied of a worker that has ended in the place of its answer; and then None
                for a worker that was not asked.

        Returns:
            The answers, in the order of the workers.

        Raises:
            queue.Empty: not all came within ``timeout``; the text says whose are missing. Those that came are returned
                by the next ``gather``.
            WorkerDied: a worker has died, or has ended (``mapid`` says which), and all others that were asked have
                answered. The round is over, and their answers are gone: ``return_exceptions`` gives them.

        Source: ``asyncio.gather`` for ``return_exceptions``.
        """
        self._check()
        left = _countdown(timeout)
        found: dict[int, Any] = {}
        deaths: dict[int, WorkerDied] = {}
        missing: list[int] = []
        try:
            for index in range(len(self)):
                if deaths and not self._unanswered[index] and not self._early.get(index):
                    continue  # it was not asked: it would be waited for in vain
                try:
                    found[index] = self._read(index, left())
                except WorkerDied as death:
                    deaths[index] = death
                except queue.Empty:
                    missing.append(index)
            if missing:
                raise queue.Empty(f"no answer of worker {', '.join(map(str, missing))} came within {timeout} s")
        except BaseException:
            for index, answer in found.items():
                self._early.setdefault(index, []).insert(0, answer)
            raise
        if deaths and not return_exceptions:
            first, *others = deaths.values()
            for other in others:
                exceptions.add_note(first, f"worker {other.mapid} as well: {other}")
            raise tracebacks.trim(first)
        return [deaths[index] if index in deaths else found.get(index) for index in range(len(self))]

    def recv_any(self, timeout: float | None = None) -> tuple[int, Any]:
        """Read the next answer of whichever worker has one.

        Args:
            timeout: how long to wait at most, in seconds; None waits for ever.

        Returns:
            The worker's number, and its answer.

        Raises:
            queue.Empty: nothing came within ``timeout``.
            WorkerDied: a worker has died, or has ended (``mapid`` says which), if that was not told yet; and if none
                is left.
        """
        self._check()
        left = _countdown(timeout)
        for index, early in self._early.items():
            if early:
                return index, early.pop(0)
        while True:
            # Beginning after the last one that was heard: a fast worker does not keep the others from being heard.
            order = [(self._heard + place) % len(self) for place in range(len(self))]
            order = [index for index in order if index not in self._ended]
            if not order:
                raise WorkerDied(
                    "no worker is left: all have ended; restart(i) starts another in the place of worker i"
                )
            queues = [self._queues[index] for index in order]
            found = next(iter(select(queues, left())), None)
            if found is None:
                raise queue.Empty(f"no worker has answered within {timeout} s")
            index = order[next(place for place, each in enumerate(queues) if each is found)]
            try:
                answer = self._read(index, 0.0)
            except queue.Empty:  # another thread was faster
                continue
            except WorkerDied as death:
                tracebacks.trim(death)
                raise death
            self._heard = (index + 1) % len(self)
            return index, answer

    # Workers

    def restart(self, index: int) -> None:
        """End worker ``index``, at once, and start another in its place, with a queue of its own.

        What was written to the old one and not read is lost, and so are its answers that were not read. The new one has
        to be asked anew.
        """
        self._check(index)
        old_queue, old = self._queues[index], self._maps[index]
        q = self._make_queue(index)
        try:
            new = self._start(q, index, len(self._queues))
        except BaseException:
            q.close()
            raise
        self._queues[index], self._maps[index] = q, new
        self._early.pop(index, None)
        self._ended.pop(index, None)
        self._unanswered[index] = 0
        old_queue.close()
        _end([old], 0.0)

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
        """End all workers at once, and wait for that; threads end when they next run Python code."""
        self.close()
        _end(self._maps, 0.0)

    def __enter__(self) -> WorkerGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the queues and wait for the workers, 5 seconds at most; then, or after an error, end them by force.

        Raises the error of a worker that has failed, if nobody was told of it, and WorkerDied if one did not end.
        """
        self.close()
        late = _end(self._maps, _END_TIMEOUT if error is None else 0.0)
        for each in late:
            each.ignore_errors()
        if error is not None:
            return
        for index, each in enumerate(self._maps):
            if each in late:
                raise WorkerDied(
                    f"worker {index} did not end within {_END_TIMEOUT:g} s after its queue was closed, and was ended "
                    f"by the group: let it end then, as `for message in q:` does, or call terminate()",
                    mapid=index,
                    pid=each.pids[0],
                )
            if each.wait(0.0) and not each.were_errors_retrieved:
                each.join()

    def __len__(self) -> int:
        return len(self._maps)

    def __iter__(self) -> Iterator[WorkQueue]:
        """The queues of the workers, for :func:`torchwq.select`, ``asyncio`` and ``drain``."""
        return iter(list(self._queues))

    def __repr__(self) -> str:
        running = sum(not each.wait(0.0) for each in self._maps)
        return f"<torchwq.WorkerGroup of {len(self)} workers, {running} running{', closed' * self._closed}>"

    def _read(self, index: int, timeout: float | None) -> Any:
        early = self._early.get(index)
        if early:
            return early.pop(0)
        if index in self._ended:
            raise self._told_again(index)
        try:
            answer = self._queues[index].read(timeout=timeout)
            self._unanswered[index] = max(0, self._unanswered[index] - 1)
            return answer
        except WorkerDied as death:
            death.mapid = index
            self._ended[index] = death
            raise

    def _told_again(self, index: int) -> WorkerDied:
        """What says that a worker has ended, of which was told before. A new one: its traceback would grow."""
        told = self._ended[index]
        text = f"{told}. This was told before: restart({index}) starts another worker in its place"
        again = WorkerDied(text, mapid=index, pid=told.pid, signal=told.signal, exitcode=told.exitcode)
        again.__cause__ = told.__cause__
        return again


def _end(workers: Sequence[Map], patience: float) -> list[Map]:
    """End workers: let them end by themselves for some seconds, then by force, all at the same time.

    Returns those that were ended by force.
    """
    left = late = _still_running(workers, patience)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for worker in left:
            worker.terminate(number)
        left = _still_running(left, _TERMINATE_TIMEOUT)
    return late


def _still_running(workers: Sequence[Map], timeout: float) -> list[Map]:
    """Those that have not ended after ``timeout`` seconds."""
    left = _countdown(timeout)
    return [worker for worker in workers if not worker.wait(left())]


def _countdown(timeout: float | None) -> Callable[[], float | None]:
    """What is left of ``timeout``, whenever it is called."""
    deadline = None if timeout is None else time.monotonic() + timeout
    return lambda: None if deadline is None else max(0.0, deadline - time.monotonic())
