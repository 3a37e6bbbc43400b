"""``torchwq.map``: start workers that run a function, and wait for them.

The owner looks at the call before anything starts: whether the function wants its ``mapid``, whether its arguments
fit, whether it drags data along. What can be wrong is then wrong in the caller's own traceback.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any, final

from .errors import QueueClosed
from .marshalling import codec, exceptions
from .transport import cleanup, reactor
from .transport.fork import reset_in_child
from .workers import child, shutdown, starting, unretrieved, worker
from .workers.backend import Backend, find
from .workers.starting import check_number

_ENTRY = "torchwq.mapping:run_worker"


class _Outcomes:
    """What the workers of a map have told. It outlives the :class:`Map`: somebody must print what nobody asks for.

    Invariants:

    * A worker's answer becomes its value or its error once, under the lock, in a thread where users' code may run.
    * An error leaves ``errors`` for ``retrieved`` before it is raised or printed. So it is never printed after it was
      raised, and this object, which the finalizer keeps, does not keep the map by a raised error's traceback. The owner
      of a queue may raise the error as a cause; the worker notes that (``error_was_retrieved``).
    """

    def __init__(self, n: int, name: str) -> None:
        self.n = n
        self.changed = threading.Condition()
        self._resolving = threading.RLock()  # unpickling may collect garbage that resolves another
        self.ended = 0
        self.workers: list[worker.Worker] = []
        self.values: dict[int, Any] = {}
        self.errors: dict[int, BaseException] = {}
        self.retrieved: set[int] = set()
        self._name = name
        self._answers: dict[int, tuple[Any, list[int]]] = {}
        self._is_dropped = False
        _pending.add(self)

    def start(self, payloads: list[Any], backend: Backend, held: list[Any]) -> None:
        self.workers = starting.start(len(payloads), _ENTRY, self._on_message, self._on_end, backend=backend)
        for process, payload in zip(self.workers, payloads, strict=True):
            process.keep_alive = held
            process.send(payload)

    def _on_message(self, process: worker.Worker, data: Any, fds: list[int]) -> None:
        self._answers[process.info.mapid] = (data, fds)

    def _on_end(self, process: worker.Worker) -> None:
        if process.exitcode != 0:
            process.error = functools.partial(_error_of, weakref.ref(self), process.info.mapid)
        with self.changed:
            self.ended += 1
            self.changed.notify_all()
            is_over = self._is_dropped and self.ended == self.n
        if is_over:
            # After what else has come with the end: somebody who tells of an error says so.
            reactor.get().call_later(0, lambda: cleanup.call_soon(self._finish))

    def drop(self) -> None:
        """Nobody can ask any more."""
        with self.changed:
            self._is_dropped = True
            is_over = self.ended == self.n
        if is_over:
            self._finish()

    def _finish(self) -> None:
        """It is dropped, and all workers have ended."""
        if any(self._is_unretrieved(process) for process in self.workers):
            self.print_errors()
        else:
            self._discard()

    def _is_unretrieved(self, process: worker.Worker) -> bool:
        mapid = process.info.mapid
        if mapid in self.retrieved or process.error_was_retrieved or not process.ended_event.is_set():
            return False
        return process.exitcode != 0 or (mapid not in self._answers and mapid not in self.values)

    def _discard(self) -> None:
        _pending.discard(self)
        answers, self._answers = self._answers, {}
        for unread in answers.values():
            exceptions.discard_answer(*unread)

    def resolve(self, process: worker.Worker) -> None:
        """Turn what a worker that has ended sent last into its value or its error, once."""
        mapid = process.info.mapid
        with self._resolving:
            if mapid in self.values or mapid in self.errors or mapid in self.retrieved:
                return
            answer = self._answers.pop(mapid, None)
            value, error = (None, process.death_error()) if answer is None else exceptions.decode_answer(*answer)
            if error is None:
                self.values[mapid] = value
                return
            if answer is not None and process.exitcode == 0:
                exceptions.add_note(error, f"raised here while reading what worker {mapid} returned")
            self.errors[mapid] = error

    def move_errors(self, mapids: Iterable[int], errors: dict[int, BaseException]) -> None:
        """Put the errors of these workers into ``errors``, for one who raises them."""
        with self._resolving:
            for mapid in mapids:
                if mapid in self.errors:
                    errors[mapid] = self.errors[mapid]
                    self.retrieved.add(mapid)
                    del self.errors[mapid]

    def print_errors(self, at_exit: bool = False) -> None:
        """Print what nobody has asked for, and can ask for any more."""
        for process in filter(self._is_unretrieved, self.workers):
            if process.error_will_be_retrieved and not at_exit:
                return  # to one who reads from a queue; if not, then at exit
            self.resolve(process)
            handed: dict[int, BaseException] = {}
            self.move_errors([process.info.mapid], handed)
            for mapid, error in handed.items():
                if unretrieved.should_report(process, error):
                    unretrieved.log_error(f"worker {mapid} of torchwq.map({self.n}, {self._name})", error)
        self._discard()


def _error_of(find: Callable[[], _Outcomes | None], mapid: int) -> BaseException | None:
    outcomes = find()
    if outcomes is None:
        return None
    outcomes.resolve(outcomes.workers[mapid])
    return outcomes.errors.get(mapid)


#: Those whose errors may still have to be printed.
_pending: set[_Outcomes] = set()


@reset_in_child
def _forget() -> None:
    _pending.clear()  # they are the parent's


def _print_all() -> None:
    """At exit."""
    for outcomes in list(_pending):
        outcomes.print_errors(at_exit=True)


shutdown.at_report(_print_all)


@final
class Map:
    """Workers started by :func:`torchwq.map`. ``len`` of it is their number.

    An error of theirs that nobody asks for, by :meth:`join` or :meth:`check_errors`, is printed (logged by the logger
    ``torchwq``) when the map is dropped and its workers have ended, or the interpreter ends.

    Source: what torch-ipc's ``ipc.map`` returns.
    """

    def __init__(self, outcomes: _Outcomes) -> None:
        self._outcomes = outcomes
        self._errors: dict[int, BaseException] = {}
        #: The workers whose errors ``check_errors`` has raised.
        self._consumed: set[int] = set()
        weakref.finalize(self, _drop_later, outcomes).atexit = False

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
                own); WorkerDied if the worker died, or ended before it had answered; ResourceError if its answer could
                not be received. Notes on it name the others that failed.

        Source: torch-ipc's ``m:join``.
        """
        outcomes = self._outcomes
        with outcomes.changed:
            if not outcomes.changed.wait_for(lambda: outcomes.ended == outcomes.n, timeout):
                running = outcomes.n - outcomes.ended
                raise TimeoutError(f"{running} of {outcomes.n} workers have not ended within {timeout} s")
        for process in outcomes.workers:
            outcomes.resolve(process)
        outcomes.move_errors(range(outcomes.n), self._errors)
        failed = [mapid for mapid in sorted(self._errors) if mapid not in self._consumed]
        if failed:
            shutdown.block_daemon_at_exit()
            error = self._errors[failed[0]]
            for other in failed[1:]:
                if self._errors[other] is error:
                    continue  # threads may raise the same one
                exceptions.add_note(error, f"worker {other} failed as well: {_summary(self._errors[other])}")
            raise error
        asked = [mapid for mapid in range(outcomes.n) if mapid not in self._consumed]
        for mapid in asked:
            if mapid not in outcomes.values:  # its error was printed: the program ends
                shutdown.block_daemon_at_exit()
                raise outcomes.workers[mapid].death_error()
        return [outcomes.values[mapid] for mapid in asked]

    def check_errors(self) -> None:
        """Raise the error of a worker that has failed, if any has; do not wait.

        The error is consumed: a later call raises the next one, a later :meth:`join` returns the others' results.

        Raises:
            Exception: as :meth:`join`.

        Source: torch-ipc's ``m:checkErrors``.
        """
        outcomes = self._outcomes
        for process in outcomes.workers:
            mapid = process.info.mapid
            if process.ended_event.is_set() and mapid not in self._consumed:
                outcomes.resolve(process)
                outcomes.move_errors([mapid], self._errors)
                if mapid in self._errors:
                    self._consumed.add(mapid)
                    raise self._errors[mapid]

    @property
    def pids(self) -> list[int | None]:
        """Process ids of the workers, in the order of mapid; None for one that has not started yet, or is a thread."""
        return [process.pid for process in self._outcomes.workers]

    def __len__(self) -> int:
        return self._outcomes.n

    def __repr__(self) -> str:
        outcomes = self._outcomes
        return f"<torchwq.Map of {outcomes.n} workers, {outcomes.n - outcomes.ended} running>"


