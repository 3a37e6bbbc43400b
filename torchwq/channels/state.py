"""The three states of a channel, and what both its ways share."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, Protocol

from ..transport.capabilities import Capabilities
from ..transport.endpoint import Received
from ..transport.waiting import never


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
    """How items get from writers to readers. Safe to use from several threads."""

    #: Who may read them, and how large one may be.
    peer: Capabilities
    max_payload: int

    def try_write(self, obj: Any) -> ChannelState | None:
        """Encode and send one object; the state as ``Channel.write`` returns it.

        None, and nothing is sent, if it cannot be encoded, or may have to wait for room.
        """
        ...

    def send(self, payload: Any) -> bool:
        """Send one item; False, and it is not sent, if the channel is closed. Blocks only for want of capacity."""
        ...

    def take(self) -> Received | None:
        """The next item, if there is one."""
        ...

    def can_take(self) -> bool:
        """Whether an item is here to be taken."""
        ...

    def try_read(self) -> tuple[ChannelState, Any] | None:
        """The same, decoded, with the state of the channel."""
        ...

    def wait(self, deadline: float, stop: Callable[[], object] = never) -> Received | None:
        """The next item; None after ``deadline`` (time.monotonic), or if the channel has been closed, or earlier.

        Also if there is a reason to ``stop``; who makes one calls ``wake_all`` then.
        """
        ...

    @property
    def is_closed(self) -> bool: ...

    def state(self) -> ChannelState: ...

    def num_items(self) -> int: ...

    def close(self, *, failed: bool = False) -> None:
        """``failed``: as one that could not write all it was to write."""
        ...

    @property
    def was_failed(self) -> bool:
        """Whether it was closed so."""
        ...

    def counts(self) -> tuple[int, int, int]:
        """Items written and read by this process, and of those written how many have not left it yet."""
        ...
