"""``torchwq.map``: start workers that run a function, and wait for them.

The owner checks the call before a worker starts: whether the function takes a ``mapid``, whether its arguments fit,
whether it is a closure. So such errors have the caller's own traceback.
"""

from __future__ import annotations

import functools
import inspect
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, final

from . import progress as progress_bars
from . import tracebacks
from .errors import Interrupted, QueueClosed
from .marshalling import codec, exceptions
from .transport import cleanup, reactor
from .transport.fork import reset_in_child
from .workers import child, shutdown, starting, unretrieved, worker
from .workers.backend import Backend, find
from .workers.starting import check_number, name_of

_ENTRY = "torchwq.mapping:run_worker"
#: Seconds that a worker has to end after SIGTERM, when an error leaves a ``with`` block.
_TERMINATE_TIMEOUT = 2.0


class _Outcomes:
    """The answers of a map's workers. They outlive the :class:`Map`, to print the errors that were never retrieved.

    Invariants, beside those of Note [unretrieved errors]:

    * A worker's answer becomes its value or its error once, under the lock, in a thread that may run users' code.
    * An error moves from ``errors`` to ``retrieved`` before it is raised or printed. So no error is printed after it
      was raised, and this object, which the finalizer keeps, does not keep the map alive by a raised error's traceback.
      If the owner of a queue raises the error as a cause, the worker notes that (``error_was_retrieved``).
    """

    def __init__(self, mapids: range, of: int, name: str) -> None:
        self.n = len(mapids)
        self.mapids = mapids
        self._of = of
        self.changed = threading.Condition()
        self._resolving = threading.RLock()  # unpickling may collect garbage that resolves another
        self.ended = 0
        self.workers: list[worker.Worker] = []
        self.values: dict[int, Any] = {}
        self.errors: dict[int, BaseException] = {}
        self.retrieved: set[int] = set()
        self.name = name
        self._answers: dict[int, tuple[Any, list[int]]] = {}
        self._is_dropped = False
        _pending.add(self)

    def start(self, payloads: list[Any], backend: Backend, held: list[Any]) -> None:
        messages = [[payload] for payload in payloads]
        self.workers = starting.start(
            _ENTRY,
            messages,
            self._on_message,
            self._on_end,
            backend=backend,
            keep_alive=held,
            first_mapid=self.mapids.start,
            of=self._of,
        )

    def _on_message(self, process: worker.Worker, data: Any, fds: list[int]) -> None:
        self._answers[process.info.mapid] = (data, fds)

    def _on_end(self, process: worker.Worker) -> None:
        if process.exitcode != 0:
            process.error = functools.partial(_error_of, weakref.ref(self), weakref.ref(process))
        with self.changed:
            self.ended += 1
            self.changed.notify_all()
            is_over = self._is_dropped and self.ended == self.n
        if is_over:
            # Later, after a queue has noted in ``error_will_be_retrieved`` that a reader gets the error.
            reactor.get().call_later(0, lambda: cleanup.call_soon(self.print_errors))

    def drop(self) -> None:
        """The map is garbage: print its errors when all workers have ended."""
        with self.changed:
            self._is_dropped = True
            is_over = self.ended == self.n
        if is_over:
            self.print_errors()

    def is_unretrieved(self, process: worker.Worker) -> bool:
        """Whether a worker has ended with an error that nobody was told of."""
        mapid = process.info.mapid
        if mapid in self.retrieved or process.error_was_retrieved or not process.ended_event.is_set():
            return False
        return process.exitcode != 0 or (mapid not in self._answers and mapid not in self.values)

    def resolve(self, process: worker.Worker) -> None:
        """Decode the answer of a worker that has ended into its value or its error, once."""
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
        """Move the errors of these workers to the caller's ``errors``. The caller raises or prints them."""
        with self._resolving:
            for mapid in mapids:
                if mapid in self.errors:
                    errors[mapid] = self.errors[mapid]
                    self.retrieved.add(mapid)
                    del self.errors[mapid]

    def print_errors(self, at_exit: bool = False) -> None:
        """Print the errors that were not retrieved, and forget all answers."""
        for process in filter(self.is_unretrieved, self.workers):
            if process.error_will_be_retrieved and not at_exit:
                return  # a reader of a queue will get it; if not, it is printed at exit
            self.resolve(process)
            errors: dict[int, BaseException] = {}
            self.move_errors([process.info.mapid], errors)
            for mapid, error in errors.items():
                if unretrieved.should_report(process, error):
                    unretrieved.log_error(f"worker {mapid} of torchwq.map({self._of}, {self.name})", error)
        _pending.discard(self)
        answers, self._answers = self._answers, {}
        for unread in answers.values():
            exceptions.discard_answer(*unread)


