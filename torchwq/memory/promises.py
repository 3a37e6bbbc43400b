"""Messages without the descriptors of blocks that their reader has already got over the same connection.

Passing a descriptor costs both sides a few microseconds, and most blocks are sent again and again. Where a connection
has one reader (answers to a queue's owner, batches of a loader's worker), each of its senders therefore remembers which
blocks it has sent over it, and the reader keeps their descriptors.

Note [in-band promises]
~~~~~~~~~~~~~~~~~~~~~~~
The protocol needs the order of the connection, and one shared word (see the last item). It needs no clock.

* The reader gives each sender an id, used once, and *room* for a number of blocks. A message whose trailer has the
  sender's id makes a promise: the reader keeps the descriptors that come with it.
* A sender leaves out the descriptors of a message if it has promised each of its blocks. It notes a promise when the
  message is in the socket, and revokes it by a FORGET message, whose content is chosen when it is sent. Only the thread
  that has claimed the outbox does either, so the reader gets both in the order in which they were done.
* The reader makes and ends promises while it takes messages, in their order, under the lock that it takes them under.
  A signal handler or a finalizer that reads in the middle of that, in the same thread, takes nothing.
* A sender that is gone sends nothing. When the reader knows of its end, it sends LEFT over the same connection, of
  which it has both ends: behind everything that the sender has sent.
* A thread may have taken a message and not decoded it when another thread takes the FORGET behind it. So messages carry
  the :class:`Epoch` in which they were taken. An epoch has the descriptors that were revoked in it, and the next epoch;
  the connection has the last one. So a descriptor lives as long as a message that may refer to it.
* A reader may lose a message, and what it promised: no descriptor was free, or a signal handler has raised an error
  meanwhile. It counts the losses in a shared word. A sender that sees a new loss sends each descriptor once more before
  it leaves it out again. Messages in flight that need a lost descriptor are lost, too.

A promise keeps memory, not its content: the reference table (``ref_table``) says whether the memory may be written
again. The maker may retire a block at any time. That ends its number, which the senders see in the next period.
"""

from __future__ import annotations

import functools
import struct
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from .. import _native
from ..transport import reactor
from ..transport.endpoint import Endpoint, Received
from ..transport.fork import closed_in_child, reset_in_child
from ..transport.trailer import BARE, KIND, number_of, payload_of
from . import limits, maintenance, recycling, tree_table
from .anonymous import Descriptor
from .counts import UNTRACKED
from .message import Message

#: All promises may take one of so many of the descriptors that the process may use for blocks. One sender gets one of
#: so many of those that are left, and no more than the maximum.
_FRACTION: Final = 2
_FRACTION_PER_SENDER: Final = 4
_MAX_ROOM: Final = 1024

#: Kinds of the protocol's own messages.
FORGET: Final = 4
LEFT: Final = 5
#: The id of the first sender of a connection.
ONLY_SENDER: Final = 1

_NUMBER: Final = struct.Struct("=Q")

# The reader's side


class References(Protocol):
    """See :class:`torchwq.marshalling.wire.References`."""

    @property
    def kind(self) -> int: ...
    def numbers(self, data: bytes, /) -> Sequence[int]:
        """The numbers of a message's blocks, in the order of its descriptors."""
        ...


class Epoch(list[int]):
    """An always empty list of descriptors, for a message that may refer to kept ones."""

    __slots__ = ("_kept", "next", "revoked")

    def __init__(self, kept: dict[int, dict[int, Descriptor]]) -> None:
        super().__init__()
        self._kept = kept
        #: Descriptors that were kept until this epoch ended, by the numbers of their blocks.
        self.revoked: dict[int, Descriptor] = {}
        self.next: Epoch | None = None

    def descriptor(self, number: int) -> int:
        """The descriptor of a block, which stays open for as long as this object lives; -1 if there is none."""
        for kept in list(self._kept.values()):
            if (found := kept.get(number)) is not None:
                return found.fd
        epoch: Epoch | None = self
        while epoch is not None:
            if (found := epoch.revoked.get(number)) is not None:
                return found.fd
            epoch = epoch.next
        return -1


class PythonKeptFields:
    """The part of ``KeptBlocks`` that each message passes through."""

    __slots__ = ("epoch", "is_closed", "kind")

    #: The kind of message whose descriptors may be left out.
    kind: int
    epoch: Epoch
    is_closed: bool

    def take(self, receive: Callable[[], Received | None]) -> Received | None:
        """Receive a message, ready to be decoded; processes the protocol's own. Raises as ``receive`` does.

        If an error loses a message, the senders send its descriptors again.
        """
        try:
            while True:
                received = receive()
                if received is None or received[0][KIND] == BARE:
                    return received
                answer = self.process(received)
                if answer is not None:
                    return answer
        except EOFError:
            raise
        except BaseException:
            self.count_loss()
            raise

    def process(self, received: Received) -> Received | None:
        raise NotImplementedError

    def count_loss(self) -> None:
        raise NotImplementedError


