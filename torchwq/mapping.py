"""``torchwq.map``: start workers that run a function, and wait for them.

The owner looks at the call before anything starts: whether the function wants its ``mapid``, whether its arguments
fit, whether it drags data along. What can be wrong is then wrong in the caller's own traceback.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable
from typing import Any, final

from .errors import QueueClosed
from .marshalling import codec, exceptions
from .workers import child, starting, worker
from .workers.starting import check_backend

_ENTRY = "torchwq.mapping:run_worker"


@final
class Map:
    """Workers started by :func:`torchwq.map`. ``len`` of it is their number.

    Source: what torch-ipc's ``ipc.map`` returns.
    """

    def __init__(self, n: int) -> None:
        self._changed = threading.Condition()
        self._ended = 0
        self._answers: dict[int, tuple[Any, list[int]]] = {}
        self._values: dict[int, Any] = {}
        self._errors: dict[int, BaseException] = {}
        self._consumed: set[int] = set()
        self._n = n
        self._workers: list[worker.Worker] = []

    def _start(self, payloads: list[Any], backend: str, held: list[Any]) -> None:
        self._workers = starting.start(len(payloads), _ENTRY, self._on_message, self._on_end, backend=backend)
        for process, payload in zip(self._workers, payloads, strict=True):
            process.holds = held
            process.send(payload)

    def _on_message(self, process: worker.Worker, data: Any, fds: list[int]) -> None:
        self._answers[process.info.mapid] = (data, fds)

    def _on_end(self, process: worker.Worker) -> None:
        with self._changed:
            self._ended += 1
            self._changed.notify_all()

    def join(self, timeout: float | None = None) -> list[Any]:
        """Wait until all workers have ended.

        Args:
            timeout: how long to wait at most, in seconds; None waits for ever.

        Returns:
            What each worker's function returned, in the order of mapid; None for one that ended on QueueClosed.
            Workers whose error :meth:`check_errors` has already raised are left out.

        Raises:
            TimeoutError: not within ``timeout``; ``join`` can be called again.
            Exception: the error of the failed worker with the lowest mapid: the exception that its function raised,
                caused by a RemoteTraceback with the worker's traceback (from a thread, the exception itself, with its
                own); WorkerDied if the worker died. Notes on it name the others that failed.

        Source: torch-ipc's ``m:join``.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._ended == self._n, timeout):
                running = self._n - self._ended
                raise TimeoutError(f"{running} of {self._n} workers have not ended within {timeout} s")
        for process in self._workers:
            self._settle(process)
        failed = [mapid for mapid in sorted(self._errors) if mapid not in self._consumed]
        if failed:
            error = self._errors[failed[0]]
            for other in failed[1:]:
                if self._errors[other] is error:
                    continue  # threads may raise the same one
                exceptions.add_note(error, f"worker {other} failed as well: {_summary(self._errors[other])}")
            raise error
        return [self._values[mapid] for mapid in range(self._n) if mapid not in self._consumed]

    def check_errors(self) -> None:
        """Raise the error of a worker that has failed, if any has; do not wait.

        The error is consumed: a later call raises the next one, a later :meth:`join` returns the others' results.

        Raises:
            Exception: as :meth:`join`.

        Source: torch-ipc's ``m:checkErrors``.
        """
        for process in self._workers:
            mapid = process.info.mapid
            if process.ended_event.is_set() and mapid not in self._consumed:
                self._settle(process)
                if mapid in self._errors:
                    self._consumed.add(mapid)
                    raise self._errors[mapid]

    def _settle(self, process: worker.Worker) -> None:
        """Turn what a worker that has ended sent last into its value or its error, once."""
        mapid = process.info.mapid
        with self._changed:
            if mapid in self._values or mapid in self._errors:
                return
            answer = self._answers.pop(mapid, None)
            try:
                value, packed = (None, None) if answer is None else codec.decode(*answer)
                if packed is not None:
                    self._errors[mapid] = exceptions.unpack(packed)
                elif answer is None and process.exitcode != 0:
                    self._errors[mapid] = process.died()
                else:
                    self._values[mapid] = value
            except Exception as error:
                exceptions.add_note(error, f"raised here while reading what worker {mapid} returned")
                self._errors[mapid] = error

    def __del__(self) -> None:
        for unread in self._answers.values():
            codec.discard(*unread)

    @property
    def pids(self) -> list[int | None]:
        """Process ids of the workers, in the order of mapid; None for one that has not started yet, or is a thread."""
        return [process.pid for process in self._workers]

    def __len__(self) -> int:
        return self._n

    def __repr__(self) -> str:
        return f"<torchwq.Map of {self._n} workers, {self._n - self._ended} running>"


