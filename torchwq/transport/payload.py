"""What an outbox sends, and what chooses the descriptors that go along: interfaces that ``memory`` implements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Payload(Protocol):
    """A message with a kind and descriptors: see :class:`torchwq.memory.message.Message`.

    ``on_send`` counts it: the peer may receive it from now on. ``on_send_failed`` takes that back.
    """

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

    def choose(self, message: Any) -> tuple[Sequence[int], int]: ...
    def note_promise(self, message: Any) -> None: ...
