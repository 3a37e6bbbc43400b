"""``BackgroundTask``: one function in one worker, as a future, or as an iterator that produces ahead.

The iterator is a workqueue with credit-based flow control. The consumer writes a *credit* for each item that the
producer may make; the producer reads a credit, makes an item, and writes it. The task begins with ``prefetch`` credits,
and taking an item gives one more. So at most ``prefetch`` items are made and not yet taken, and a producer whose
consumer has left reads "closed".

The worker's control connection brings the task's end, which completes the future in a thread of the task's own. The
thread keeps a plain task alive, which runs to its end in any case. It has only a weak reference to an iterator: when
the consumer drops the iterator, the producer stops.
"""

from __future__ import annotations

import contextlib
import enum
import queue
import signal
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Final, TypeVar, final

from torch.utils.data import Dataset

from . import tracebacks
from .errors import MarshalError, QueueClosed, ResourceError, WorkerDied
from .marshalling import codec, exceptions
from .queues import WorkQueue, labelled
from .transport import cleanup, reactor
from .transport.capabilities import SAME_PROCESS
from .transport.fork import reset_in_child
from .workers import child, shutdown, starting, unretrieved, worker
from .workers.backend import Backend, find

T = TypeVar("T")

_ENTRY: Final = "torchwq.background:run_worker"
#: How many seconds a producer has to finish its present item after the consumer has left.
_GRACE_PERIOD: Final = 5.0

# The producer writes pairs: one of these kinds, and a value.
_ITEM, _END, _ERROR, _NO_ITERATOR, _DIED = range(5)


class _IsIterator(enum.Enum):
    """Sent in the place of a value by a worker whose function has returned an iterator."""

    YES = enum.auto()


_IS_ITERATOR: Final = _IsIterator.YES