def _drop_later(outcomes: _Outcomes) -> None:
    cleanup.call_soon(outcomes.drop)


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
        *args: its arguments; a :class:`WorkQueue` among them arrives as a worker's handle. Locks, queues and shared
            values of ``multiprocessing`` may be among them, as they may be among those of a process that it starts with
            ``spawn``.
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
    workers = find(backend)
    n = check_number(n, "torchwq.map(number, function, *args)")
    if not callable(f):
        raise TypeError(f"a function is needed to run, not {type(f).__name__}: torchwq.map(number, function, *args)")
    by_position, by_keyword = _wants_mapid(f, args)
    limit = codec.CALL_LIMIT
    payloads = []
    held: list[Any] = []
    for mapid in range(n):
        positional = (*args, mapid) if by_position else args
        keywords = {"mapid": mapid} if by_keyword else {}
        payloads.append(
            codec.encode_call(
                f, positional, keywords, limit, upvalues=upvalues, peer=workers.peer, worker_resources=held
            )
        )
    outcomes = _Outcomes(n, getattr(f, "__qualname__", None) or type(f).__qualname__)
    started = Map(outcomes)
    outcomes.start(payloads, workers, held)
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
        payload = codec.encode_result(value, context.max_payload, "the worker's result", peer=context.peer)
    except QueueClosed:
        payload = codec.encode((None, None), context.max_payload)
    except SystemExit as stop:
        if status := exit_status(stop):
            return status
        payload = codec.encode((None, None), context.max_payload)
    except BaseException as error:
        failed = True
        packed = exceptions.pack_for(context.peer, error)
        context.report_failure(packed)
        payload = exceptions.encode(packed, context.max_payload, context.peer)
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
