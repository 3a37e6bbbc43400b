"""Leaves the descriptors of blocks at home that the reader of a connection has got over that connection before.

Passing a descriptor costs both sides a few microseconds, and most blocks are sent again and again. Where a connection
has one reader (answers to a queue's owner, batches of a loader's worker), each of its senders therefore remembers which
blocks it has sent over it, and the reader keeps their descriptors.

Note [in-band promises]
~~~~~~~~~~~~~~~~~~~~~~~
The order of the connection is all that this rests on. No clock is asked, and no shared word but one: see the last item.

* The reader gives each sender an id, used once, and says for how many blocks it has *room*. A message whose trailer has
  the sender's id makes a promise: the reader keeps the descriptors that came with it.
* A sender leaves the descriptors of a message out if it has promised each of its blocks. It notes a promise when the
  message is in the socket, and takes it back by a FORGET message, whose content is chosen when it is sent. Only who has
  claimed the outbox does either, so the reader learns of both in the order in which they were done.
* The reader makes and ends promises while it takes messages, in their order, under the lock that it takes them under.
  A signal handler or a finalizer that reads in the middle of that, in the same thread, takes nothing.
* A sender that is gone says nothing. When the reader knows of that, it sends LEFT over the same connection, of which it
  has both ends: all that the sender had sent comes before.
* A message that was taken and not decoded may refer to what a later message has ended, in another thread. So messages
  carry the :class:`Epoch` in which they were taken. An epoch has the descriptors that were given up in it, and the next
  epoch; the connection has the last one. What a message refers to is therefore there until the message is gone, and
  closed with the last message that could refer to it.
* A reader may lose a message, and what it promised: no descriptor was free, or a signal handler has raised an error
  meanwhile. It counts such losses in a shared word, at which the senders look before they leave anything out: what they
  have promised until then they send once more. Of what is under way by then, what needs the lost descriptor is lost.

What a promise keeps is memory, not content: the reference table (``ref_table``) says whether the memory may be written
anew. The maker gives a block up when it likes. That ends its number, which the senders see at their next look.
"""

from __future__ import annotations

import functools
import struct
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Protocol

from ..transport import reactor
from ..transport.endpoint import Endpoint, Received
from ..transport.fork import closed_in_child, reset_in_child
from ..transport.trailer import BARE, KIND, number_of, payload_of
from . import limits, maintenance, recycling, tree_table
from .anonymous import Descriptor
from .message import Message
from .ref_table import UNTRACKED

#: Promises may take this part of the descriptors that the process may use for blocks. One sender gets this part of what
#: is left of that, and no more than the most.
_FRACTION: Final = 2
_FRACTION_PER_SENDER: Final = 4
_MAX_ROOM: Final = 1024

#: Kinds of messages that the protocol has for itself.
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
        """Those of the blocks that a message refers to, in the order of its descriptors."""
        ...


class Epoch(list[int]):
    """Stands, always empty, in the place of the descriptors of a message that may refer to what is kept."""

    __slots__ = ("_kept", "next", "revoked")

    def __init__(self, kept: dict[int, dict[int, Descriptor]]) -> None:
        super().__init__()
        self._kept = kept
        #: What was kept until this epoch ended, by the numbers of the blocks.
        self.revoked: dict[int, Descriptor] = {}
        self.next: Epoch | None = None

    def descriptor(self, number: int) -> int:
        """That of a block, which stays open for as long as this object lives; -1 if there is none."""
        for kept in list(self._kept.values()):
            if (found := kept.get(number)) is not None:
                return found.fd
        epoch: Epoch | None = self
        while epoch is not None:
            if (found := epoch.revoked.get(number)) is not None:
                return found.fd
            epoch = epoch.next
        return -1