@final
class BackgroundTask(unretrieved.Future[T]):
    """Run a function in the background, at once; or produce the items of an iterable ahead.

    As a future: ``done()``, ``result(timeout)``, ``exception()``, ``add_done_callback``; it works with
    ``concurrent.futures.wait`` and ``as_completed`` and ``asyncio.wrap_future``. It is running from the start, so
    ``cancel()`` returns False.

    As an iterator, if ``f`` is a generator function or returns an iterator, or if ``f`` is a Dataset or another
    iterable: the worker makes the items, at most ``prefetch`` ahead of their consumer. Leaving a ``for`` loop early, or
    :meth:`close`, stops the producer. An error is raised at the item where it happened, after the items before it. An
    exhausted task stays exhausted; its ``result()`` is the generator's return value.

    Args:
        f: a function; or an iterator, an iterable, an iterable Dataset, or a map-style Dataset, which is read from
            index 0 to its end. A function gets no ``mapid``. It travels as code; see ``upvalues``.
        *args: the function's arguments.
        prefetch: how many items may be ready and not taken; at least 1.
        backend: ``"process"``, ``"thread"`` or ``"ray"``; see :func:`torchwq.map`. A producer that is a thread ends
            between two items, not in the middle of one.
        upvalues: whether ``f`` may be a closure and use global data of ``__main__``, which are then copied to the
            worker.

    Raises:
        ClosureError: ``f`` is a closure, or uses global data of ``__main__``.
        MarshalError: ``f`` or an argument cannot be sent.
        ValueError: ``prefetch`` is less than 1, or there is no such ``backend``.
        TypeError: ``f`` is neither a function nor iterable, or is iterable and arguments were given.

    Source: torch-ipc's ``ipc.BackgroundTask``; ``concurrent.futures.Future``.
    """

    def __init__(
        self,
        f: Callable[..., T] | Iterable[Any] | Dataset[Any],
        /,
        *args: Any,
        prefetch: int = 2,
        backend: str | Backend = "process",
        upvalues: bool = False,
    ) -> None:
        super().__init__()
        workers = find(backend)
        if prefetch < 1:
            raise ValueError(f"prefetch must be at least 1, not {prefetch}")
        self._name = starting.name_of(f)
        self._length: int | None = None
        self._exhausted = False
        self._is_iterator = False
        self._returned: str | None = None
        iterable = isinstance(f, Dataset) or not callable(f)
        if iterable:
            if not isinstance(f, Dataset) and not hasattr(f, "__iter__") and not hasattr(f, "__getitem__"):
                raise TypeError(f"a function, a Dataset or an iterable is needed, not {type(f).__name__}")
            if args:
                raise TypeError("arguments are for a function; a Dataset or an iterable takes none")
            self._length = _length_or_none(f)
        self._queue = labelled(self._name)
        self._queue._tell_no_failures()  # the future reports them
        try:
            self._queue.write(*range(prefetch))
            held: list[Any] = []
            call = f, args, (self._queue, iterable)
            payload = codec.encode_call(*call, upvalues=upvalues, peer=workers.peer, worker_resources=held)
            self.set_running_or_notify_cancel()
            events: queue.SimpleQueue[tuple[Any, list[int]] | None] = queue.SimpleQueue()
            (self._worker,) = starting.start(
                _ENTRY,
                [[payload]],
                lambda _, data, fds: events.put((data, fds)),
                lambda _: events.put(None),
                backend=workers,
                keep_alive=held,
            )
        except BaseException:
            self._queue.close()
            raise
        self._completion = weakref.ref(completion := _Completion(self, self._worker, events))
        _unfinished.add(completion)
        try:
            completion.start()
        except BaseException:  # no thread is left
            _unfinished.discard(completion)
            self._queue.close()
            self._worker.kill(signal.SIGKILL)
            raise
        weakref.finalize(self, _kill_later, self._worker).atexit = False

    def __iter__(self) -> Generator[Any, None, None]:
        """Yield the items that are left. Leaving the loop early stops the producer."""
        try:
            while True:
                try:
                    item = next(self)
                except StopIteration:
                    return
                yield item
        finally:
            self.close()

    def __next__(self) -> Any:
        """Wait for the next item, and return it.

        Raises:
            StopIteration: no item is left, or the task was closed.
            WorkerDied: the worker died; the items that it had made came first.
            TypeError: the task is not an iterator.
            Exception: the producer's error at this item.
        """
        if self._returned is not None:
            raise TypeError(f"{self!r} is not an iterator: its function returned {self._returned}")
        if self._exhausted:
            raise StopIteration
        try:
            kind, value = self._queue.read()
            if kind == _ITEM:
                self._queue.write(0)
                return value
        except QueueClosed:
            self._exhausted = True
            raise StopIteration from None
        except ResourceError:  # an item is lost
            self.close()
            raise
        except WorkerDied as death:
            kind, value = _DIED, death  # raised outside of this block: else both errors would be shown
        if kind == _NO_ITERATOR:
            self._returned = value
            self._queue.close()
            return next(self)
        self._exhausted = True
        if kind == _DIED:
            try:
                raise self._end_error() or tracebacks.trim(value)
            finally:
                del value  # else the error and this frame would keep each other alive
        self.close()
        if kind == _ERROR:
            self.ignore_error()  # raised here
            raise exceptions.unpack(value)
        raise StopIteration

    def _end_error(self) -> BaseException | None:
        """Return the error of a worker that ended before its items did; None if it is not known in time."""
        try:
            return self.exception(timeout=_GRACE_PERIOD)
        except TimeoutError:
            return None

    def __len__(self) -> int:
        """Return the number of items in all, if the source has a length.

        Raises:
            TypeError: the source, for example a generator, has no length.
        """
        if self._length is None:
            raise TypeError(f"{self._name} has no length")
        return self._length

    def __bool__(self) -> bool:
        return True

    def close(self) -> None:
        """Stop producing; the task is then exhausted. A plain task runs on to its end. Idempotent."""
        self._exhausted = True
        if not self._queue.closed:
            self._queue.close()
            if self._is_iterator:
                self.ignore_error()  # of an item that the consumer did not want
            completion = self._completion()
            if completion is not None:
                reactor.get().call_later(_GRACE_PERIOD, completion.end_producer)

    def __repr__(self) -> str:
        state = {"RUNNING": "running", "FINISHED": "finished"}.get(self._state, self._state.lower())
        failed = f" with {type(self._exception).__name__}" if self._exception is not None else ""
        return f"<torchwq.BackgroundTask {self._name}, {state}{failed}>"


def _kill_later(process: worker.Worker) -> None:
    """A task is garbage. Kill its worker later: an iterator's worker may still make an item."""
    if not process.ended_event.is_set():
        cleanup.call_soon(lambda: reactor.get().call_later(_GRACE_PERIOD, lambda: process.kill(signal.SIGKILL)))


def _length_or_none(source: Any) -> int | None:
    try:
        return len(source)
    except TypeError:
        return None


