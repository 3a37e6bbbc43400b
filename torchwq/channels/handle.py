"""``Channel``: what users hold. It encodes and decodes; its process's core, which all handles share, does the rest."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

from .. import tracebacks
from ..handles.readable import EMPTY, STOP, EndOfMessages, ReadableHandle
from ..handles.reference import HandleRef, Target, register_handle
from ..handles.writing import send_async
from ..marshalling import codec
from ..transport.endpoint import Received
from ..workers import shutdown, threads
from . import core as cores
from .core import Core
from .failure_detector import SeenChannelFailures
from .reading import Reader
from .state import ChannelState

_OPEN: Final = ChannelState.OPEN
_CLOSED: Final = ChannelState.CLOSED
_DRAINED: Final = ChannelState.DRAINED


@dataclass(frozen=True, slots=True)
class ChannelStatistics:
    """A snapshot of a channel's traffic.

    Attributes:
        written: items that this process has written.
        read: items that this process has read.
        unsent: items that wait in this process because the channel's socket is full.
        num_items: items that nobody has read yet, whoever has written them.
    """

    written: int
    read: int
    unsent: int
    num_items: int


@final
class Channel(ReadableHandle[tuple[ChannelState, Any]]):
    """Carries items from any number of writers to any number of readers. Made by :func:`torchwq.channel`.

    Writers and readers may be in any process and any thread. Each item is read once, first in, first out; the items of
    one writer keep their order. A channel reaches other workers as an argument of :func:`torchwq.map`, or inside a
    message, also that of another channel.

    Plain objects travel by value, torch tensors and storages by reference, as with a :class:`WorkQueue`.

    A channel is OPEN until somebody closes it, then CLOSED until its last item has been read, then DRAINED. A pipeline
    closes in a cascade: each stage reads until its source is drained, and then closes what it writes to::

        with sink:
            for item in source:
                sink.write(work(item))

    A ``with`` block that an error leaves closes the channel as a failed writer: readers get WorkerDied after the last
    item. Where several workers write to ``sink``, let the thread that joins them close it.

    Source: torch-ipc's ``ipc.channel``.
    """

    __slots__ = ("__weakref__", "_core", "_initially_seen", "_seen", "has_written", "is_watched")

    def __init__(self, core: Core, seen: SeenChannelFailures | None = None) -> None:
        self._core = core
        self._initially_seen = seen or SeenChannelFailures()
        self._seen: dict[int, SeenChannelFailures] = {}
        #: Whether anything was written with this handle.
        self.has_written = False
        #: Whether anybody has asked for its descriptor.
        self.is_watched = False
        core.failures.handles.add(self)
        threads.owned_by_this_worker(self)

    def seen_failures(self) -> SeenChannelFailures:
        """The failures that this thread has been told of: see ``failure_detector``."""
        return self._seen.setdefault(threading.get_ident(), self._initially_seen.copy())

    def all_seen_failures(self) -> list[SeenChannelFailures]:
        """The same for each thread that has used this handle."""
        return list(self._seen.values()) or [self._initially_seen]

    @property
    def capacity(self) -> int | None:
        """How many items may wait to be read before ``write`` blocks; None: any number."""
        return self._core.capacity

    def write(self, *objs: Any, timeout: float | None = None) -> ChannelState:
        """Write each of ``objs``, if the channel is open.

        All of them are marshalled before the first is sent, so a failing write leaves the channel as it was. Never
        blocks for long unless the channel has a ``capacity``, which then counts for all writers together.

        Args:
            *objs: any objects; each takes one ``read``.
            timeout: with ``capacity``, how long to wait for room at most, in seconds; None waits for ever.

        Returns:
            OPEN if all were written. CLOSED or DRAINED if the channel was closed: what is left was not written.

        Raises:
            MarshalError: an object cannot travel; the message names its place, e.g. ``args[0]['model'].hook``.
            ClosureError: a function or class captures data; see :meth:`writeup`.
            queue.Full: there was no room within ``timeout``. The objects before the one without room were written.
            WorkerDied: only with ``capacity``: a worker that has read from the channel died; or nobody is left to read.
            ResourceError: memory or file descriptors have run out.
            QueueClosed: the channel was inherited by a fork.

        Source: torch-ipc's ``c:write``; ``queue.Queue.put`` for ``queue.Full``.
        """
        core = self._core
        if len(objs) == 1 and core.capacity is None:
            self.has_written = True
            state = core.backend.try_write(objs[0])
            if state is not None:
                return state
        try:
            return self._send_all(objs, upvalues=False, timeout=timeout)
        except Exception as error:
            tracebacks.trim(error)
            raise error

    async def awrite(self, *objs: Any, timeout: float | None = None) -> ChannelState:
        """Write on asyncio's event loop: like :meth:`write`, without blocking it while there is no room.

        A task that is cancelled while it waits has written the objects before the one without room.

        Raises:
            TimeoutError: there was no room within ``timeout`` seconds.
            MarshalError, WorkerDied, ResourceError, QueueClosed: as for :meth:`write`.
        """
        core = self._core
        if core.capacity is None:
            return self.write(*objs)
        core.check_fork()
        backend, self.has_written = core.backend, True
        payloads = codec.encode_all(objs, backend.max_payload, peer=backend.peer)
        is_sent = await send_async(
            lambda payload, deadline: core.send_if_room(backend, payload, self, deadline), payloads, timeout
        )
        return _OPEN if is_sent else core.backend.state()

    def writeup(self, *objs: Any) -> ChannelState:
        """Like :meth:`write`, but functions may be closures: what they capture travels with them.

        Returns:
            As for :meth:`write`.

        Raises:
            MarshalError, WorkerDied, ResourceError, QueueClosed: as for :meth:`write`.
        """
        return self._send_all(objs, upvalues=True)

    def _send_all(self, objs: Sequence[Any], upvalues: bool, timeout: float | None = None) -> ChannelState:
        self._core.check_fork()
        core = self._core
        backend = core.backend
        self.has_written = True
        payloads = codec.encode_all(objs, backend.max_payload, upvalues=upvalues, peer=backend.peer)
        if core.capacity is None:
            are_sent = all(map(backend.send, payloads))
        else:
            deadline = None if timeout is None else time.monotonic() + timeout
            are_sent = all(core.send_if_room(backend, payload, self, deadline) for payload in payloads)
        if not are_sent:
            return core.backend.state()
        return _OPEN if objs else core.backend.state()

    def read(self, nonblocking: bool = False, *, timeout: float | None = None) -> tuple[ChannelState, Any]:
        """Read the next item.

        Args:
            nonblocking: do not wait for one.
            timeout: how long to wait at most, in seconds; None waits for ever.

        Returns:
            The state of the channel and the item: ``(OPEN, item)`` or ``(CLOSED, item)``. ``(DRAINED, None)``, at once,
            if the channel is closed and everything in it has been read. If ``nonblocking`` and nothing is there,
            ``(OPEN, None)``; an item may be None too, :meth:`num_items` tells.

        Raises:
            queue.Empty: nothing came within ``timeout``.
            WorkerDied: if nothing is there: a worker that had written to the channel died, or failed (once for each);
                while waiting, also if all others that had the channel have dropped it, and nobody is left that could
                write (a non-blocking read says so if :func:`torchwq.select` has just found it);
                or, once, instead of ``(DRAINED, None)``, if a ``with`` block that had failed has closed the channel.
            QueueClosed: the channel was inherited by a fork.

        A Ctrl-C that ends the wait takes nothing from the channel.

        Source: torch-ipc's ``c:read``; ``queue.Queue.get`` for ``queue.Empty``.
        """
        core = self._core
        found = core.backend.try_read()
        if found is not None:
            return found
        try:
            received = Reader(core, self).wait(nonblocking, timeout)
        except EndOfMessages:
            return self._result_at_end()
        return (core.backend.state(), None) if received is None else self._result_of(received)

    def _result_of(self, received: Received) -> tuple[ChannelState, Any]:
        return _CLOSED if self._core.backend.is_closed else _OPEN, codec.decode(*received)

    def close(self) -> None:
        """Close the channel, for everybody. May be called again.

        What was written before is still read. Threads that wait to read from an empty channel, or for room to write,
        wake up. Never blocks.

        Source: torch-ipc's ``c:close``.
        """
        self._core.check_fork()
        self._core.close()

    def closed(self) -> bool:
        """Whether the channel is closed, drained or not."""
        return self._core.backend.state() is not _OPEN

    def drained(self) -> bool:
        """Whether the channel is closed, and everything in it has been read."""
        return self._core.backend.state() is ChannelState.DRAINED

    def num_items(self) -> int:
        """How many items have been written and not read: an estimate while others write or read."""
        return self._core.backend.num_items()

    def statistics(self) -> ChannelStatistics:
        """Count what has passed through the channel, as far as this process knows."""
        backend = self._core.backend
        return ChannelStatistics(*backend.counts(), backend.num_items())

    def close_for_worker(self, worker: threads.ThreadWorker, failed: bool) -> None:
        """See ``threads.OwnedResource``: this handle does not count any more; the channel stays open."""
        self._core.leave(self, worker, failed)

    def _read_nowait(self) -> Any:
        return self._core.backend.try_read() or EMPTY

    def _source(self) -> Reader:
        return Reader(self._core, self)

    def _result_at_end(self) -> tuple[ChannelState, Any]:
        return ChannelState.DRAINED, None

    def __iter__(self) -> Iterator[Any]:
        """Read until the channel is drained.

        Raises:
            QueueClosed: the channel was inherited by a fork.
        """
        # As the base class has it, without its two calls for each item.
        core = self._core
        while True:
            state, item = core.backend.try_read() or self.read()
            if state is _DRAINED:
                return
            yield item

    def _iteration_item(self, found: tuple[ChannelState, Any]) -> Any:
        state, item = found
        return STOP if state is _DRAINED else item

    @property
    def _was_forked(self) -> bool:
        return self._core.forked

    def _exit_context(self, failed: bool) -> None:
        self._core.check_fork()
        self._core.close(failed=failed)

    def __repr__(self) -> str:
        if self._core.forked:
            return "<torchwq.Channel, of another process>"
        capacity = "" if self.capacity is None else f", capacity={self.capacity}"
        return f"<torchwq.Channel, {self._core.backend.state().value}, {self.num_items()} items{capacity}>"

    def __reduce__(self) -> Any:
        raise TypeError(
            "a Channel can only be sent by torchwq: as an argument of torchwq.map, BackgroundTask or a pool's task, or "
            "inside a message of a queue or channel"
        )


def channel(capacity: int | None = None) -> Channel:
    """Make a channel.

    Args:
        capacity: how many items may wait to be read before ``write`` blocks; None: any number.

    Returns:
        A :class:`Channel`, usable as a context manager that closes it.

    Raises:
        ValueError: ``capacity`` is less than 1.
        TypeError: it is no number.

    Source: torch-ipc's ``ipc.channel``.
    """
    if not isinstance(capacity, (int, type(None))):
        raise TypeError(
            f"capacity must be a number, or None for any number, not {type(capacity).__name__}: a channel has no name, "
            f"pass it to workers as an argument"
        )
    if capacity is not None and capacity < 1:
        raise ValueError(f"capacity must be at least 1, or None for any number, not {capacity}")
    return Channel(Core(secrets.token_bytes(16), capacity))


class _Target(Target):
    far_kind = "channel"

    def __init__(self, core: Core, seen: SeenChannelFailures) -> None:
        # Not a method of the core: an item that waits there may have this target in it.
        super().__init__(core.failures.handles.count_pending)
        self._core = core
        self._seen = seen

    def shown(self) -> dict[str, Any]:
        return {"capacity": self._core.capacity}

    def make_handle(self) -> Channel:
        return Channel(self._core, self._seen.copy())

    def for_other_process(self) -> Any:
        core = self._core
        fds = core.handle_descriptors()
        return _receive, (core.name, core.capacity, list(core.failures.dead())), fds


def _target_of(handle: Channel) -> Target:
    handle._core.check_fork()
    return _Target(handle._core, handle._core.failures.current())


def _receive(fds: list[int], name: bytes, capacity: int | None, dead: Sequence[int]) -> HandleRef:
    core = cores.open_(name, capacity, fds)
    return HandleRef(_Target(core, SeenChannelFailures(set(dead), core.failures.current().thread_failures)))


register_handle(Channel, _target_of)
shutdown.at_close(lambda: cores.leave_all(shutdown.failed))
