"""What an outbox sends, and what chooses the descriptors that go along: interfaces that ``memory`` implements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Payload(Protocol):
    """A message with a kind, descriptors and an owner who counts it: see :class:`torchwq.memory.message.Message`."""

    @property
    def data(self) -> bytes: ...
    @property
    def kind(self) -> int: ...
    @property
    def fds(self) -> Sequence[int]: ...
    def on_send(self) -> None:
        """Count it: the peer may receive it from now on."""

    def on_send_failed(self) -> None:
        """Take ``on_send`` back: it will not be sent."""


class Promises(Protocol):
    """Chooses which descriptors stay at home: see :class:`torchwq.memory.promises.SentBlocks`."""

    def choose(self, message: Any) -> tuple[Sequence[int], int]: ...
    def note_promise(self, message: Any) -> None: ...