def map(n: int, f: Callable[..., Any], /, *args: Any, backend: str = "process", upvalues: bool = False) -> Map:
    """Run ``f(*args, mapid)`` in each of ``n`` new workers, ``mapid`` = 0 … n-1.

    ``mapid`` is passed if ``f`` requires one more positional argument, takes ``*args``, or has a parameter called
    ``mapid``; otherwise ``f(*args)`` is run. Workers are processes with a clean environment: the caller's
    ``__main__`` is not imported, so scripts need no ``if __name__ == "__main__":``, and functions from notebooks
    work. ``sys.path``, the working directory, environment variables and warning filters are the owner's;
    ``torch.set_num_threads(1)`` is set.

    With ``backend="thread"`` the workers are daemon threads of this process, and everything else is as it is with
    processes: arguments and results are copied, but for tensors, closures are refused, and the first error is raised by
    ``join``. Tensors are not moved to shared memory. Threads cannot be killed; they pay where the work releases the
    GIL, or waits.

    Args:
        n: number of workers.
        f: the function. It travels as code; see ``upvalues``.
        *args: its arguments; a :class:`WorkQueue` among them arrives as a worker's handle.
        backend: ``"process"`` or ``"thread"``.
        upvalues: whether ``f`` may be a closure, and use global data of ``__main__``: these are then copied to the
            workers.

    Returns:
        A :class:`Map`. The workers go on if it is dropped; they are ended when the owner ends.

    Raises:
        ValueError: ``n`` is less than 1, or there is no such ``backend``.
        TypeError: ``f`` cannot be called, or not with ``args``.
        ClosureError: ``f`` drags data along.
        MarshalError: ``f`` or an argument cannot travel.
        ResourceError: a limit of the system does not allow so many workers.

    See also: "Processes or threads" in the documentation.

    Source: torch-ipc's ``ipc.map``.
    """
    check_backend(backend)
    if n < 1:
        raise ValueError(f"the number of workers must be at least 1, not {n}")
    if not callable(f):
        raise TypeError(f"a function is needed to run, not {type(f).__name__}")
    by_position, by_keyword = _wants_mapid(f, args)
    limit = codec.CALL_LIMIT
    payloads = []
    held: list[Any] = []
    for mapid in range(n):
        positional = (*args, mapid) if by_position else args
        keywords = {"mapid": mapid} if by_keyword else {}
        payloads.append(
            codec.encode_call(
                f, positional, keywords, limit, upvalues=upvalues, here=backend == "thread", starting=held
            )
        )
    started = Map(n)
    started._start(payloads, backend, held)
    return started


def _wants_mapid(f: Callable[..., Any], args: tuple[Any, ...]) -> tuple[bool, bool]:
    """Whether to pass mapid as the last positional argument, or by keyword. Raises TypeError if ``args`` do not fit."""
    try:
        signature = inspect.signature(f)
    except ValueError:  # some builtins tell nothing about themselves
        return False, False
    parameters = list(signature.parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = sum(p.default is p.empty for p in positional)
    named = signature.parameters.get("mapid")
    if named is not None and named.kind is named.KEYWORD_ONLY:
        by_position, by_keyword = False, True
    else:
        by_position = required > len(args) or any(p.kind is p.VAR_POSITIONAL for p in parameters)
        place = positional.index(named) if named in positional else -1
        by_position = by_position or place == len(args)
        by_keyword = not by_position and place > len(args)
    try:
        signature.bind(*args, *([0] if by_position else []), **({"mapid": 0} if by_keyword else {}))
    except TypeError as error:
        raise TypeError(
            f"{getattr(f, '__qualname__', f)}{signature} cannot be called with these arguments: {error}"
        ) from None
    return by_position, by_keyword


def run_worker(context: child.Context) -> int:
    """Entry of a map's worker: runs the function, sends (value, packed error)."""
    failed = False
    try:
        function, args, keywords = codec.decode(*context.receive())
        value = function(*args, **keywords)
        payload = codec.encode_result(value, context.max_payload, "the worker's result", here=context.here)
    except QueueClosed:
        payload = codec.encode((None, None), context.max_payload)
    except SystemExit as stop:
        return exit_status(stop)
    except BaseException as error:
        failed = True
        context.note_failure()
        payload = exceptions.encode(error, context.max_payload, here=context.here)
    context.send(payload)
    return int(failed)


def exit_status(stop: SystemExit) -> int:
    """The exit status that ``sys.exit`` asks for, as the interpreter would give it."""
    if stop.code is None or isinstance(stop.code, int):
        return stop.code or 0
    print(stop.code, file=sys.stderr)
    return 1


def _summary(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
