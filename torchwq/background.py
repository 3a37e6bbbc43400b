"""``BackgroundTask``: one function in one worker, as a future, or as an iterator that produces ahead.

The iterator is a workqueue: the consumer writes a *credit* for each item that may be made, the producer reads a
credit, makes an item, and writes it. At the start there are ``prefetch`` credits; taking an item gives one more. So
there are never more than ``prefetch`` items that were made and not yet taken, and a producer whose consumer has gone
reads "closed".

What ends a task, other than its items, comes over the worker's control connection and completes the future. Its
thread holds a plain task (that runs to its end whoever looks), but only a weak reference to an iterator: when its
consumer drops it, the producer stops.
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

from .errors import MarshalError, QueueClosed, ResourceError, WorkerDied
from .mapping import exit_status
from .marshalling import codec, exceptions
from .queues import WorkQueue, workqueue
from .transport import cleanup, reactor
from .transport.capabilities import SAME_PROCESS
from .transport.fork import reset_in_child
from .workers import child, shutdown, starting, unretrieved, worker
from .workers.backend import find

T = TypeVar("T")

_ENTRY: Final = "torchwq.background:run_worker"
#: How long, in seconds, a producer may go on with the item it is at after its consumer has left.
_GRACE_PERIOD: Final = 5.0

# What the producer writes: a kind and a value.
_ITEM, _END, _ERROR, _NO_ITERATOR, _DIED = range(5)


class _IsIterator(enum.Enum):
    """What a worker tells in a value's place when its function turns out to give an iterator."""

    YES = enum.auto()


_IS_ITERATOR: Final = _IsIterator.YES


@final
class BackgroundTask(unretrieved.Future[T]):
    """Run a function in the background, at once; or produce the items of an iterable ahead.

    As a future: ``done()``, ``result(timeout)``, ``exception()``, ``add_done_callback``; it works with
    ``concurrent.futures.wait`` and ``as_completed`` and ``asyncio.wrap_future``. It is running from the start, so
    ``cancel()`` returns False.

    As an iterator, if ``f`` is a generator function or returns an iterator, or if ``f`` is a Dataset or another
    iterable: the items are made in the worker, at most ``prefetch`` ahead of their consumer. Leaving a ``for`` loop
    early, or :meth:`close`, stops the producer. An error surfaces at the item where it happened, after the items before
    it. An exhausted task stays exhausted; its ``result()`` is the generator's return value.

    Args:
        f: a function; or an iterator, an iterable, an iterable Dataset, or a map-style Dataset, which is read from
            index 0 to its end. It gets no ``mapid``. It travels as code; see ``upvalues``.
        *args: its arguments.
        prefetch: how many items may be ready and not taken; at least 1.
        backend: ``"process"`` or ``"thread"``; see :func:`torchwq.map`. A producer that is a thread ends when it next
            asks for leave to produce, not in the middle of an item.
        upvalues: whether ``f`` may be a closure and use global data of ``__main__``: these are then copied to the
            worker.

    Raises:
        ClosureError: ``f`` drags data along.
        MarshalError: ``f`` or an argument cannot travel.
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
        backend: str = "process",
        upvalues: bool = False,
    ) -> None:
        super().__init__()
        workers = find(backend)
        if prefetch < 1:
            raise ValueError(f"prefetch must be at least 1, not {prefetch}")
        self._name = getattr(f, "__qualname__", None) or type(f).__qualname__
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
        self._queue = workqueue()
        self._queue._tell_no_failures()  # the future does
        try:
            self._queue.write(*range(prefetch))
            held: list[Any] = []
            payload = codec.encode_call(
                f,
                args,
                (self._queue, iterable),
                codec.CALL_LIMIT,
                upvalues=upvalues,
                peer=workers.peer,
                worker_resources=held,
            )
            self.set_running_or_notify_cancel()
            events: queue.SimpleQueue[tuple[Any, list[int]] | None] = queue.SimpleQueue()
            (self._worker,) = starting.start(
                1,
                _ENTRY,
                lambda _, data, fds: events.put((data, fds)),
                lambda _: events.put(None),
                backend=workers,
            )
        except BaseException:
            self._queue.close()
            raise
        self._worker.keep_alive = held
        self._worker.send(payload)
        self._completion = weakref.ref(completion := _Completion(self, self._worker, events))
        _unfinished.add(completion)
        try:
            completion.start()
        except BaseException:  # no more threads
            _unfinished.discard(completion)
            self._queue.close()
            self._worker.kill(signal.SIGKILL)
            raise
        weakref.finalize(self, _kill_later, self._worker).atexit = False

    def __iter__(self) -> Generator[Any, None, None]:
        """Yield what is left of the items. The producer is stopped when the loop is left early."""
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
        """The next item; waits for it.

        Raises:
            StopIteration: there are no more, or the task was closed.
            WorkerDied: the worker died; what it had produced before came first.
            TypeError: the task is not an iterator.
            Exception: what the producer raised at this item.
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
            kind, value = _DIED, death  # raised below: not where it is handled, or both would be shown
        if kind == _NO_ITERATOR:
            self._returned = value
            self._queue.close()
            return next(self)
        self._exhausted = True
        if kind == _DIED:
            try:
                raise self._end_error() or value
            finally:
                del value  # or the error would keep this frame, and that the error
        self.close()
        if kind == _ERROR:
            self.ignore_error()  # it is told here
            raise exceptions.unpack(value)
        raise StopIteration

    def _end_error(self) -> BaseException | None:
        """The worker is gone without an end of its items: prefer what it said, or how it died, to "nobody is left"."""
        try:
            return self.exception(timeout=_GRACE_PERIOD)
        except TimeoutError:
            return None

    def __len__(self) -> int:
        """Number of items in all, where the source has a length.

        Raises:
            TypeError: it has none, as generators have none.
        """
        if self._length is None:
            raise TypeError(f"{self._name} has no length")
        return self._length

    def __bool__(self) -> bool:
        return True

    def close(self) -> None:
        """Stop producing; the task is exhausted then. A plain task runs on to its end. May be called again."""
        self._exhausted = True
        if not self._queue.closed:
            self._queue.close()
            if self._is_iterator:
                self.ignore_error()  # of an item that its consumer did not want
            completion = self._completion()
            if completion is not None:
                reactor.get().call_later(_GRACE_PERIOD, completion.end_producer)

    def __repr__(self) -> str:
        state = {"RUNNING": "running", "FINISHED": "finished"}.get(self._state, self._state.lower())
        failed = f" with {type(self._exception).__name__}" if self._exception is not None else ""
        return f"<torchwq.BackgroundTask {self._name}, {state}{failed}>"