KeptFields = PythonKeptFields
if not TYPE_CHECKING and _native.core is not None:
    KeptFields = _native.core.KeptFields


class KeptBlocks(KeptFields):
    """The descriptors that the reader of one connection keeps for its senders. See Note [in-band promises].

    Its methods are called under the lock under which the reader takes messages.

    Args:
        references: the kind of message whose descriptors may be left out.
        words: memory that the senders share, for the count of lost messages.
        loss_index: which word has that count.
        poll_control: calls ``take_control_messages`` under that lock. While anything is kept, the reactor calls it in
            each period: a program that does not read for an hour must not keep the memory that its workers retire.
    """

    def __init__(
        self,
        references: References,
        words: memoryview | list[int],
        loss_index: int = 0,
        poll_control: Callable[[], object] | None = None,
    ) -> None:
        self._words, self._loss_index = words, loss_index
        self.kind = references.kind
        self._numbers_of = references.numbers
        self._poll_control = None if poll_control is None else weakref.WeakMethod(poll_control)
        self._is_poll_scheduled = False
        self._last_id = 0
        #: For each sender's id, descriptors by the numbers of their blocks.
        self._kept: dict[int, dict[int, Descriptor]] = {}
        self._rooms: dict[int, int] = {}
        self.epoch = Epoch(self._kept)
        self.is_closed = False
        closed_in_child(self)

    def add_sender(self) -> tuple[int, int]:
        """The id of a new sender, and for how many blocks it has room: for none after ``close``."""
        self._last_id += 1
        if self.is_closed:
            return self._last_id, 0
        self._rooms[self._last_id] = room = _reserve_room()
        self._kept[self._last_id] = {}
        return self._last_id, room

    def count_loss(self) -> None:
        """An error has lost a message: the senders will send its descriptors again."""
        if not self.is_closed:
            self._words[self._loss_index] += 1

    def process_or_count_loss(self, received: Received) -> Received | None:
        """See ``process``. An error loses the message."""
        try:
            return self.process(received)
        except BaseException:
            self.count_loss()
            raise

    def process(self, received: Received) -> Received | None:
        """A message that was just received, ready to be decoded; None if it was one of the protocol's own."""
        data, fds = received
        kind = data[KIND]
        if kind == self.kind:
            if fds:
                kept = self._kept.get(number_of(data))
                if kept is None:
                    return received
                for number, fd in zip(self._numbers_of(data), fds, strict=True):
                    kept.setdefault(number, Descriptor(fd))
                self.schedule_poll()
            if self.is_closed:  # meanwhile: its descriptors are not kept any more
                recycling.note_discarded(self._numbers_of(data))
                return None
            return data, self.epoch
        if kind in (FORGET, LEFT):
            sender, *numbers = (number for (number,) in _NUMBER.iter_unpack(payload_of(data)))
            if kind == FORGET:
                self._revoke(sender, numbers)
            else:
                self._revoke(sender, list(self._kept.get(sender, ())))
                self._kept.pop(sender, None)
                _return_room(self._rooms.pop(sender, 0))
            return None
        return received

    def take_control_messages(self, end: Endpoint) -> bool:
        """Take the protocol's own messages that are next. Returns whether another one is next then, or the end."""
        while (data := end.peek()) and data[KIND] in (FORGET, LEFT):
            received = end.try_receive()
            if received is not None:
                self.process(received)
        return data is not None

    def close(self) -> None:
        """Keep nothing any more. Messages that were taken already can still be decoded."""
        self.is_closed = True
        for sender in list(self._kept):
            self._revoke(sender, list(self._kept[sender]))
        self._kept.clear()
        while self._rooms:
            _return_room(self._rooms.popitem()[1])

    def poll_again(self) -> None:
        """Called by the reactor, without a lock."""
        self._is_poll_scheduled = False
        poll_control = None if self._poll_control is None else self._poll_control()
        if poll_control is not None:
            poll_control()
            if any(self._kept.values()):
                self.schedule_poll()

    def schedule_poll(self) -> None:
        """Let the reactor call ``poll_control`` after a period."""
        if not self._is_poll_scheduled and self._poll_control is not None:
            self._is_poll_scheduled = True
            try:
                reactor.get().call_later(maintenance.PERIOD, functools.partial(_poll_again, weakref.ref(self)))
            except BaseException:
                self._is_poll_scheduled = False  # as in ``maintenance.schedule``
                raise

    def abandon(self) -> None:
        self._kept.clear()
        self._rooms.clear()
        self.epoch = Epoch(self._kept)

    def _revoke(self, sender: int, numbers: Iterable[int]) -> None:
        kept, epoch = self._kept.get(sender, {}), self.epoch
        for number in numbers:
            if (found := kept.get(number)) is not None:
                epoch.revoked[number] = found  # first: a thread that decodes reads ``_kept`` before ``revoked``
                del kept[number]
        if epoch.revoked:
            epoch.next = Epoch(self._kept)
            self.epoch = epoch.next


def _poll_again(find: Callable[[], KeptBlocks | None]) -> None:
    blocks = find()
    if blocks is not None:
        blocks.poll_again()