def _error_of(
    find_outcomes: Callable[[], _Outcomes | None], find_process: Callable[[], worker.Worker | None]
) -> BaseException | None:
    outcomes, process = find_outcomes(), find_process()
    if outcomes is None or process is None:
        return None
    outcomes.resolve(process)
    return outcomes.errors.get(process.info.mapid)


#: Answers that may have errors to print.
_pending: set[_Outcomes] = set()


@reset_in_child
def _forget() -> None:
    _pending.clear()  # the parent prints them


def _print_all() -> None:
    for outcomes in list(_pending):
        outcomes.print_errors(at_exit=True)


shutdown.at_report(_print_all)


@final
class Map:
    """Workers started by :func:`torchwq.map`. ``len(m)`` is their number.

    An error that neither :meth:`join` nor :meth:`check_errors` has raised is logged (by the logger ``torchwq``) when
    the map is dropped and its workers have ended, or when the interpreter exits.

    Source: what torch-ipc's ``ipc.map`` returns.
    """

    def __init__(self, outcomes: _Outcomes, make_bar: Callable[..., Any] | None = None) -> None:
        self._outcomes = outcomes
        self._make_bar = make_bar
        self._errors: dict[int, BaseException] = {}
        #: The workers whose errors ``check_errors`` has raised.
        self._consumed: set[int] = set()
        #: Those that ``as_completed`` has yielded.
        self._yielded: set[int] = set()
        weakref.finalize(self, _drop_later, outcomes).atexit = False

    def join(self, timeout: float | None = None) -> list[Any]:
        """Wait until all workers have ended.

        Args:
            timeout: how many seconds to wait at most; None waits for ever.

        Returns:
            What each worker's function returned, in the order of mapid; None for one that ended on QueueClosed.
            Workers whose error :meth:`check_errors` has already raised are left out.

        Raises:
            TimeoutError: a worker has not ended within ``timeout``; ``join`` can be called again.
            Exception: the error of the failed worker with the lowest mapid: the exception that its function raised,
                caused by a RemoteTraceback with the worker's traceback (from a thread, the exception itself, with its
                own traceback); WorkerDied if the worker died, or ended before it had answered; ResourceError if the
                owner could not receive its answer. Notes on the error name the other workers that failed.

        Source: torch-ipc's ``m:join``.
        """
        outcomes = self._outcomes
        is_over = self._wait_with_bar(timeout) if self._make_bar is not None else self._wait_for(outcomes.n, timeout)
        if not is_over:
            running = outcomes.n - outcomes.ended
            raise TimeoutError(f"{running} of {outcomes.n} workers have not ended within {timeout} s")
        for process in outcomes.workers:
            outcomes.resolve(process)
        outcomes.move_errors(outcomes.mapids, self._errors)
        failed = [mapid for mapid in sorted(self._errors) if mapid not in self._consumed]
        if failed:
            shutdown.block_daemon_at_exit()
            error = self._errors[failed[0]]
            for mapid in failed[1:]:
                other = self._errors[mapid]
                if other is not error:  # threads may raise the same exception
                    exceptions.add_note(error, f"worker {mapid} failed as well: {type(other).__name__}: {other}")
            raise error
        asked = [mapid for mapid in outcomes.mapids if mapid not in self._consumed]
        for mapid in asked:
            if mapid not in outcomes.values:  # its error was printed: the process is exiting
                shutdown.block_daemon_at_exit()
                raise outcomes.workers[mapid - outcomes.mapids.start].death_error()
        return [outcomes.values[mapid] for mapid in asked]

    def _wait_for(self, ended: int, timeout: float | None) -> bool:
        """Wait until so many workers have ended, ``timeout`` seconds at most; returns whether they have."""
        outcomes = self._outcomes
        with outcomes.changed:
            return outcomes.changed.wait_for(lambda: outcomes.ended >= ended, timeout)

    def _wait_with_bar(self, timeout: float | None) -> bool:
        """The same for all workers, with a bar. It is drawn without the lock, for which the reactor waits."""
        assert self._make_bar is not None
        outcomes = self._outcomes
        deadline = None if timeout is None else time.monotonic() + timeout
        shown = 0
        with self._make_bar(total=outcomes.n, desc=outcomes.name, unit="worker") as bar:
            while shown < outcomes.n:
                if not self._wait_for(shown + 1, None if deadline is None else max(0.0, deadline - time.monotonic())):
                    return False
                ended = outcomes.ended
                bar.update(ended - shown)
                shown = ended
        return True

    def check_errors(self) -> None:
        """Raise the error of a worker that has failed, if one has. Never waits.

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

    def as_completed(self, timeout: float | None = None) -> Iterator[tuple[int, Any]]:
        """Yield ``(mapid, result)`` of each worker as it ends, whichever is first.

        Args:
            timeout: how many seconds to wait at most, all in all; None waits for ever.

        Raises:
            TimeoutError: not all have ended within ``timeout``.
            Exception: a worker's error, when its turn comes, as :meth:`join` raises it. It is consumed, as by
                :meth:`check_errors`: a later :meth:`join` returns the others' results. A further call goes on with
                those that were not yielded yet.

        Source: ``concurrent.futures.as_completed``.
        """
        outcomes = self._outcomes
        deadline = None if timeout is None else time.monotonic() + timeout
        known = self._consumed | self._yielded
        left = {process.info.mapid: process for process in outcomes.workers if process.info.mapid not in known}
        while left:
            ended: list[int] = []

            def look(ended: list[int] = ended) -> bool:
                ended[:] = [mapid for mapid, process in left.items() if process.ended_event.is_set()]
                return bool(ended)

            with outcomes.changed:
                if not outcomes.changed.wait_for(look, None if deadline is None else deadline - time.monotonic()):
                    raise TimeoutError(f"{len(left)} of {outcomes.n} workers have not ended within {timeout} s")
            for mapid in ended:
                process = left.pop(mapid)
                self._yielded.add(mapid)
                outcomes.resolve(process)
                outcomes.move_errors([mapid], self._errors)
                if mapid in self._errors:
                    self._consumed.add(mapid)
                    raise self._errors[mapid]
                yield mapid, outcomes.values[mapid]

    @property
    def were_errors_retrieved(self) -> bool:
        """Whether somebody was told of the errors of all workers that have one: by a queue, or by this."""
        outcomes = self._outcomes
        return not any(outcomes.is_unretrieved(process) for process in outcomes.workers)

    def ignore_errors(self) -> None:
        """The caller has ended these workers, and knows why: nobody needs to be told."""
        for process in self._outcomes.workers:
            process.error_was_retrieved = True

    def terminate(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End the workers: processes by a signal, threads when they next run Python code. Does not wait for that.

        :meth:`join` then raises WorkerDied. Workers that have ended are left alone. May be called again.

        Args:
            number: the signal.

        Source: ``multiprocessing.Process.terminate``.
        """
        for process in self._outcomes.workers:
            if not process.ended_event.is_set():
                process.was_terminated = True
                process.terminate(number)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until all workers have ended, ``timeout`` seconds at most. Returns whether they have; raises nothing."""
        deadline = None if timeout is None else time.monotonic() + timeout
        for process in self._outcomes.workers:
            if not process.wait(None if deadline is None else max(0.0, deadline - time.monotonic())):
                return False
        return True

    def __enter__(self) -> Map:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait for the workers; if an error leaves the block, end them instead."""
        if error is None:
            self.join()
            return
        self.terminate()
        if not self.wait(_TERMINATE_TIMEOUT):
            self.terminate(signal.SIGKILL)

    @property
    def pids(self) -> list[int | None]:
        """Process ids of the workers, in the order of mapid. None: the worker has not started yet, or is a thread."""
        return [process.pid for process in self._outcomes.workers]

    def __len__(self) -> int:
        return self._outcomes.n

    def __repr__(self) -> str:
        outcomes = self._outcomes
        return f"<torchwq.Map of {outcomes.n} workers, {outcomes.n - outcomes.ended} running>"


