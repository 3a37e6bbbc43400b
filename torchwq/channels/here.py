"""The way of a channel that no other process has: a mailbox."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Final

from ..marshalling import codec
from ..marshalling.copies import copied
from ..transport.capabilities import SAME_PROCESS
from ..transport.endpoint import Received
from ..transport.mailbox import Mailbox
from ..transport.waiting import never
from .state import ChannelState

#: Seconds between two looks of a writer that waits for room.
_LOOK_EVERY: Final = 0.25


class Here:
    """Items between threads.

    Invariant: ``lock`` covers "is it closed, or gone elsewhere?" and putting. So nothing comes after the closing, and
    nothing is left behind when the items move to a line.
    """

    peer = SAME_PROCESS
    max_payload = codec.UNLIMITED

    def __init__(self, capacity: int | None) -> None:
        self.lock = threading.RLock()
        self.box: Mailbox[Received] = Mailbox()
        #: Where the items have gone, if another process has the channel now.
        self.next: Any = None
        self._capacity = capacity
        self._room = threading.Condition(self.lock)
        self._closed = False
        self._written = 0
        self._failed = False
        #: Called by a writer that waits for room, now and then; may raise.
        self.on_wait_for_room: Callable[[], None] | None = None

    def put(self, obj: Any) -> ChannelState | None:
        if self._capacity is not None:
            return None
        payload = copied(obj)
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
            if self.next is None:
                return self._put(payload)
        return self._pass_on(payload)

    def _put(self, payload: Any) -> bool:
        if self._closed:
            return False
        self._written += 1
        self.box.put(codec.received(payload))
        return True

    def _pass_on(self, payload: Any) -> bool:
        sent: bool = self.next.send(codec.for_others(payload, self.next.max_payload))
        return sent

    def _send_if_room(self, payload: Any) -> bool:
        assert self._capacity is not None
        with self._room:
            while not self._closed and self.next is None and len(self.box) >= self._capacity:
                if not self._room.wait(_LOOK_EVERY) and self.on_wait_for_room is not None:
                    self.on_wait_for_room()
            if self.next is None:
                return self._put(payload)
        return self._pass_on(payload)

    def take(self) -> Received | None:
        received = self.box.take()
        if received is not None:
            if self._capacity is not None:
                with self._room:
                    self._room.notify()
        elif self.next is not None:
            return self.next.take()  # type: ignore[no-any-return]
        return received

    def can_take(self) -> bool:
        return self.box.has_message()

    def read(self) -> tuple[ChannelState, Any] | None:
        received = self.take()
        if received is None:
            return None
        return ChannelState.CLOSED if self.is_closed else ChannelState.OPEN, codec.decode(*received)

    def sleep(self, deadline: float, stop: Callable[[], object] = never) -> Received | None:
        if self._has_ended():
            return self.take()
        return self.box.wait(self.take, deadline, lambda: self._has_ended() or stop())

    def _has_ended(self) -> bool:
        return self._closed or self.next is not None

    @property
    def was_failed(self) -> bool:
        return self._failed

    @property
    def is_closed(self) -> bool:
        return bool(self._closed if self.next is None else self.next.is_closed)

    def state(self) -> ChannelState:
        if self.next is not None:
            return self.next.state()  # type: ignore[no-any-return]
        if not self._closed:
            return ChannelState.OPEN
        return ChannelState.CLOSED if len(self.box) else ChannelState.DRAINED

    def num_items(self) -> int:
        return len(self.box) if self.next is None else self.next.num_items()

    def close(self, *, failed: bool = False) -> None:
        with self._room:
            if self.next is not None:
                self.next.close(failed=failed)
            self._failed = self._failed or (failed and not self._closed)
            self._closed = True
            self._room.notify_all()
        self.box.end()

    def counts(self) -> tuple[int, int, int]:
        return self._written, self._written - len(self.box), 0

    def empty_into(self, line: Any) -> None:
        """Send all items on a line, and everything that comes later. Raises, and changes nothing, if one cannot go.

        Called with the lock held.
        """
        items = []
        while (received := self.box.take()) is not None:
            items.append(received)
        try:
            payloads = [codec.for_others(data, line.max_payload) for data, _ in items]
        except BaseException:
            for received in items:
                self.box.put(received)
            raise
        line.begin(self._written - len(items))
        for payload in payloads:
            line.send(payload)
        if self._closed:
            line.close(failed=self._failed)
        self.next = line
        self._room.notify_all()
        self.box.wake_all()
