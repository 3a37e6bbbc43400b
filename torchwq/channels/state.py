"""The three states of a channel, and the interface of its backends."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from ..transport.capabilities import Capabilities
from ..transport.endpoint import Received
from ..transport.waiting import never

R = TypeVar("R")


class ChannelState(enum.Enum):
    """What state a channel is in.

    Attributes:
        OPEN: it can be written to and read from.
        CLOSED: nothing more can be written; items that were written before are there to be read.
        DRAINED: it is closed, and all of its items have been read.

    Source: torch-ipc's ``ipc.channel.OPEN``, ``CLOSED`` and ``DRAINED``.
    """

    OPEN = "open"
    CLOSED = "closed"
    DRAINED = "drained"

    def __repr__(self) -> str:
        return f"<ChannelState.{self.name}>"


class ChannelBackend(Protocol):
    """Carries items from writers to readers. Safe to use from several threads."""

    #: Who may read the items, and how large the payload of one may be.
    peer: Capabilities
    max_payload: int

    def try_write(self, obj: Any) -> ChannelState | None:
        """Encode and send one object. Returns the state, as ``Channel.write`` does.

        None, and nothing was sent, if the object cannot be encoded, or would have to wait for room.
        """
        ...

    def send(self, payload: Any) -> bool:
        """Send one item; False, and it was not sent, if the channel is closed. Blocks only for want of capacity."""
        ...

    def take(self) -> Received | None:
        """Take the next item, if there is one."""
        ...

    def can_take(self) -> bool:
        """Whether there is an item to take."""
        ...

    def try_read(self) -> tuple[ChannelState, Any] | None:
        """Take the next item, if there is one, and decode it. Returns the state of the channel with it."""
        ...

    def wait(
        self, attempt: Callable[[], R | None], deadline: float | None, stop: Callable[[], object] = never
    ) -> R | None:
        """See ``Pipe.wait``. It ends when the channel is closed, too."""
        ...

    @property
    def is_closed(self) -> bool: ...

    def state(self) -> ChannelState: ...

    def num_items(self) -> int: ...

    def close(self, *, failed: bool = False) -> None:
        """Close the channel for everybody. ``failed``: as a writer that could not write all it was to write."""
        ...

    @property
    def was_failed(self) -> bool:
        """Whether a failed writer has closed the channel."""
        ...

    def counts(self) -> tuple[int, int, int]:
        """Items that this process has written, that it has read, and those written that have not left it yet."""
        ...
