"""``BackgroundTaskPool``: a ``concurrent.futures.Executor`` on torchwq's workers.

One thread per pool assigns tasks to idle workers, completes futures, and replaces workers that died. A worker gets its
next task when it has finished the one before. So the pool always knows which task a dead worker had, no short task
waits behind a long one while a worker is idle, and every other task can still be cancelled.

A worker that is a thread completes its task's future by itself, and takes its next task: switching to the pool's thread
and back would cost many times as much as a small task. It leaves to the pool's thread what must not run in a worker:
unpickling a result, which may have a handle in it, and a future's callbacks.

Invariants:

* The assigned tasks of a worker are in the order in which it does them, and are completed in that order: the result
  that comes is that of the first. A worker completes a task by itself only if it has no other.
* A task is in ``waiting`` or assigned to a worker, at any moment at which nobody holds the lock, until it is completed
  or turns out to be cancelled. So the pool's thread can see whether any is left. If a worker that is a thread has none
  left while the pool closes, it sends an event: the pool's thread may wait for just that.
* Only a worker that is a thread assigns tasks to itself: its messages cannot overtake each other. It puts itself into
  ``idle``, under the lock, when ``waiting`` is empty. Whoever takes it out sends it ``_LOOK``. To look once too often
  does no harm.
* No task waits while a worker that is a thread is idle, but for moments: each one that takes a task wakes another if
  more wait. This mends what a submit that a signal handler has interrupted may leave.
* ``wants_wakeup`` is set, under the lock, if less than ``n`` workers run, or if an idle one cannot look by itself. Else
  each worker looks at ``waiting``, or sends a result, before the pool's thread needs to know of a new task.
* ``ThreadWorker.terminate`` does not interrupt a worker while it takes a task (Note [interrupting threads]). The tasks
  assigned to the worker then fail, as with any worker that ends.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import queue
import signal
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, TypeVar, final

from . import progress as progress_bars
from . import tracebacks
from .errors import QueueClosed, ResourceError
from .marshalling import codec, exceptions
from .transport.fork import reset_in_child
from .workers import child, shutdown, starting, unretrieved, worker
from .workers.backend import Backend, find
from .workers.starting import check_number, name_of

T = TypeVar("T")

_ENTRY: Final = "torchwq.pool:run_worker"
#: To a worker that is a thread: look for a task. The worker sends it back, and takes a task while it sends.
_LOOK: Final = ()


@dataclass(slots=True, eq=False)
class _Task:
    future: unretrieved.Future[Any]
    payload: codec.Encoded
    name: str
    #: Whether the future is running already: the task came back from a worker that was dead.
    started: bool = False
    #: Whether to print the task's error if no caller retrieves it.
    should_report: bool = True
    #: Whether a worker that is a thread has done the task, and leaves its completion to the pool's thread.
    is_done: bool = False

    def start(self) -> bool:
        """Set the future running. Returns False if it was cancelled, or if a user has completed it."""
        if not self.started:
            try:
                self.started = self.future.set_running_or_notify_cancel()
            except RuntimeError:  # completed; concurrent.futures has logged the state
                return False
        return self.started


class _PoolThread(threading.Thread):
    """The pool's thread. Its ``events`` are (kind, worker, message).

    Other threads use what ``lock`` guards; a worker that is a thread also appends to its own assigned tasks, and takes
    them out again. Only this thread uses the rest.
    """

    def __init__(self, n: int, setup: codec.Encoded, backend: Backend, held: list[Any]) -> None:
        super().__init__(name="torchwq-pool", daemon=True)
        self.n = n
        self.events: queue.SimpleQueue[tuple[str, Any, Any]] = queue.SimpleQueue()
        #: Guards the next five. Reentrant, because any thread may collect a pool, at any time.
        self.lock = threading.RLock()
        self.waiting: deque[_Task] = deque()
        self.idle: deque[worker.Worker] = deque()
        self.closing = False
        self.broken: BaseException | None = None
        #: Whether ``submit`` must send this thread an event.
        self.wants_wakeup = True
        #: Whether workers are threads, which take tasks by themselves.
        self._workers_look = backend.peer.same_process
        self._start_one = functools.partial(starting.start, _ENTRY, [[setup]], backend=backend, of=n)
        self._held = held  # objects that the setup message needs as long as workers start
        self._workers: dict[int, worker.Worker] = {}
        self._assigned: dict[int, deque[_Task]] = {}
        self._starting: set[int] = set()
        self._is_killed = False

    def run(self) -> None:
        try:
            while True:
                kind, process, message = self.events.get()
                if kind == "message":
                    self._handle_message(process, *message)
                elif kind == "end":
                    self._handle_end(process)
                process = message = None  # the next event may come much later
                self._assign_tasks()
                with self.lock:
                    if self.closing and not self.waiting and not any(self._assigned.values()):
                        break
            self._stop_workers()
        finally:
            _pools.discard(self)

    def _assign_tasks(self) -> None:
        wanted = 0
        while self.broken is None:
            with self.lock:
                self.wants_wakeup = len(self._workers) < self.n or (bool(self.idle) and not self._workers_look)
                if not self.waiting:
                    return
                if self._workers_look:
                    for _ in range(min(len(self.waiting), len(self.idle))):
                        self.wake()
                if self._workers_look or not self.idle:
                    # Workers without a task are starting, or about to look. Less than 0 if others have taken the tasks.
                    without_task = sum(not assigned for assigned in self._assigned.values())
                    wanted = min(len(self.waiting) - without_task, self.n - len(self._workers))
                    break
                task = self.waiting.popleft()
                process = self.idle.popleft()
            if not task.start():
                with self.lock:
                    self.idle.appendleft(process)
                continue
            assigned = self._assigned[process.info.mapid]
            assigned.append(task)
            try:
                if process.send(task.payload):
                    continue
                # It died idle. Another worker gets the task after this one's end event.
                with self.lock:
                    self.waiting.appendleft(task)
            except ResourceError as error:
                with self.lock:
                    self.idle.append(process)
                _complete(task, None, error)
            assigned.remove(task)
        for _ in range(wanted):
            if self.broken is None:
                self._start_worker()

    def _start_worker(self) -> None:
        mapid = next(number for number in range(self.n) if number not in self._workers)
        self._assigned[mapid] = deque()
        self._starting.add(mapid)
        try:
            (self._workers[mapid],) = self._start_one(self._on_message, self._on_end, first_mapid=mapid)
        except Exception as error:  # any error must fail the futures
            self._starting.discard(mapid)
            self._mark_broken(error)

    def wake(self) -> None:
        """See to it that a worker takes a task out of ``waiting``. Call it with the lock."""
        if self._workers_look and self.idle:
            # See Note [Statements that nothing interrupts]: a signal handler may submit a task, or raise.
            process = self.idle[-1]
            del self.idle[-1]
            try:
                process.send(_LOOK)
            except BaseException:
                self.idle.append(process)
                raise
        elif self.wants_wakeup:
            self.events.put(("wake", None, None))

    def _on_message(self, process: worker.Worker, data: Any, fds: list[int]) -> None:
        mapid = process.info.mapid
        if not self._workers_look or mapid in self._starting:
            self.events.put(("message", process, (data, fds)))
        else:  # in the worker's thread
            self._complete_and_go_on(process, self._assigned[mapid], data, fds)

    def _complete_and_go_on(self, process: worker.Worker, assigned: deque[_Task], data: Any, fds: list[int]) -> None:
        """Complete the task whose result is ``data``, and let the worker do its next one."""
        with self.lock:
            current = assigned[-1] if assigned and not assigned[-1].is_done else None
            is_only_task = len(assigned) == 1
        if data == _LOOK and current is not None:
            return  # a _LOOK too many: the next message has that task
        following = self._next_task(process, assigned)
        if current is not None:
            if is_only_task and type(data) is tuple and _complete_without_callbacks(current, *data):
                assigned.popleft()
            else:
                current.is_done = True
                self.events.put(("message", process, (data, fds)))
        if following is not None:
            process.send(following.payload)
        elif self.closing:
            self.events.put(("wake", None, None))

    def _next_task(self, process: worker.Worker, assigned: deque[_Task]) -> _Task | None:
        """Assign the next task to a worker that is a thread. If there is none, the worker becomes idle."""
        while True:
            with self.lock:
                is_idle = process in self.idle  # it looks once too often
                if self.broken is not None or not self.waiting:
                    if not is_idle:
                        self.idle.append(process)
                    return None
                if is_idle:
                    with contextlib.suppress(ValueError):  # a finalizer has submitted a task, and sent the next _LOOK
                        self.idle.remove(process)
                task = self.waiting.popleft()
                assigned.append(task)
                if self.waiting and self.idle:
                    self.wake()
            if task.start():
                return task
            assigned.pop()

    def _on_end(self, process: worker.Worker) -> None:
        self.events.put(("end", process, None))

    def _handle_message(self, process: worker.Worker, data: Any, fds: list[int]) -> None:
        mapid = process.info.mapid
        value, error = exceptions.decode_answer(data, fds)
        if mapid in self._starting:
            self._starting.discard(mapid)
            if error is not None:
                self._mark_broken(error)
                return
        else:
            with self.lock:
                task = self._assigned[mapid].popleft()
            _complete(task, value, error)
            if self._workers_look:
                return  # it takes the next task by itself, or has put itself into ``idle``
        with self.lock:
            self.idle.append(process)

    def _handle_end(self, process: worker.Worker) -> None:
        mapid = process.info.mapid
        self._workers.pop(mapid, None)
        with self.lock, contextlib.suppress(ValueError):
            self.idle.remove(process)
        for task in self._assigned.pop(mapid, ()):
            death = process.death_error(f"the task {task.name}")
            task.should_report = not self._is_killed and unretrieved.should_report(process, death)
            _complete(task, None, death)
        if mapid in self._starting:
            # A replacement would die, too, and be replaced for ever.
            self._starting.discard(mapid)
            if self.broken is None:
                self._mark_broken(process.death_error("the pool's initializer"))

    def _mark_broken(self, cause: BaseException) -> None:
        """No worker can be started: fail all tasks, present and future."""
        with self.lock:
            self.broken = cause
            waiting, self.waiting = list(self.waiting), deque()
        for task in waiting:
            if task.start():
                _complete(task, None, self.error())

    def error(self) -> concurrent.futures.BrokenExecutor:
        error = concurrent.futures.BrokenExecutor(f"the pool's workers cannot be started: {self.broken}")
        error.__cause__ = self.broken
        return error

    def _stop_workers(self) -> None:
        finished = codec.encode(None, codec.CALL_LIMIT)
        for process in self._workers.values():
            process.send(finished)
        for process in list(self._workers.values()):
            process.ended_event.wait()

    def shut_down(self, cancel: bool) -> None:
        with self.lock:
            self.closing = True
            cancelled = [task for task in self.waiting if not task.started] if cancel else []
            if cancel:
                self.waiting = deque(task for task in self.waiting if task.started)
        for task in cancelled:
            task.future.cancel()
            task.start()
        self.events.put(("wake", None, None))

    def abandon(self) -> None:
        """Leave the pool to the parent, in the child of a fork: no other thread is here, and one may hold the lock."""
        self.lock = threading.RLock()
        self.broken = RuntimeError("they are the workers of the process that has forked this one")

    def kill(self) -> None:
        self._is_killed = True
        for process in list(self._workers.values()):
            process.terminate(signal.SIGKILL)


def _complete(task: _Task, value: Any, error: BaseException | None) -> None:
    try:
        if error is None:
            task.future.set_result(value)
            return
        if not task.should_report:
            task.future.ignore_error()
        task.future.set_exception(error, f"the task {task.name} of a torchwq.BackgroundTaskPool")
    except concurrent.futures.InvalidStateError:  # a user has completed it
        pass


def _complete_without_callbacks(task: _Task, value: Any, error: BaseException | None) -> bool:
    """Complete a task, unless its future has callbacks."""
    future = task.future
    with future._condition:  # add_done_callback takes it, too
        if future._done_callbacks:  # type: ignore[attr-defined]
            return False
        _complete(task, value, error)
    return True


_pools: set[_PoolThread] = set()


def _finish_all() -> None:
    pools = list(_pools)
    for pool in pools:
        pool.shut_down(cancel=False)
    for pool in pools:
        while pool.is_alive():
            pool.join(0.1)


shutdown.at_finish(_finish_all)


@reset_in_child
def _forget() -> None:
    for pool in list(_pools):
        pool.abandon()
    _pools.clear()  # the parent has their threads


@final
class BackgroundTaskPool(concurrent.futures.Executor):
    """A pool of ``n`` workers that run tasks: ``submit``, ``map``, ``shutdown``, ``with``.

    Its futures work with ``concurrent.futures.wait`` and ``as_completed`` and ``asyncio.wrap_future``. Tasks that have
    not started can be cancelled. Functions get no ``mapid``; :func:`torchwq.worker_info` returns in which worker they
    run. Workers start when tasks need them. If a worker dies, only the task that it had in hand fails, with WorkerDied,
    and the pool replaces the worker.

    Args:
        n: the largest number of workers; None: the number of cores that this process may use, or of
            places on the cluster.
        backend: ``"process"``, ``"thread"`` or ``"ray"``; see :func:`torchwq.map`.
        upvalues: whether functions may be closures and use global data of ``__main__``, copied with each task.
        initializer: a function that each worker runs before its first task. If it raises, the pool is broken: tasks
            fail with ``concurrent.futures.BrokenExecutor``.
        initargs: the arguments of ``initializer``.

    Raises:
        ValueError: ``n`` is less than 1, or there is no such ``backend``.
        TypeError: ``n`` is no integer.
        ClosureError, MarshalError: the initializer or its arguments cannot be sent.

    Source: torch-ipc's ``ipc.BackgroundTaskPool``; ``concurrent.futures.ProcessPoolExecutor``.
    """

    def __init__(
        self,
        n: int | None = None,
        *,
        backend: str | Backend = "process",
        upvalues: bool = False,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
    ) -> None:
        self._backend = find(backend)
        self._backend.prepare()
        n = self._backend.places() if n is None else check_number(n, "torchwq.BackgroundTaskPool(number)")
        if initializer is not None and not callable(initializer):
            raise TypeError(f"initializer must be a function, not {type(initializer).__name__}")
        self._upvalues = upvalues
        held: list[Any] = []
        setup = codec.encode_call(
            initializer, initargs, None, upvalues=upvalues, peer=self._backend.peer, worker_resources=held
        )
        self._pool = _PoolThread(n, setup, self._backend, held)
        _pools.add(self._pool)
        self._pool.start()
        weakref.finalize(self, self._pool.shut_down, False).atexit = False

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[T]:
        """Run ``fn(*args, **kwargs)`` in a worker.

        Returns:
            The result's future. It raises the exception of ``fn``, with the worker's traceback, or WorkerDied.

        Raises:
            ClosureError: ``fn`` captures data; pass the data as arguments, or make the pool with ``upvalues=True``.
            MarshalError: ``fn`` or an argument cannot be sent.
            RuntimeError: the pool was shut down.
            concurrent.futures.BrokenExecutor: the initializer has failed.

        Source: ``concurrent.futures.Executor.submit``.
        """
        pool, peer = self._pool, self._backend.peer
        try:
            payload = codec.encode_call(
                fn, args, kwargs or None, upvalues=self._upvalues, peer=peer, is_sent_later=True
            )
        except Exception as error:
            tracebacks.trim(error)
            raise error
        future: unretrieved.Future[T] = unretrieved.Future()
        # ``fn`` may be an object that answers with a user's code, which must not run with the lock.
        task = _Task(future, payload, name_of(fn))
        with pool.lock:
            if pool.broken is not None:
                raise pool.error()
            if pool.closing:
                raise RuntimeError("cannot schedule new futures after shutdown")
            pool.waiting.append(task)
            pool.wake()
        return future

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        progress: bool = False,
        **options: Any,
    ) -> Iterator[T]:
        """Run ``fn`` with the items of ``iterables`` side by side. Yields the results in the items' order.

        Args:
            fn, *iterables, timeout, chunksize: as for ``concurrent.futures.Executor.map``.
            progress: whether to show, with tqdm, how many of the results were taken.
            **options: what else this Python's ``Executor.map`` takes.

        Raises:
            TimeoutError: a result did not come within ``timeout`` seconds of this call.
            ImportError: ``progress`` is asked for and tqdm is not installed.
            Exception: as :meth:`submit`, and that of the first task that has failed, when its turn comes.

        Source: ``concurrent.futures.Executor.map``.
        """
        make_bar = progress_bars.check(progress)
        if make_bar is None:
            return super().map(fn, *iterables, timeout=timeout, chunksize=chunksize, **options)
        items = list(zip(*iterables, strict=False))
        results = super().map(fn, *zip(*items, strict=True), timeout=timeout, chunksize=chunksize, **options)
        return iter(make_bar(results, total=len(items), desc=name_of(fn), unit="task"))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more tasks, and end the workers when the submitted tasks are done.

        Args:
            wait: return only when the workers have ended.
            cancel_futures: cancel the tasks that have not started.

        Source: ``concurrent.futures.Executor.shutdown``.
        """
        self._pool.shut_down(cancel_futures)
        if wait:
            self._pool.join()

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        """Shut down and wait. After Ctrl-C cancel and kill instead, and do not wait for threads: they may not end."""
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        if interrupted:
            self._pool.shut_down(cancel=True)
            self._pool.kill()
        self.shutdown(wait=not (interrupted and not self._backend.can_be_killed))

    def __repr__(self) -> str:
        pool = self._pool
        state = "broken" if pool.broken is not None else "shut down" if pool.closing else "open"
        return f"<torchwq.BackgroundTaskPool of {pool.n} workers, {state}, {len(pool.waiting)} tasks waiting>"


def run_worker(context: child.Context) -> int:
    """Run the initializer and then tasks in a worker of a pool, until None. For each, send (value, packed error).

    A ``_LOOK`` goes back as it is.
    """
    limit = context.max_payload
    while True:
        try:
            call = codec.decode(*context.receive())
        except EOFError:
            return 0
        except Exception as error:
            context.send(_failure(context, error))
            continue
        try:
            if call is None:
                return 0
            if not call:
                context.send(call)
                continue
            function, args, kwargs = call
            value = None if function is None else function(*args, **(kwargs or {}))
            payload = codec.encode_result(value, limit, "the task's result", peer=context.peer)
        except SystemExit as stop:
            return child.exit_status(stop)
        except BaseException as error:
            payload = _failure(context, error)
        value = function = args = kwargs = call = None
        context.report_success()
        context.send(payload)
        payload = None  # it may be the result itself


def _failure(context: child.Context, error: BaseException) -> codec.Encoded:
    packed = exceptions.pack_for(context.peer, error)
    if not isinstance(error, QueueClosed):
        context.report_task_failure(packed)
    return exceptions.encode(packed, context.max_payload, context.peer)