class KeptBlocks:
    """What the reader of one connection keeps for its senders. See Note [in-band promises].

    Its methods are called under the lock under which the reader takes messages.

    Args:
        references: the kind of message whose descriptors may stay at home.
        words: memory that the senders share, where this counts the messages that it has lost.
        loss_index: of the word in which it does.
        poll_control: calls ``take_control_messages`` under that lock. While something is kept, the reactor calls it
            now and then: a program that does not read for an hour must not keep the memory that its workers gave up.
    """

    def __init__(
        self,
        references: References,
        words: memoryview | list[int],
        loss_index: int = 0,
        poll_control: Callable[[], object] | None = None,
    ) -> None:
        self._words, self._loss_index = words, loss_index
        self._kind = references.kind
        self._numbers_of = references.numbers
        self._poll_control = None if poll_control is None else weakref.WeakMethod(poll_control)
        self._is_poll_scheduled = False
        self._last_id = 0
        #: Descriptors by the numbers of their blocks, by the ids of the senders.
        self._kept: dict[int, dict[int, Descriptor]] = {}
        self._rooms: dict[int, int] = {}
        self._epoch = Epoch(self._kept)
        self._is_closed = False
        closed_in_child(self)

    def add_sender(self) -> tuple[int, int]:
        """A new sender: its id, and for how many blocks it has room. After ``close`` it has none."""
        self._last_id += 1
        if self._is_closed:
            return self._last_id, 0
        self._rooms[self._last_id] = room = _reserve_room()
        self._kept[self._last_id] = {}
        return self._last_id, room

    def take(self, receive: Callable[[], Received | None]) -> Received | None:
        """What ``receive`` gives, as it is to be decoded, but for what is meant for this object. Raises as that.

        If a message is lost by an error, the senders bring again what it may have brought.
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
            if not self._is_closed:
                self._words[self._loss_index] += 1
            raise

    def process(self, received: Received) -> Received | None:
        """A message that was just taken, as it is to be decoded; None if it was meant for this object."""
        data, fds = received
        kind = data[KIND]
        if kind == self._kind:
            if fds:
                kept = self._kept.get(number_of(data))
                if kept is None:
                    return received
                for number, fd in zip(self._numbers_of(data), fds, strict=True):
                    kept.setdefault(number, Descriptor(fd))
                self.schedule_poll()
            if self._is_closed:  # meanwhile: what it refers to is not kept any more
                recycling.note_discarded(self._numbers_of(data))
                return None
            return data, self._epoch
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
        """Take what was sent aside and is next. Returns whether a message is next then, or the end."""
        while (data := end.peek()) and data[KIND] in (FORGET, LEFT):
            received = end.try_receive()
            if received is not None:
                self.process(received)
        return data is not None

    def close(self) -> None:
        """Nothing more is taken. What was taken already can still be decoded."""
        self._is_closed = True
        for sender in list(self._kept):
            self._revoke(sender, list(self._kept[sender]))
        self._kept.clear()
        while self._rooms:
            _return_room(self._rooms.popitem()[1])

    def poll_again(self) -> None:
        """Called by the reactor, with no lock held."""
        self._is_poll_scheduled = False
        poll_control = None if self._poll_control is None else self._poll_control()
        if poll_control is not None:
            poll_control()
            if any(self._kept.values()):
                self.schedule_poll()

    def schedule_poll(self) -> None:
        """Let the reactor call ``poll_control`` in a while."""
        if not self._is_poll_scheduled and self._poll_control is not None:
            self._is_poll_scheduled = True
            reactor.get().call_later(maintenance.PERIOD, functools.partial(_poll_again, weakref.ref(self)))

    def abandon(self) -> None:
        self._kept.clear()
        self._rooms.clear()
        self._epoch = Epoch(self._kept)

    def _revoke(self, sender: int, numbers: Iterable[int]) -> None:
        kept, epoch = self._kept.get(sender, {}), self._epoch
        for number in numbers:
            if (found := kept.get(number)) is not None:
                epoch.revoked[number] = found  # first: a thread that decodes looks among what is kept before
                del kept[number]
        if epoch.revoked:
            epoch.next = Epoch(self._kept)
            self._epoch = epoch.next


def _poll_again(find: Callable[[], KeptBlocks | None]) -> None:
    blocks = find()
    if blocks is not None:
        blocks.poll_again()


#: For how many blocks there is room in all.
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


class SentBlocks:
    """What one sender has promised. Used by who has claimed the outbox; ``revoke_stale`` by anybody.

    Args:
        sender: the id that the reader has given it.
        room: for how many blocks the reader has room.
        send_control: sends a message of the protocol's own, without waiting.
        words: memory that the reader shares, where it counts the messages that it has lost.
        loss_index: of the word in which it does.
    """

    def __init__(
        self, sender: int, room: int, send_control: Callable[[Any], None], words: Sequence[int], loss_index: int = 0
    ) -> None:
        self.sender = sender
        self._room = room
        self._send_control = weakref.WeakMethod(send_control)
        self._sent: set[int] = set()
        #: Those that were sent since the last look.
        self._recent: set[int] = set()
        self._words, self._loss_index = words, loss_index
        #: How many messages had been lost when this looked last, and what may have been in them.
        self._seen_losses = words[loss_index]
        self._uncertain: set[int] = set()
        #: Those to be forgotten, unless they are sent before that leaves.
        self._stale: set[int] = set()
        _senders.add(weakref.ref(self, _senders.discard))

    def choose(self, message: Message) -> tuple[Sequence[int], int]:
        """Which descriptors must go along with a message that is about to be sent, and what its trailer says."""
        if not message.only_blocks:
            return message.fds, 0
        numbers = message.numbers
        if self._words[self._loss_index] != self._seen_losses:
            self._seen_losses = self._words[self._loss_index]
            self._uncertain = set(self._sent)
        if self._sent.issuperset(numbers) and (not self._uncertain or self._uncertain.isdisjoint(numbers)):
            self._recent.update(numbers)
            return (), 0
        new = set(numbers) - self._sent
        if UNTRACKED in new or len(self._sent) + len(new) > self._room:
            return message.fds, 0
        return message.fds, self.sender

    def note_promise(self, message: Message) -> None:
        """The message is in the socket, with a trailer that promises."""
        self._sent.update(message.numbers)
        self._uncertain.difference_update(message.numbers)
        self._recent.update(message.numbers)
        maintenance.schedule()

    def revoke_stale(self) -> bool:
        """Take back, by a message, what was promised for blocks that are no more, and, where little room is left, for
        those that were not sent for a while. Returns whether there is anything to look at again."""
        table = tree_table.current()
        sent = set(self._sent)
        used, self._recent = self._recent, set()
        is_crowded = len(sent) > self._room // 2
        self._stale = {n for n in sent if (is_crowded and n not in used) or table is None or not table.is_current(n)}
        if self._stale and (send_control := self._send_control()) is not None:
            send_control(_Revocation(self))
        return bool(sent)

    def take_revoked(self) -> bytes:
        """What a FORGET message says that leaves now."""
        gone, self._stale = self._stale - self._recent, set()
        self._sent -= gone
        self._uncertain -= gone
        return b"".join(map(_NUMBER.pack, (self.sender, *gone)))


#: Plain references: while a ``WeakSet`` is looked through, another thread may not add to it.
_senders: set[weakref.ref[SentBlocks]] = set()


def _revoke_all_stale() -> bool:
    senders = [find() for find in list(_senders)]
    looks = [each.revoke_stale() for each in senders if each is not None]
    return any(looks)


maintenance.after_period(_revoke_all_stale)  # whoever sends sees to others' messages, too, which takes locks of theirs


class _ControlMessage:
    """A message of the protocol's own. It has no descriptors, and nobody counts it."""

    fds: Final[list[int]] = []
    only_blocks = False

    def on_send(self) -> None: ...

    def on_send_failed(self) -> None: ...


class _Revocation(_ControlMessage):
    """Takes promises back. Which, is chosen when it is sent, and stays so if the socket has no room."""

    kind = FORGET

    def __init__(self, blocks: SentBlocks) -> None:
        self._blocks = blocks

    @functools.cached_property
    def data(self) -> bytes:
        return self._blocks.take_revoked()


class SenderLeft(_ControlMessage):
    """Says, in the place of a sender that is gone, that nothing is to be kept for it any more."""

    kind = LEFT

    def __init__(self, sender: int) -> None:
        self.data = _NUMBER.pack(sender)
