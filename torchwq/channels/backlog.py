"""How a process that leaves hands its backlog on.

Note [Handing a backlog on].

A process that ends cannot wait for readers, who may be waiting for it to end. So it sends what waits in its outbox as
one item, the *backlog message*: the items are in memory of their own, whose descriptor goes with those that the items
bring (see :class:`~torchwq.marshalling.wire.BacklogMessage`). However large the backlog is, its message needs room for
a few bytes. Room is kept for it: the socket's buffer is smaller than the system allows, and grows for this message.

Whoever receives the message takes its first item and sends the others on, as a backlog of its own. Their writer is
gone, so they are its last ones, and stay in order. If the channel is closed, or shut down, they stay with the receiver.

A backlog message counts in BACKLOG_MESSAGES while it is under way: see Note [Closing a channel].
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from ..marshalling.wire import BacklogMessage
from ..transport import polling
from ..transport.descriptors import close_with
from ..transport.endpoint import Endpoint, Received
from ..transport.outbox import Outbox
from ..transport.trailer import BARE, kind_of, payload_of
from .fast_receive import FastReceiver
from .table import BACKLOG_MESSAGES, ChannelTable

#: The size of the socket's buffer in bytes: usually, and what it may grow to for a backlog message, in these steps.
BUFFER_SIZE: Final = 160 * 1024
_MAX_BUFFER_SIZE: Final = 1 << 20
_BUFFER_STEP: Final = 4096
#: How long, in seconds, a backlog message waits for room where the buffer cannot grow.
_ROOM_TIMEOUT: Final = 5.0
_POLL_INTERVAL: Final = 0.02


class BacklogTransfer:
    """Sends the backlog of this process, and receives those of others.

    Args:
        table: the channel's.
        outbox: has the backlog.
        outgoing: where the outbox sends to.
        receiver: is told that descriptors are sent, and that items are there that it does not see.
        on_received: called when the items of a backlog message are not under way any more.
    """

    def __init__(
        self,
        table: ChannelTable,
        outbox: Outbox,
        outgoing: Endpoint,
        receiver: FastReceiver,
        on_received: Callable[[], None],
    ) -> None:
        self._table = table
        self._words = table.words
        self._outbox = outbox
        self._outgoing = outgoing
        self._receiver = receiver
        self._on_received = on_received
        self._lock = threading.RLock()
        #: Whether the outbox is given items now that were written before the closing.
        self.is_forwarding = False
        #: Received items that can go nowhere else.
        self.unforwarded: deque[Received] = deque()

    def send(self) -> None:
        """Send the backlog as one message; give it up if nobody is there who could read it.

        Called with the table's lock held, when nothing more is written.
        """
        self._receiver.announce_descriptors()  # takes its time, in which the reactor may send the backlog
        backlog = self._outbox.withdraw()
        if backlog:
            self._words[BACKLOG_MESSAGES] += 1
            sent = False
            try:
                items = [(data, () if message is None else message.fds) for data, message in backlog]
                with BacklogMessage.encode(items) as (data, fd):
                    sent = self._send_into_full_socket(data, fd)
            except OSError:
                pass  # nobody can receive it, or there are no descriptors left to send it with
            if sent:
                for _ in backlog:
                    self._table.count_sent()
            else:
                self._words[BACKLOG_MESSAGES] -= 1
                if self._table.any_other_lives():
                    print(
                        f"torchwq: {len(backlog)} items of a channel are lost: nobody has made room for them",
                        file=sys.stderr,
                    )
        self._table.show_backlog(False)

    def _send_into_full_socket(self, data: bytes, fd: int) -> bool:
        """Send one message although there is no room; False if others live and have not made any for a while."""
        # In small steps: others that leave with a backlog wait for the same room.
        try:
            for size in range(BUFFER_SIZE, _MAX_BUFFER_SIZE, _BUFFER_STEP):
                self._outgoing.set_buffer_size(size)
                if self._outgoing.try_send(data, [fd]):
                    return True
            until = time.monotonic() + _ROOM_TIMEOUT
            while time.monotonic() < until and self._table.any_other_lives():
                polling.writable(_POLL_INTERVAL, self._outgoing.fileno())
                if self._outgoing.try_send(data, [fd]):
                    return True
        finally:
            self._outgoing.set_buffer_size(BUFFER_SIZE)
        return False

    def receive(self, received: Received) -> Received | None:
        """Take the first item of a backlog message, and send the others on. None if there is no item in it."""
        items = BacklogMessage.decode(*received)
        for _ in items:
            self._table.count_attempt()
            self._table.count_taken()
        first = items.popleft() if items else None
        with self._lock:
            self._forward(items)
        with self._table.locked():
            self._words[BACKLOG_MESSAGES] = max(0, int(self._words[BACKLOG_MESSAGES]) - 1)
        self._on_received()
        return first

    def _forward(self, items: deque[Received]) -> None:
        self.is_forwarding = True
        while items:
            data, fds = items[0]
            item = _ForwardedItem(data, fds) if fds or kind_of(data) != BARE else data
            try:
                self._outbox.send(item)
            except BrokenPipeError:  # the channel was closed
                if isinstance(item, _ForwardedItem):
                    item.detach()
                break
            items.popleft()
        self.is_forwarding = False
        if items:
            self._receiver.stop()
            self.unforwarded += items


class _ForwardedItem:
    """A payload that is sent on as it came: only its descriptors are known."""

    __slots__ = ("__weakref__", "_closing", "data", "fds", "kind")

    def __init__(self, data: bytes, fds: list[int]) -> None:
        self.data = payload_of(data)
        self.kind = kind_of(data)
        #: Closed when the item has been sent.
        self.fds = fds
        self._closing = close_with(self, *fds)

    def detach(self) -> None:
        """It is not sent: the descriptors stay the item's."""
        self._closing.detach()

    def on_send(self) -> None:
        """The reference table counted it when its writer sent it."""

    def on_send_failed(self) -> None:
        pass
