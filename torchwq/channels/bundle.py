"""A backlog as one item, the *bundle*: how a process that leaves hands on what the socket has no room for.

The items are pickled into memory of their own, whose descriptor goes first, before those that the items bring. So a
bundle needs room for a few bytes, however much is in it, and passes through the socket as any item with a descriptor.
"""

from __future__ import annotations

import contextlib
import pickle
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from ..memory import anonymous
from ..transport import bag
from ..transport.descriptors import close_with
from ..transport.endpoint import Received
from ..transport.outbox import Payload
from ..transport.trailer import BARE, kind_of, payload_of, trailer

#: Kind of a message that is a bundle.
_KIND: Final = 3
_MESSAGE: Final = trailer(0, _KIND)


@contextlib.contextmanager
def pack(backlog: Iterable[tuple[bytes, Payload | None]]) -> Iterator[tuple[bytes, int]]:
    """The message and the descriptor to send with it; ``backlog`` owns the descriptors of its items until then.

    Raises OSError if memory or descriptors have run out.
    """
    fds: list[int] = []
    parts = []
    for data, parcel in backlog:
        own = list(parcel.descriptors(-1)) if parcel is not None else []
        fds += own
        parts.append((data, len(own)))
    fd = anonymous.fill([pickle.dumps(parts)])
    with contextlib.closing(anonymous.Descriptor(fd)), bag.pack([fd, *fds]) as sack:
        yield _MESSAGE, sack.fileno()


def is_bundle(received: Received) -> bool:
    """Whether a message that has brought descriptors is one."""
    return kind_of(received[0]) == _KIND


def unpack(bundle: Received) -> deque[Received]:
    """The items, in order."""
    fds = bag.unpack(bundle[1][0])
    with contextlib.closing(anonymous.Descriptor(fds.pop(0))) as memory:
        parts = pickle.loads(anonymous.map_private(memory.fd))
    items: deque[Received] = deque()
    for data, count in parts:
        items.append((data, fds[:count]))
        del fds[:count]
    return items


def forwarded(item: Received) -> bytes | Forwarded:
    """An item of a bundle as an outbox takes it."""
    data, fds = item
    return Forwarded(data, fds) if fds or kind_of(data) != BARE else data


class Forwarded:
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

    def depart(self) -> None:
        """It was counted by the ledger when its writer sent it."""

    def descriptors(self, reader: int) -> Sequence[int]:
        return self.fds

    def come_back(self) -> None:
        pass