def _drop_later(outcomes: _Outcomes) -> None:
    cleanup.call_soon(outcomes.drop)


def map(
    n: int,
    f: Callable[..., Any],
    /,
    *args: Any,
    backend: str | Backend = "process",
    upvalues: bool = False,
    progress: bool = False,
) -> Map:
    """Run ``f(*args, mapid)`` in each of ``n`` new workers, ``mapid`` = 0 … n-1.

    ``mapid`` is passed if ``f`` requires one more positional argument, takes ``*args``, or has a parameter called
    ``mapid``; otherwise ``f(*args)`` is run. Workers are processes with a clean environment: the caller's
    ``__main__`` is not imported, so scripts need no ``if __name__ == "__main__":``, and functions from notebooks
    work. A worker has the owner's ``sys.path``, working directory, environment variables and warning filters, and calls
    ``torch.set_num_threads(1)``.

    With ``backend="thread"`` the workers are daemon threads of this process. Like processes, they get copies of
    arguments and return copies of results, except for tensors; closures are refused, and ``join`` raises the first
    error. Tensors are not moved to shared memory. Threads cannot be killed. They pay where the work releases the GIL,
    or waits.

    Args:
        n: number of workers.
        f: the function. It travels as code; see ``upvalues``.
        *args: its arguments. A :class:`WorkQueue` arrives as a worker's handle. Locks, queues and shared values of
            ``multiprocessing`` are allowed, as in the arguments of a process that it starts with ``spawn``.
        backend: ``"process"``, ``"thread"`` or ``"ray"``: workers on the machines of a Ray cluster, to which tensors
            travel by value; :class:`torchwq.ray.Backend` has options.
        upvalues: whether ``f`` may be a closure, and use global data of ``__main__``, which are then copied to the
            workers.
        progress: whether ``join`` shows how many of the workers have ended, with tqdm.

    Returns:
        A :class:`Map`. The workers go on if it is dropped, and end with their owner.

    Raises:
        ValueError: ``n`` is less than 1, or there is no such ``backend``.
        TypeError: ``f`` cannot be called, or not with ``args``.
        ClosureError: ``f`` is a closure, or uses global data of ``__main__``.
        MarshalError: ``f`` or an argument cannot be sent.
        ResourceError: the system's limits do not allow so many workers.
        ImportError: ``progress`` is asked for and tqdm is not installed.

    See also: "Processes or threads" in the documentation.

    Source: torch-ipc's ``ipc.map``.
    """
    workers = find(backend)
    usage = "torchwq.map(number, function, *args)"
    n = check_number(n, usage)
    check_function(f, usage)
    make_bar = progress_bars.check(progress)
    try:
        return start(f, args, range(n), n, workers, upvalues, make_bar)
    except Exception as error:
        tracebacks.trim(error)
        raise error


