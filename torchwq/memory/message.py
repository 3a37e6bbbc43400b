"""A message before it is sent: its bytes, its descriptors, and the blocks that it refers to.

A small object without tensors is just ``bytes``, its pickle. Everything else is a :class:`Message`, whose kind goes
into its :mod:`trailer <torchwq.transport.trailer>`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .. import _native
from ..transport import descriptors
from ..transport.trailer import PICKLE, trailer
from . import recycling
from .anonymous import Descriptor


class PythonMessageFields:
    """See ``Message``."""

    __slots__ = ("counts_sent", "data", "fds", "keep", "kind", "nbytes", "numbers", "only_blocks")

    data: bytes
    fds: Sequence[int]
    keep: Sequence[Any]
    kind: int
    numbers: Sequence[int]
    only_blocks: bool
    nbytes: int
    #: Called with 1 when it is sent, and with -1 if it was not sent after all.
    counts_sent: Sequence[Callable[[int], None]]

    def on_send(self) -> None:
        """It is about to be sent: count its references. Called before a reader can receive it."""
        if self.numbers:
            self.count_references()
        for count_sent in self.counts_sent:
            count_sent(1)

    def count_references(self) -> None:
        raise NotImplementedError


MessageFields = PythonMessageFields
if not TYPE_CHECKING and _native.core is not None:
    MessageFields = _native.core.MessageFields


class Message(MessageFields):
    """A payload that is more than bytes. It may be sent any number of times."""

    __slots__ = ()

    def __init__(
        self,
        data: bytes,
        fds: Sequence[int],
        keep: Sequence[Any],
        kind: int = PICKLE,
        numbers: Sequence[int] = (),
        only_blocks: bool = False,
        nbytes: int = 0,
    ) -> None:
        self.data = data
        self.fds = fds
        #: The owners of ``fds``, which live until the message is sent: storages, sockets.
        self.keep = keep
        self.kind = kind
        #: The numbers of the blocks that it refers to.
        self.numbers = numbers
        #: Whether ``fds`` are those of its blocks, and no others.
        self.only_blocks = only_blocks
        self.counts_sent = ()
        if fds and not only_blocks:
            self.counts_sent = [each.count_sent for each in keep if isinstance(each, Descriptor) and each.count_sent]
        #: Bytes of the message, and ``nbytes`` of all that it refers to.
        self.nbytes = len(data) + nbytes

    def count_references(self) -> None:
        """Count the references to its blocks as sent."""
        recycling.count_sent(self.numbers)

    def on_send_failed(self) -> None:
        """It was not sent, although ``on_send`` was called."""
        recycling.note_discarded(self.numbers)
        for count_sent in self.counts_sent:
            count_sent(-1)

    def copy(self) -> tuple[bytes, list[int]]:
        """The message as its reader would get it, with descriptors of its own. Raises ResourceError."""
        try:
            fds = descriptors.dup_all(self.fds)
        except OSError as error:
            raise descriptors.resource_error(error) from error
        self.on_send()
        return self.data + trailer(0, self.kind), fds


if _native.core is not None:
    _native.core.set_message(Message)
