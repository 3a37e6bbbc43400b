"""The *backlog message*: a backlog as one item. So a process that leaves hands on what the socket has no room for.

The items are in memory of their own, whose descriptor goes with those that the items bring. So a backlog message needs
room for a few bytes, however much is in it, and passes through the socket as any item with a descriptor. Its layout is
:class:`~torchwq.marshalling.wire.BacklogMessage`'s.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager

from ..marshalling.wire import BacklogMessage
from ..transport.descriptors import close_with
from ..transport.endpoint import Received
from ..transport.payload import Payload
from ..transport.trailer import BARE, kind_of, payload_of


def encode(backlog: Iterable[tuple[bytes, Payload | None]]) -> AbstractContextManager[tuple[bytes, int]]:
    """The message and the descriptor to send with it; ``backlog`` owns the descriptors of its items until then.

    Raises OSError if memory or descriptors have run out.
    """
    return BacklogMessage.encode([(data, () if parcel is None else parcel.fds) for data, parcel in backlog])


def as_payload(item: Received) -> bytes | ForwardedItem:
    """An item of a backlog message as an outbox takes it."""
    data, fds = item
    return ForwardedItem(data, fds) if fds or kind_of(data) != BARE else data


class ForwardedItem:
    """An item that is sent on as it came: a parcel of which only the descriptors are known."""

    __slots__ = ("__weakref__", "_closing", "data", "fds", "kind")

    def __init__(self, data: bytes, fds: list[int]) -> None:
        self.data = payload_of(data)
        self.kind = kind_of(data)
        #: Closed when it has been sent.
        self.fds = fds
        self._closing = close_with(self, *fds)

    def detach(self) -> None:
        """It is not sent: the descriptors stay the item's."""
        self._closing.detach()

    def on_send(self) -> None:
        """It was counted by the reference table when its writer sent it."""

    def on_send_failed(self) -> None:
        pass
