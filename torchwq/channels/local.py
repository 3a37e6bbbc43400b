"""The backend of a channel that no other process has: a mailbox."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Final

from ..marshalling import codec
from ..marshalling.copies import try_copy
from ..transport.capabilities import SAME_PROCESS
from ..transport.endpoint import Received
from ..transport.mailbox import Mailbox
from ..transport.waiting import never
from .state import ChannelState

#: A writer that waits for room looks so often, in seconds.
_POLL_INTERVAL: Final = 0.25


class LocalChannel:
    """Carries items between threads.

    Invariant: a writer holds ``lock`` from its look whether the channel is closed, or has a successor, until its item
    is in the mailbox. So no item comes after the closing, and none is left behind when the items move.
    """

    peer = SAME_PROCESS
    max_payload = codec.UNLIMITED

    def __init__(self, capacity: int | None) -> None:
        self.lock = threading.RLock()
        self.mailbox: Mailbox[Received] = Mailbox()
        #: The backend to which the items have moved, if another process has the channel now.
        self.successor: Any = None
        self._capacity = capacity
        self._room = threading.Condition(self.lock)
        self._closed = False
        self._written = 0
        self._failed = False
        #: Called by a writer that waits for room, now and then; may raise.
        self.on_wait_for_room: Callable[[], None] | None = None

    def try_write(self, obj: Any) -> ChannelState | None:
        if self._capacity is not None:
            return None
        payload = try_copy(obj)
        if payload is None:
            try:
                payload = codec.encode(obj, codec.UNLIMITED, peer=SAME_PROCESS)
            except Exception:
                return None
        return ChannelState.OPEN if self.send(payload) else self.state()

    def send(self, payload: Any) -> bool:
        if self._capacity is not None:
            return self._send_if_room(payload)
        with self.lock:
            if self.successor is None:
                return self._put(payload)
        return self._forward(payload)

    def _put(self, payload: Any) -> bool:
        if self._closed:
            return False
        self._written += 1
        self.mailbox.put(codec.deliver_local(payload))
        return True

    def _forward(self, payload: Any) -> bool:
        sent: bool = self.successor.send(codec.for_other_processes(payload, self.successor.max_payload))
        return sent

    def _send_if_room(self, payload: Any) -> bool:
        assert self._capacity is not None
        with self._room:
            while not self._closed and self.successor is None and len(self.mailbox) >= self._capacity:
                if not self._room.wait(_POLL_INTERVAL) and self.on_wait_for_room is not None:
                    self.on_wait_for_room()
            if self.successor is None:
                return self._put(payload)
        return self._forward(payload)

    def take(self) -> Received | None:
        received = self.mailbox.take()
        if received is not None:
            if self._capacity is not None:
                with self._room:
                    self._room.notify()
        elif self.successor is not None:
            return self.successor.take()  # type: ignore[no-any-return]
        return received

    def can_take(self) -> bool:
        return self.mailbox.has_message()

    def try_read(self) -> tuple[ChannelState, Any] | None:
        received = self.take()
        if received is None:
            return None
        return ChannelState.CLOSED if self.is_closed else ChannelState.OPEN, codec.decode(*received)

    def wait(self, deadline: float, stop: Callable[[], object] = never) -> Received | None:
        if self._has_ended():
            return self.take()
        return self.mailbox.wait(self.take, deadline, lambda: self._has_ended() or stop())

    def _has_ended(self) -> bool:
        return self._closed or self.successor is not None

    @property
    def was_failed(self) -> bool:
        return self._failed

    @property
    def is_closed(self) -> bool:
        return bool(self._closed if self.successor is None else self.successor.is_closed)

    def state(self) -> ChannelState:
        if self.successor is not None:
            return self.successor.state()  # type: ignore[no-any-return]
        if not self._closed:
            return ChannelState.OPEN
        return ChannelState.CLOSED if len(self.mailbox) else ChannelState.DRAINED

    def num_items(self) -> int:
        return len(self.mailbox) if self.successor is None else self.successor.num_items()

    def close(self, *, failed: bool = False) -> None:
        with self._room:
            if self.successor is not None:
                self.successor.close(failed=failed)
            self._failed = self._failed or (failed and not self._closed)
            self._closed = True
            self._room.notify_all()
        self.mailbox.end()

    def counts(self) -> tuple[int, int, int]:
        return self._written, self._written - len(self.mailbox), 0

    def move_to(self, successor: Any) -> None:
        """Send all items to ``successor``, and all that come later. Called with the lock held.

        Raises, and changes nothing, if an item cannot go there.
        """
        items = []
        while (received := self.mailbox.take()) is not None:
            items.append(received)
        try:
            payloads = [codec.for_other_processes(data, successor.max_payload) for data, _ in items]
        except BaseException:
            for received in items:
                self.mailbox.put(received)
            raise
        successor.table.set_initial_counts(self._written - len(items))
        for payload in payloads:
            successor.send(payload)
        if self._closed:
            successor.close(failed=self._failed)
        self.successor = successor
        self._room.notify_all()
        self.mailbox.wake_all()