def check_function(f: Any, usage: str) -> None:
    """Raise TypeError if ``f`` cannot be called. ``usage`` is a proper call, for the error."""
    if not callable(f):
        raise TypeError(f"a function is needed to run, not {type(f).__name__}: {usage}")


def start(
    f: Callable[..., Any],
    args: tuple[Any, ...],
    mapids: range,
    of: int,
    backend: Backend,
    upvalues: bool,
    make_bar: Callable[..., Any] | None = None,
) -> Map:
    """Start the workers with these mapids, ``of`` so many in all. ``make_bar`` is tqdm, if at all. Raises as map."""
    by_position, by_keyword = _wants_mapid(f, args)
    payloads = []
    held: list[Any] = []
    for mapid in mapids:
        positional = (*args, mapid) if by_position else args
        keywords = {"mapid": mapid} if by_keyword else {}
        payloads.append(
            codec.encode_call(f, positional, keywords, upvalues=upvalues, peer=backend.peer, worker_resources=held)
        )
    outcomes = _Outcomes(mapids, of, name_of(f))
    started = Map(outcomes, make_bar)
    outcomes.start(payloads, backend, held)
    return started


def _wants_mapid(f: Callable[..., Any], args: tuple[Any, ...]) -> tuple[bool, bool]:
    """Whether to pass mapid as the last positional argument, or by keyword. Raises TypeError if ``args`` do not fit."""
    try:
        signature = inspect.signature(f)
    except ValueError:  # a builtin without a signature
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
    """Run the function in a worker of a map, and send (value, packed error)."""
    failed = False
    try:
        function, args, keywords = codec.decode(*context.receive())
        value = function(*args, **keywords)
        payload = codec.encode_result(value, context.max_payload, "the worker's result", peer=context.peer)
    except QueueClosed:
        payload = codec.encode((None, None), context.max_payload)
    except Interrupted:  # a thread that was ended from outside has no result
        return 1
    except SystemExit as stop:
        if status := child.exit_status(stop):
            return status
        payload = codec.encode((None, None), context.max_payload)
    except BaseException as error:
        failed = True
        packed = exceptions.pack_for(context.peer, error)
        context.report_failure(packed)
        payload = exceptions.encode(packed, context.max_payload, context.peer)
    context.send(payload)
    return int(failed)
