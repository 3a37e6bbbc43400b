"""What travels: the bytes of one message, its descriptors, the blocks it refers to, and what must stay alive until it
is sent.

A plain small object is just ``bytes``, its pickle. Everything else is a :class:`Message`, whose kind goes into the
message's :mod:`trailer <torchwq.transport.trailer>`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..transport import descriptors
from ..transport.descriptors import close_fds
from ..transport.trailer import PICKLE, trailer
from . import recycling
from .anonymous import Descriptor, resource_error


class Message:
    """A payload that is more than bytes. It may be sent any number of times."""

    __slots__ = ("_counts_sent", "data", "fds", "keep", "kind", "nbytes", "numbers", "only_blocks")

    def __init__(
        self,
        data: bytes,
        fds: list[int],
        keep: list[Any],
        kind: int = PICKLE,
        numbers: Sequence[int] = (),
        only_blocks: bool = False,
    ) -> None:
        self.data = data
        self.fds = fds
        #: Owners of ``fds``: storages, sockets.
        self.keep = keep
        self.kind = kind
        #: Of the blocks that it refers to.
        self.numbers = numbers
        #: Whether ``fds`` are those of its blocks and nothing else.
        self.only_blocks = only_blocks
        self._counts_sent: Sequence[Callable[[int], None]] = ()
        if fds and not only_blocks:
            self._counts_sent = [each.count_sent for each in keep if isinstance(each, Descriptor) and each.count_sent]
        #: Of the message and of all that it refers to.
        self.nbytes = len(data)

    def on_send(self) -> None:
        """Call this before it can be received: the reference table counts its references."""
        if self.numbers:
            recycling.count_sent(self.numbers)
        for count_sent in self._counts_sent:
            count_sent(1)

    def on_send_failed(self) -> None:
        """It was not sent after ``on_send``."""
        recycling.note_discarded(self.numbers)
        for count_sent in self._counts_sent:
            count_sent(-1)

    def copy(self) -> tuple[bytes, list[int]]:
        """The message as its reader would get it, with descriptors of its own. Raises ResourceError."""
        fds: list[int] = []
        try:
            for fd in self.fds:
                fds.append(descriptors.dup(fd))
        except OSError as error:
            close_fds(fds)
            raise resource_error(error) from error
        self.on_send()
        return self.data + trailer(0, self.kind), fds


Payload = bytes | Message