def _kill_later(process: worker.Worker) -> None:
    """A task is garbage: of an iterator, whose worker may still be at an item."""
    if not process.ended_event.is_set():
        cleanup.call_soon(lambda: reactor.get().call_later(_GRACE_PERIOD, lambda: process.kill(signal.SIGKILL)))


def _length_or_none(source: Any) -> int | None:
    try:
        return len(source)
    except TypeError:
        return None


class _Completion(threading.Thread):
    """Completes the future: unpickling and callbacks are not for the reactor's thread."""

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


#: Plain tasks that exit waits for. Everything in it may yet turn out to be an iterator.
_unfinished: set[_Completion] = set()


@reset_in_child
def _forget() -> None:
    _unfinished.clear()  # their threads are the parent's


def _finish_all() -> None:
    while _unfinished:
        for completion in list(_unfinished):
            completion.join(0.02)


shutdown.at_finish(_finish_all)


def run_worker(context: child.Context) -> int:
    """Entry of a task's worker: sends (value, packed error) at its end, and that it is an iterator if so."""
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
            with contextlib.suppress(QueueClosed):  # by close(), which a plain task does not care about
                items.write((_NO_ITERATOR, type(produced).__name__))
            value = produced
        payload = codec.encode_result(value, limit, "the task's result", peer=context.peer)
    except QueueClosed:
        payload = codec.encode((None, None), limit)
    except SystemExit as stop:
        if status := exit_status(stop):
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
    try:
        length = len(source)
    except TypeError:
        return iter(source)  # the old protocol: __getitem__ until IndexError
    return (source[index] for index in range(length))


def _produce(produced: Iterator[Any], items: WorkQueue) -> Any:
    """Make an item for each credit; returns the iterator's return value, or None if the consumer has left."""
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
    """Let the consumer meet the error after the items before it."""
    if items is not None:
        if isinstance(packed, BaseException):  # of a thread
            packed = exceptions.pack(packed, peer=SAME_PROCESS)
        try:
            items.writeup((_ERROR, packed))
        except (QueueClosed, MarshalError):
            pass  # the consumer has left