class _Completion(threading.Thread):
    """The thread that completes the future: the reactor's must not unpickle or run callbacks."""

    def __init__(
        self,
        task: BackgroundTask[Any],
        process: worker.Worker,
        events: queue.SimpleQueue[tuple[Any, list[int]] | None],
    ) -> None:
        super().__init__(name="torchwq-task", daemon=True)
        self._task: BackgroundTask[Any] | weakref.ref[BackgroundTask[Any]] = task
        self._name_of_task = task._name
        self._process = process
        self._events = events

    @property
    def is_iterator(self) -> bool:
        return isinstance(self._task, weakref.ref)

    def end_producer(self) -> None:
        if self.is_iterator:
            self._process.kill(signal.SIGKILL)

    def run(self) -> None:
        try:
            outcome = self._wait_for_outcome()
        finally:
            _unfinished.discard(self)
        task = self._task() if isinstance(self._task, weakref.ref) else self._task
        if task is None:
            return
        value, error = outcome
        if error is not None and not (self.is_iterator and task._queue.closed and isinstance(error, WorkerDied)):
            if not unretrieved.should_report(self._process, error):
                task.ignore_error()
            task.set_exception(error, f"torchwq.BackgroundTask({self._name_of_task})", self._process)
        else:
            task.set_result(value)

    def _wait_for_outcome(self) -> tuple[Any, BaseException | None]:
        outcome: tuple[Any, BaseException | None] | None = None
        while (event := self._events.get()) is not None:
            value, error = exceptions.decode_answer(*event)
            if error is None and value is _IS_ITERATOR:
                if not self.is_iterator:
                    assert isinstance(self._task, BackgroundTask)
                    self._task._is_iterator = True
                    self._task = weakref.ref(self._task)
                _unfinished.discard(self)
            else:
                outcome = (value, error)
        return outcome or (None, self._process.death_error(f"the task {self._name_of_task}"))


#: Tasks that exit waits for: plain ones, and those that may still turn out to be iterators.
_unfinished: set[_Completion] = set()


@reset_in_child
def _forget() -> None:
    _unfinished.clear()  # the parent has their threads


def _finish_all() -> None:
    while _unfinished:
        for completion in list(_unfinished):
            completion.join(0.02)


shutdown.at_finish(_finish_all)


def run_worker(context: child.Context) -> int:
    """Run the task in its worker. Sends ``_IS_ITERATOR`` first if it is one, and (value, packed error) at its end."""
    limit = context.max_payload
    value: Any = None
    items: WorkQueue | None = None
    failed = False
    try:
        source, args, (items, iterable) = codec.decode(*context.receive())
        produced = _iterator_over(source) if iterable else source(*args)
        if isinstance(produced, Iterator):
            context.send(codec.encode((_IS_ITERATOR, None), limit))
            value = _produce(produced, items)
        else:
            with contextlib.suppress(QueueClosed):  # by close(), which does not stop a plain task
                items.write((_NO_ITERATOR, type(produced).__name__))
            value = produced
        payload = codec.encode_result(value, limit, "the task's result", peer=context.peer)
    except QueueClosed:
        payload = codec.encode((None, None), limit)
    except SystemExit as stop:
        if status := child.exit_status(stop):
            return status
        if items is not None:
            with contextlib.suppress(QueueClosed):
                items.write((_END, None))
        payload = codec.encode((None, None), limit)
    except BaseException as error:
        failed = True
        packed = exceptions.pack_for(context.peer, error)
        _write_error(items, packed)
        context.report_failure(packed)
        payload = exceptions.encode(packed, limit, context.peer)
    context.send(payload)
    return int(failed)


def _iterator_over(source: Any) -> Iterator[Any]:
    if hasattr(source, "__iter__"):
        return iter(source)
    length = _length_or_none(source)
    if length is None:
        return iter(source)  # the old protocol: __getitem__ until IndexError
    return (source[index] for index in range(length))


def _produce(produced: Iterator[Any], items: WorkQueue) -> Any:
    """Write an item for each credit. Returns the iterator's return value, or None if the consumer has left."""
    try:
        for _ in items:
            try:
                item = next(produced)
            except StopIteration as stop:
                items.write((_END, None))
                return stop.value
            items.write((_ITEM, item))
    except QueueClosed:
        pass
    finally:
        close = getattr(produced, "close", None)
        if close is not None:
            close()
    return None


def _write_error(items: WorkQueue | None, packed: exceptions.PackedException | BaseException) -> None:
    """Write the error to the consumer, after the items before it."""
    if items is not None:
        if isinstance(packed, BaseException):  # the worker is a thread
            packed = exceptions.pack(packed, peer=SAME_PROCESS)
        try:
            items.writeup((_ERROR, packed))
        except (QueueClosed, MarshalError):
            pass  # the consumer has left
