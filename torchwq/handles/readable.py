"""Reading a handle: by a thread that blocks, by a task on asyncio's event loop, by iteration.

Note [Order of looking]

1. Take a message.
2. If there may be a failure to report, take once more, then raise it. A worker answers before it leaves, and what a
   dead worker wrote comes before the report of its death.
3. If the time is over, say so. The clock is read before 2, so a late reader looks once more.
4. Wait, and begin again.

``read`` and ``aread`` share this order and differ only in 4. The handles inline 1: mostly a message is there, and the
rest would cost a call.
"""

from __future__ import annotations

import abc
import queue
import time
from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import Any, Final, Generic, TypeVar

from .. import tracebacks
from ..errors import QueueClosed, WorkerDied
from ..futures import TimedOut
from ..transport import awaiting
from ..transport.endpoint import Received
from ..transport.timing import MAX_SLEEP
from ..workers import shutdown

T = TypeVar("T")
H = TypeVar("H", bound="ReadableHandle[Any]")

#: What a handle's ``_read_nowait`` returns if there is no message, and its ``_iteration_item`` where iteration stops.
EMPTY: Final[Any] = object()
STOP: Final = object()


class EndOfMessages(Exception):
    """No message will come, and the handle reports that without an error."""


class MessageSource(abc.ABC):
    """Where a handle takes its messages from. This class keeps the order of looking."""

    __slots__ = ()

    @abc.abstractmethod
    def take(self) -> Received | None:
        """Take the next message if there is one."""

    @abc.abstractmethod
    def sleep(self, deadline: float | None) -> Received | None:
        """The next message; None after ``deadline`` (time.monotonic), if there may be a failure, or for no reason."""

    @abc.abstractmethod
    def may_raise(self) -> bool:
        """Whether there may be a failure to report, so that a reader must not wait."""

    @abc.abstractmethod
    def raise_failure(self) -> None:
        """The reader has found no message: raise the failure, or EndOfMessages; or return, so that it waits."""

    @abc.abstractmethod
    def on_empty(self) -> None:
        """A read that does not wait has found no message: raise a failure if there is one."""

    @abc.abstractmethod
    def awaited(self) -> str:
        """The subject of a sentence on a timeout: "no item" came."""

    @abc.abstractmethod
    def fileno(self) -> int:
        """Readable when ``read`` would not have to wait. Raises QueueClosed."""

    @abc.abstractmethod
    def is_ready(self) -> bool:
        """Whether ``read`` would not have to wait."""

    def wait(self, nonblocking: bool, timeout: float | None) -> Received | None:
        """The next message, after ``take`` has found none; None if ``nonblocking``.

        Raises queue.Empty, QueueClosed, WorkerDied, EndOfMessages.
        """
        if nonblocking not in (False, True):
            raise TypeError(f"read({nonblocking!r}): to wait for so many seconds, say read(timeout={nonblocking!r})")
        try:
            if nonblocking:
                self.on_empty()
                return None
            return self.wait_until(None if timeout is None else time.monotonic() + timeout, timeout)
        except (QueueClosed, WorkerDied) as error:
            shutdown.block_daemon_at_exit()
            tracebacks.trim(error)
            raise error
        except KeyboardInterrupt as interrupt:
            tracebacks.trim(interrupt)
            raise interrupt

    def wait_until(self, deadline: float | None, timeout: float | None) -> Received:
        """The same, until ``deadline`` (time.monotonic), which is ``timeout`` seconds after the beginning."""
        while True:
            is_over = deadline is not None and time.monotonic() >= deadline
            received = self._take_or_raise()
            if received is None:
                if is_over:
                    raise queue.Empty(f"{self.awaited()} came within {timeout} s")
                received = self.sleep(deadline)
            if received is not None:
                return received

    async def wait_async(self, timeout: float | None) -> Received:
        """The same on asyncio's event loop, which goes on meanwhile. Raises TimedOut in place of queue.Empty."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = MAX_SLEEP if deadline is None else min(MAX_SLEEP, deadline - time.monotonic())
            received = self._take_or_raise()
            if received is None:
                if left <= 0:
                    raise TimedOut(f"nothing came within {timeout} s")
                await awaiting.readable(self.fileno(), left)
                received = self.take()
            if received is not None:
                return received

    def _take_or_raise(self) -> Received | None:
        """Step 2 of Note [Order of looking]."""
        if not self.may_raise():
            return None
        received = self.take()
        if received is None:
            self.raise_failure()
        return received


class ReadableHandle(abc.ABC, Generic[T]):
    """A handle that can be read. ``T`` is what ``read`` returns."""

    __slots__ = ()

    @abc.abstractmethod
    def read(self, nonblocking: bool = False, *, timeout: float | None = None) -> T: ...

    @abc.abstractmethod
    def _read_nowait(self) -> Any:
        """What ``read`` returns if a message is there; else EMPTY."""

    @abc.abstractmethod
    def _source(self) -> MessageSource:
        """Where this thread takes messages from."""

    @abc.abstractmethod
    def _result_of(self, received: Received) -> T:
        """What ``read`` returns for a message."""

    @abc.abstractmethod
    def _result_at_end(self) -> T:
        """What ``read`` returns after EndOfMessages."""

    @abc.abstractmethod
    def _iteration_item(self, result: T) -> Any:
        """What iteration gives for a ``result`` of ``read``; STOP ends it."""

    @property
    @abc.abstractmethod
    def _was_forked(self) -> bool:
        """Whether a parent process made it before a fork."""

    @abc.abstractmethod
    def _exit_context(self, failed: bool) -> None:
        """A ``with`` block has ended, with an error if ``failed``."""

    async def aread(self, *, timeout: float | None = None) -> T:
        """Read on asyncio's event loop: like :meth:`read`, without blocking it, and without a thread.

        A task that is cancelled takes nothing.

        Args:
            timeout: how long to wait at most, in seconds; None waits for ever.

        Returns:
            As :meth:`read`.

        Raises:
            TimeoutError: nothing came within ``timeout``. (It is an ``asyncio.TimeoutError``, too.)
            QueueClosed, WorkerDied: as for :meth:`read`; but a channel does not say that nobody is left, for another
                task may write.
        """
        result: T = self._read_nowait()
        if result is not EMPTY:
            return result
        try:
            received = await self._source().wait_async(timeout)
        except EndOfMessages:
            return self._result_at_end()
        except (QueueClosed, WorkerDied) as error:
            tracebacks.trim(error)
            raise error
        return self._result_of(received)

    def fileno(self) -> int:
        """A descriptor for ``select``, ``selectors`` and event loops: readable when :meth:`read` would not wait.

        With several readers another may be faster: read with ``nonblocking=True``. Do not close it.

        Raises:
            QueueClosed: the handle is closed, or was inherited by a fork.
        """
        return self._source().fileno()

    def _is_ready(self) -> bool:
        return self._source().is_ready()

    def __iter__(self) -> Iterator[Any]:
        """Read until the end: until a queue gives None or is closed, until a channel is drained.

        Raises:
            QueueClosed: the handle was inherited by a fork.
        """
        while True:
            try:
                item = self._iteration_item(self.read())
            except QueueClosed:
                if self._was_forked:
                    raise
                return
            if item is STOP:
                return
            yield item

    async def __aiter__(self) -> AsyncIterator[Any]:
        """The same with :meth:`aread`."""
        while True:
            try:
                item = self._iteration_item(await self.aread())
            except QueueClosed:
                if self._was_forked:
                    raise
                return
            if item is STOP:
                return
            yield item

    def __enter__(self: H) -> H:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # A block that ends because its source was closed has not failed.
        self._exit_context(error is not None and not isinstance(error, (QueueClosed, GeneratorExit)))
