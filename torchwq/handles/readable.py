"""How a handle is read: by who blocks, by a task on asyncio's event loop, by iteration.

Note [Order of looking]. ``read`` and ``aread`` share it, so that both find the same:

1. Take a message.
2. If there may be trouble, take once more, then raise it: the last worker answers before it leaves, and what a dead
   one has written comes before the news of its death.
3. If the time is over, say so. It is asked for before 2, so that who is late looks once more.
4. Wait, and begin again.

They differ in 4 alone. The handles inline 1, because a message is mostly there: what follows costs a call.
"""

from __future__ import annotations

import abc
import queue
import time
from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import Any, Final, Generic, TypeVar

from ..errors import QueueClosed, WorkerDied
from ..futures import TimedOut
from ..transport import awaiting
from ..transport.endpoint import Received
from ..transport.timing import MAX_SLEEP
from ..workers import shutdown

T = TypeVar("T")
H = TypeVar("H", bound="ReadableHandle[Any]")

#: What a handle's ``_read_nowait`` returns where no message is there, and its ``_item`` where iteration stops.
EMPTY: Final[Any] = object()
STOP: Final = object()


class EndOfMessages(Exception):
    """No message will come, and who reads is to be told that in another way than by an error."""


class MessageSource(abc.ABC):
    """Where a handle takes its messages from. Subclasses say in what they differ; this class has the order."""

    __slots__ = ()

    @abc.abstractmethod
    def take(self) -> Received | None:
        """Take the next message if there is one."""

    @abc.abstractmethod
    def sleep(self, deadline: float | None) -> Received | None:
        """The next message; None after ``deadline`` (time.monotonic), if there may be trouble, or for no reason."""

    @abc.abstractmethod
    def may_raise(self) -> bool:
        """Whether there may be a reason to raise instead of waiting."""

    @abc.abstractmethod
    def raise_failure(self) -> None:
        """Raise what there is to tell one who finds no message, or EndOfMessages; or return, to let it wait."""

    @abc.abstractmethod
    def on_empty(self) -> None:
        """A read that does not wait has found no message: raise what it is to be told."""

    @abc.abstractmethod
    def awaited(self) -> str:
        """What a read waits for, as the subject of a sentence."""

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
        try:
            if nonblocking:
                self.on_empty()
                return None
            return self.wait_until(None if timeout is None else time.monotonic() + timeout, timeout)
        except (QueueClosed, WorkerDied):
            shutdown.block_daemon_at_exit()
            raise

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
        """If there may be trouble, take once more; raise the trouble if that finds nothing."""
        if not self.may_raise():
            return None
        received = self.take()
        if received is None:
            self.raise_failure()
        return received


class ReadableHandle(abc.ABC, Generic[T]):
    """A handle that is read. ``T`` is what ``read`` returns."""

    __slots__ = ()

    @abc.abstractmethod
    def read(self, nonblocking: bool = False, *, timeout: float | None = None) -> T: ...

    @abc.abstractmethod
    def _read_nowait(self) -> Any:
        """What ``read`` returns if a message is there; else EMPTY."""

    @abc.abstractmethod
    def _source(self) -> MessageSource:
        """What this thread reads from."""

    @abc.abstractmethod
    def _result_of(self, received: Received) -> T:
        """What ``read`` returns for a message."""

    @abc.abstractmethod
    def _result_at_end(self) -> T:
        """What ``read`` returns where the source has raised EndOfMessages."""

    @abc.abstractmethod
    def _iteration_item(self, found: T) -> Any:
        """What iteration gives for what ``read`` has returned; STOP where it stops."""

    @property
    @abc.abstractmethod
    def _was_forked(self) -> bool:
        """Whether it was made before a fork, in the parent process."""

    @abc.abstractmethod
    def _exit_context(self, failed: bool) -> None:
        """A ``with`` block has ended; ``failed``: by an error."""

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
        found: T = self._read_nowait()
        if found is not EMPTY:
            return found
        try:
            return self._result_of(await self._source().wait_async(timeout))
        except EndOfMessages:
            return self._result_at_end()

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
        # One that ends because what it read from was closed has not failed.
        self._exit_context(error is not None and not isinstance(error, (QueueClosed, GeneratorExit)))
