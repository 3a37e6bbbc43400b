"""A channel that no other process has: a pipe, whose items move to a socket channel when one comes."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from ..marshalling import codec
from ..marshalling.copies import try_copy
from ..pipe.pipe import MovingPipe
from ..pipe.room import Room
from ..transport.capabilities import SAME_PROCESS
from ..transport.endpoint import Received
from ..transport.waiting import never
from .socket import SocketChannel
from .state import ChannelState

R = TypeVar("R")


class LocalChannel:
    """Items between threads. Whoever comes too late, because they have moved, is passed on to the socket channel."""

    peer = SAME_PROCESS
    max_payload = codec.UNLIMITED

    def __init__(self, capacity: int | None) -> None:
        self.pipe: MovingPipe[SocketChannel] = MovingPipe()
        self._closed_by_failure = False
        #: Also that of the socket channel; None if any number of items has room.
        self.room: Room | None = None
        if capacity is not None:
            # It knows this object weakly: what is in the pipe goes with this object.
            this = weakref.proxy(self)
            self.room = Room(capacity, lambda: this.num_items(), lambda: this.is_closed, lambda: this.counting())

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Within this, no other thread writes, and no other process.

        The pipe's lock comes before the table's, as in ``close`` and ``move_to``.
        """
        with self.pipe.lock:
            socket = self.pipe.carrier
            with contextlib.nullcontext() if socket is None else socket.table.locked():
                yield

    def try_write(self, obj: Any) -> ChannelState | None:
        payload = try_copy(obj)
        if payload is None:
            try:
                payload = codec.encode(obj, codec.UNLIMITED, peer=SAME_PROCESS)
            except Exception:
                return None
        return ChannelState.OPEN if self.send(payload) else self.state()

    def send(self, payload: codec.Encoded) -> bool:
        was_put = self.pipe.put_if_local(payload)
        if was_put is not None:
            return was_put
        socket = self.pipe.carrier
        assert socket is not None
        return socket.send(codec.for_other_processes(payload, socket.max_payload))

    def take(self) -> Received | None:
        received = self.pipe.take()
        if received is not None and self.room is not None:
            self.room.made()
        return received

    def can_take(self) -> bool:
        return self.pipe.can_take()

    def try_read(self) -> tuple[ChannelState, Any] | None:
        received = self.take()
        if received is None:
            return None
        return ChannelState.CLOSED if self.is_closed else ChannelState.OPEN, codec.decode(*received)

    def wait(
        self, attempt: Callable[[], R | None], deadline: float | None, stop: Callable[[], object] = never
    ) -> R | None:
        return self.pipe.wait(attempt, deadline, stop)

    @property
    def was_failed(self) -> bool:
        return self._closed_by_failure

    @property
    def is_closed(self) -> bool:
        socket = self.pipe.carrier
        return self.pipe.is_closed if socket is None else socket.is_closed

    def state(self) -> ChannelState:
        socket = self.pipe.carrier
        if socket is not None:
            return socket.state()
        if not self.pipe.is_closed:
            return ChannelState.OPEN
        return ChannelState.CLOSED if self.pipe.box.messages or self.pipe.is_moving else ChannelState.DRAINED

    def num_items(self) -> int:
        socket = self.pipe.carrier
        return self.pipe.count_local() if socket is None else socket.num_items()

    def counts(self) -> tuple[int, int, int]:
        written = self.pipe.written
        return written, written - len(self.pipe.box), 0

    def close(self, *, failed: bool = False) -> None:
        with self.pipe.lock:
            socket = self.pipe.carrier
            if socket is not None:
                socket.close(failed=failed)
            self._closed_by_failure = self._closed_by_failure or (failed and not self.pipe.is_closed)
            self.pipe.close()

    def move_to(self, open_socket: Callable[[], SocketChannel]) -> SocketChannel:
        """Send all items to a socket channel, and all that come later. Raises as ``MovingPipe.move``."""
        with self.pipe.lock:
            self.pipe.move(open_socket)
            socket = self.pipe.carrier
            assert socket is not None
            if self.pipe.is_closed:
                socket.close(failed=self._closed_by_failure)
            return socket
