"""What an outbox sends, and who says what goes along with it: this room knows no more of either."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Payload(Protocol):
    """A payload that is more than bytes: see :class:`torchwq.memory.message.Message`."""

    @property
    def data(self) -> bytes: ...
    @property
    def kind(self) -> int: ...
    @property
    def fds(self) -> Sequence[int]: ...
    def on_send(self) -> None: ...
    def on_send_failed(self) -> None: ...


class Promises(Protocol):
    """Chooses which descriptors stay at home: see :class:`torchwq.memory.promises.SentBlocks`."""

    def choose(self, parcel: Any) -> tuple[Sequence[int], int]: ...
    def note_promise(self, parcel: Any) -> None: ...