#: The sum of the rooms of all senders.
_granted = 0


@reset_in_child
def _reset() -> None:
    global _granted
    _granted = 0
    _senders.clear()


def _reserve_room() -> int:
    global _granted
    room = min(_MAX_ROOM, max(0, limits.max_open_blocks() // _FRACTION - _granted) // _FRACTION_PER_SENDER)
    _granted += room
    return room


def _return_room(room: int) -> None:
    global _granted
    _granted = max(0, _granted - room)


# The senders' side


class PythonSentFields:
    """See ``SentBlocks``. With these the native part sees whether a message needs no descriptor."""

    __slots__ = ("loss_index", "recent", "seen_losses", "sent", "uncertain", "words")

    sent: set[int]
    #: Those that were sent in this period.
    recent: set[int]
    words: Sequence[int]
    loss_index: int
    #: The last known count of lost messages, and the blocks that may have been in them.
    seen_losses: int
    uncertain: set[int]


SentFields = PythonSentFields
if not TYPE_CHECKING and _native.core is not None:
    SentFields = _native.core.SentFields


class SentBlocks(SentFields):
    """What one sender has promised. Used by the thread that has claimed the outbox; ``revoke_stale`` by any.

    Args:
        sender: the id that the reader has given it.
        room: for how many blocks the reader has room.
        send_control: sends one of the protocol's own messages, without waiting.
        words: memory that the reader shares, with its count of lost messages.
        loss_index: which word has that count.
    """

    def __init__(
        self, sender: int, room: int, send_control: Callable[[Any], None], words: Sequence[int], loss_index: int = 0
    ) -> None:
        self.sender = sender
        self._room = room
        self._send_control = weakref.WeakMethod(send_control)
        self.sent = set()
        self.recent = set()
        self.words, self.loss_index = words, loss_index
        self.seen_losses = words[loss_index]
        self.uncertain = set()
        #: Those to be revoked, unless they are sent before the FORGET message is.
        self._stale: set[int] = set()
        _senders.add(weakref.ref(self, _senders.discard))

    def choose(self, message: Message) -> tuple[Sequence[int], int]:
        """Which descriptors a message that is about to be sent must have, and the number for its trailer."""
        if not message.only_blocks:
            return message.fds, 0
        numbers = message.numbers
        if self.words[self.loss_index] != self.seen_losses:
            self.seen_losses = self.words[self.loss_index]
            self.uncertain = set(self.sent)
        if self.sent.issuperset(numbers) and (not self.uncertain or self.uncertain.isdisjoint(numbers)):
            self.recent.update(numbers)
            return (), 0
        new = set(numbers) - self.sent
        if UNTRACKED in new or len(self.sent) + len(new) > self._room:
            return message.fds, 0
        return message.fds, self.sender

    def note_promise(self, message: Message) -> None:
        """The message is in the socket, with a trailer that promises."""
        self.sent.update(message.numbers)
        self.uncertain.difference_update(message.numbers)
        self.recent.update(message.numbers)
        maintenance.schedule()

    def revoke_stale(self) -> bool:
        """Revoke the promises of retired blocks, and, where little room is left, of those not sent in this period.

        Returns whether any promises are left to check.
        """
        table = tree_table.current()
        sent = set(self.sent)
        used, self.recent = self.recent, set()
        is_crowded = len(sent) > self._room // 2
        self._stale = {n for n in sent if (is_crowded and n not in used) or table is None or not table.is_current(n)}
        if self._stale and (send_control := self._send_control()) is not None:
            send_control(_Revocation(self))
        return bool(sent)

    def take_revoked(self) -> bytes:
        """The content of a FORGET message that is sent now."""
        gone, self._stale = self._stale - self.recent, set()
        self.sent -= gone
        self.uncertain -= gone
        return b"".join(map(_NUMBER.pack, (self.sender, *gone)))


#: Plain weak references: during an iteration over a ``WeakSet`` no other thread may add to it.
_senders: set[weakref.ref[SentBlocks]] = set()


@maintenance.after_period  # without the lock: a thread that sends may have to send others' messages, under their locks
def _revoke_all_stale() -> bool:
    senders = [find() for find in list(_senders)]
    has_promises = [each.revoke_stale() for each in senders if each is not None]
    return any(has_promises)


class _ControlMessage:
    """One of the protocol's own messages. It has no descriptors and no references."""

    fds: Final[list[int]] = []
    only_blocks = False

    def on_send(self) -> None: ...

    def on_send_failed(self) -> None: ...


class _Revocation(_ControlMessage):
    """Revokes promises. Chooses them when it is sent, once, even if the socket has no room."""

    kind = FORGET

    def __init__(self, blocks: SentBlocks) -> None:
        self._blocks = blocks

    @functools.cached_property
    def data(self) -> bytes:
        return self._blocks.take_revoked()


class SenderLeft(_ControlMessage):
    """Revokes, in the place of a sender that is gone, all its promises."""

    kind = LEFT

    def __init__(self, sender: int) -> None:
        self.data = _NUMBER.pack(sender)
