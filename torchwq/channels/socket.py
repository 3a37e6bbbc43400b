"""A channel between processes: one socket that all write to and all read from, and a table of peers.

Every process that has the channel has both ends of the socket. The kernel keeps the items, hands each to one reader and
wakes one sleeper for it (unix(7), SOCK_SEQPACKET). So a process that is killed leaves nothing to repair.

What the socket does not take waits in the process that wrote it, its *backlog*. A process that leaves hands its backlog
on: see Note [Handing a backlog on]. ``closing`` says when the socket is shut down, ``fast_receive`` when descriptors
may be sent, ``table`` what counts are worth.

Invariants:

* Items of one writer are read in the order in which they were written: they leave through one outbox, or past it while
  it is idle; a backlog message leaves when everything before it has.
* A thread takes no lock to send or receive in the usual case. So the socket is closed only when no handle is left with
  which a thread could do so, or when the process ends.
* A thread that holds the table's lock may wait until no other thread sends. So a sending thread takes no lock, and the
  outbox calls ``_on_emptied`` when no thread sends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

from ..marshalling import codec
from ..marshalling.wire import BacklogMessage
from ..memory import anonymous, recycling
from ..pipe.room import SharedRoom
from ..transport import cleanup, kinds
from ..transport.capabilities import SAME_MACHINE
from ..transport.connection import Connection
from ..transport.descriptors import close_fds
from ..transport.endpoint import Received
from ..transport.fork import closed_in_child, reset_in_child
from ..transport.waiting import never
from ..workers import shutdown
from .backlog import BUFFER_SIZE, BacklogTransfer
from .closing import Closing
from .fast_receive import FastReceiver
from .fast_send import FastSender
from .state import ChannelState
from .table import CLOSED, ROOM_WANTED, ChannelTable

R = TypeVar("R")

_OPEN: Final = ChannelState.OPEN
_CLOSED: Final = ChannelState.CLOSED

#: Those that this process has not left: they are in use, or have a backlog.
open_socket_channels: set[SocketChannel] = set()


@reset_in_child
def _reset() -> None:
    open_socket_channels.clear()


class SocketChannel:
    """One process's part of the socket and the table.

    Args:
        fds: those of ``handle_descriptors`` of another process, which this object takes over; none for a new channel.

    Raises:
        ResourceError: descriptors or memory have run out.
    """

    peer = SAME_MACHINE

    def __init__(self, name: bytes, fds: Sequence[int] = (), capacity: int | None = None) -> None:
        self.name = name
        size = kinds.handover_size()
        with contextlib.ExitStack() as opened:  # to be closed again if the rest fails
            rest = list(fds[2 * size :])
            opened.callback(close_fds, rest)
            if fds:
                outgoing, incoming = kinds.adopt(fds[:size]), kinds.adopt(fds[size : 2 * size])
            else:
                outgoing, incoming = kinds.pair()
                outgoing.set_buffer_size(BUFFER_SIZE)
            self._connection = Connection(
                incoming,
                outgoing=outgoing,
                on_sent=lambda tag, data: self.table.count_sent(),
                on_backlog=self._on_backlog,
                on_emptied=self._on_emptied,
            )
            opened.callback(self._connection.close)
            fds_of_table, rest[:2] = rest[:2], []
            self.table = ChannelTable(fds_of_table)
            opened.callback(self.table.leave)
            #: How writers of all processes wait for room, in a channel with a capacity.
            self.room = None if capacity is None else SharedRoom(self.table.words, ROOM_WANTED, rest if fds else None)
            opened.pop_all()
        self.max_payload = outgoing.max_payload
        self._outgoing, self._incoming = outgoing, incoming
        self._words = self.table.words
        self._outbox = self._connection.outbox
        self._try_receive = self._connection.take
        self._closing = Closing(self.table, incoming, outgoing)
        # With a capacity each item is written under the table's lock, and makes room, so none takes the fast way.
        self._sender = FastSender(
            self.table, self._outbox, outgoing, self._try_write_any, self._write_encoded, may_wait=capacity is None
        )
        self._receiver = FastReceiver(
            self.table, incoming, self._try_read_any, self._read_received, is_bounded=capacity is not None
        )
        # Bound once: most of an item's time is spent there.
        self.try_write, self.try_read = self._sender.try_write, self._receiver.try_read
        self._backlog = BacklogTransfer(self.table, self._outbox, outgoing, self._receiver, self.finish_closing)
        self._at_end = False
        #: How many cores use this; a core that is garbage does until it has called ``release``.
        self._users = 1
        #: Whether this process writes nothing more: its backlog is about to leave as the last.
        self._is_leaving = False
        self.left = False
        closed_in_child(self)
        open_socket_channels.add(self)
        if fds:
            self.table.count_handle_received()

    # Writing. A channel with a capacity has ``Core.send_if_room`` call ``send``.

    def _try_write_any(self, obj: Any) -> ChannelState | None:
        if self._is_leaving:
            return self.state()
        try:
            payload = codec.encode(obj, self.max_payload)
        except Exception:
            return None
        return self._write_encoded(payload)

    def _write_encoded(self, payload: codec.Encoded) -> ChannelState:
        return _OPEN if self.send(payload) else self.state()

    def send(self, payload: codec.Encoded) -> bool:
        if type(payload) is bytes and not self.is_closed:
            try:
                if self._sender.try_send(payload):
                    return True
            except BrokenPipeError:
                return False
        return self._send_or_keep(payload)

    def _send_or_keep(self, payload: codec.Encoded) -> bool:
        """Send one item now, or as soon as there is room."""
        if self.is_closed:
            return False
        if type(payload) is not bytes:
            self._receiver.announce_descriptors()
        try:
            self._outbox.send(payload)
        except BrokenPipeError:
            return False
        if len(self._outbox):
            self._sender.pause()
        return True

    def _on_backlog(self, any_: bool) -> bool:
        """The outbox has a backlog, or none any more; False if it may not have one. Called by the sending thread."""
        return not self.left and self._closing.announce_backlog(any_, is_forwarded=self._backlog.is_forwarding)

    def _on_emptied(self) -> None:
        """The backlog has left, or nobody can receive it.

        Called by the reactor, which must not wait for the table's lock: another process may hold it.
        """
        self._sender.resume()
        if not self.left and (self._words[CLOSED] or not self._users):
            cleanup.call_soon(self._continue_ending)

    def _continue_ending(self) -> None:
        self.finish_closing()
        self._leave_if_unused()

    # Reading

    def can_take(self) -> bool:
        return not self.left and bool(self._backlog.unforwarded or self._incoming.is_readable())

    def _try_read_any(self) -> tuple[ChannelState, Any] | None:
        """Read any item, in any state."""
        received = self.take()
        return None if received is None else self._result_of(received)

    def _result_of(self, received: Received) -> tuple[ChannelState, Any]:
        return _CLOSED if self.is_closed else _OPEN, codec.decode(*received)

    def _read_received(self, received: Received) -> tuple[ChannelState, Any] | None:
        """The same, with a message that was received meanwhile."""
        item = self._item_of(received)
        return self._try_read_any() if item is None else self._result_of(item)

    def take(self) -> Received | None:
        if self._backlog.unforwarded:
            try:
                return self._backlog.unforwarded.popleft()
            except IndexError:  # another thread was faster
                pass
        if self.left:
            return None
        try:
            received = self._try_receive()
        except EOFError:
            self._at_end = True
            self._connection.alarm.set()
            return None
        if received is None:
            return None
        return self._item_of(received) or self.take()

    def _item_of(self, received: Received) -> Received | None:
        """Count the item in a message; None if it has none."""
        if received[1] and BacklogMessage.is_one(received[0]):
            item = self._backlog.receive(received)
            if item is None:
                return None
            received = item
        else:
            self.table.count_attempt()
            self.table.count_taken()
        if self.room is not None:
            self.room.made()
        return received

    def filenos(self) -> Sequence[int]:
        """Readable while there are items, or the end."""
        return (self._incoming.fileno(),)

    def wake_all(self) -> None:
        """End each ``wait`` that has begun."""
        self._connection.wake_all()

    def wait(
        self, attempt: Callable[[], R | None], deadline: float | None, stop: Callable[[], object] = never
    ) -> R | None:
        if self._at_end or self.left:
            return attempt() if self._backlog.unforwarded else None
        return self._connection.wait(attempt, deadline, stop)

    # Closing

    def close(self, *, failed: bool = False) -> None:
        self._outbox.settle()  # what this thread has written before must not come after the closing
        with self.table.locked():
            if self.left or self._closing.is_closed:
                return
            self._closing.close(failed)
        self.finish_closing()
        if self.room is not None:
            self.room.made()

    def finish_closing(self) -> None:
        """See ``Closing.finish``. Whoever waits calls this now and then."""
        with self.table.locked():
            if not self.left:
                self._closing.finish()

    @property
    def was_failed(self) -> bool:
        return not self.left and self._closing.was_failed

    @property
    def is_closed(self) -> bool:
        return self.left or self._is_leaving or bool(self._words[CLOSED])

    # State

    def state(self) -> ChannelState:
        if not self.is_closed:
            return ChannelState.OPEN
        return ChannelState.CLOSED if self.num_items() else ChannelState.DRAINED

    def num_items(self) -> int:
        if self.left:
            return 0
        unforwarded = len(self._backlog.unforwarded)
        while not self._at_end:
            # In this order: what leaves a backlog in between is found in the socket.
            had_backlog = self.table.any_backlog()
            if self._incoming.is_readable() or (had_backlog and self.table.any_backlog()):
                break
            if not had_backlog:
                return unforwarded
        else:
            return unforwarded
        return max(1, self.table.num_in_socket() + len(self._outbox)) + unforwarded

    def counts(self) -> tuple[int, int, int]:
        if self.left:
            return self._last_counts
        table, unsent = self.table, len(self._outbox)
        return table.num_sent(table.slot) + unsent, table.num_taken(table.slot), unsent

    # Joining and leaving

    def begin(self, before: int) -> None:
        """See ``pipe.Carrier``."""
        self.table.set_initial_counts(before)

    def cancel(self) -> None:
        """See ``pipe.Carrier``."""
        self.leave()

    def handle_descriptors(self) -> list[anonymous.Descriptor]:
        """Descriptors for another process. Raises ResourceError."""
        fds = [*self._connection.handover(), *self.table.handover()]
        if self.room is not None:
            fds += self.room.handover()
        return anonymous.duplicates(fds, self.table.count_handles_sent)

    def release(self) -> None:
        """One core less uses this: leave if it was the last, as soon as there is no backlog."""
        with self.table.locked():
            self._users -= 1
            self._leave_if_unused()

    def _leave_if_unused(self) -> None:
        with self.table.locked():
            if not self._users and not len(self._outbox):
                self.leave(failed=shutdown.failed)

    def retain(self) -> bool:
        """One more core uses this, so that it does not leave; False if it has left."""
        with self.table.locked():
            self._users += 1
            return not self.left

    def leave(self, *, failed: bool = False, at_exit: bool = False) -> None:
        """Give up this process's part. What it has written is still read; a backlog leaves as a backlog message.

        Args:
            failed: see ``PeerTable.leave``.
            at_exit: other threads may be using this.
        """
        with self.table.locked():
            if self.left:
                return
            # A thread may be in the middle of writing, and will find no backlog.
            self._is_leaving = True
            self._sender.leave()
            if not self._outbox.is_idle:
                self._backlog.send()
            self.finish_closing()
            self._last_counts = self.counts()
            self.left = True
            self._receiver.leave()
        recycling.expire_in_flight()
        open_socket_channels.discard(self)
        for each in self._backlog.unforwarded:
            codec.discard(*each)
        self._connection.close(leave_open=at_exit)
        if self.room is not None and not at_exit:
            self.room.close()
        self.table.leave(failed=failed, keep_memory=at_exit)

    def abandon(self) -> None:
        self.left = True
        self._receiver.leave()
