"""A channel between processes: one socket that all write to and all read from, and a table of peers.

Every process that has the channel has both ends of the socket. The kernel keeps the items, hands each to one reader and
wakes one sleeper for it; and when somebody shuts the socket down, everybody, in whatever process, gets what is left and
then the end. So closing needs no messages, and a process that is killed leaves nothing to repair.

What the socket does not take waits in the process that wrote it, its *backlog*. A process that leaves sends its backlog
as one item, a :mod:`backlog message <torchwq.channels.backlog>`, for which room is kept; whoever receives it sends what
is in it on, as its own backlog.

Invariants:

* Items of one writer are read in the order in which they were written: they leave through one outbox; a backlog message
  leaves when everything before it has.
* The socket is shut down, under the table's lock, when ``CLOSED`` is set, no living slot has a ``BACKLOG``, and no
  backlog message is under way; one counts from before it leaves until what was in it is a backlog, or has left. A
  writer sets ``BACKLOG`` and then looks at ``CLOSED``; whoever closes sets ``CLOSED`` and then looks at each
  ``BACKLOG``; with a fence in between. So one of them sees the other, and what was written before the closing, be it
  in a backlog, is still read, and nothing is written after it.
* ``SENT`` and ``TAKEN`` are counted after the fact. A process that is killed in between has sent one that is not
  counted, or taken one that still is. So counts are believed only as long as the socket is not empty.
* As long as no item has brought descriptors, items are received by ``recv``, which would lose them and costs two thirds
  of ``recvmsg``. Whoever does so counts ``ATTEMPTS`` first, then looks at ``SLOW_PATH``, then receives, then counts
  ``TAKEN`` or ``FAILED_ATTEMPTS``. The first who has descriptors to send sets ``DESCRIPTORS`` and ``SLOW_PATH``, passes
  a fence everywhere, and sends when each slot that lives has been seen with nothing tried that was not taken or missed.
  Whoever tries later sees ``SLOW_PATH``. Everybody else who has descriptors does the same, until one has set
  ``DESCRIPTORS`` to ``SAFE``. A try may be left without its end, by an interruption: that costs a wait. An end without
  its try would hide another one, and never comes about.
* Nobody takes a lock to send or receive in the usual case. So the socket is closed only when no handle is left that
  could do so, or the process ends.
* Who holds the table's lock may wait until nobody sends. Who sends takes no lock; ``emptied`` is called when nobody
  does.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pickle import dumps, loads
from typing import Any, Final

from ..marshalling import codec
from ..marshalling.codec import encode
from ..marshalling.copies import SCALARS, only_scalars
from ..marshalling.wire import BacklogMessage
from ..memory import anonymous, membarrier, recycling
from ..peers.table import FIRST_HEADER_WORD, FIRST_SLOT_WORD, PeerTable
from ..transport import cleanup, descriptors, kinds, polling
from ..transport.capabilities import SAME_MACHINE
from ..transport.connection import Connection
from ..transport.descriptors import close_fds
from ..transport.endpoint import Received
from ..transport.fork import closed_in_child, reset_in_child
from ..transport.seqpacket import MAX_MESSAGE
from ..transport.sockets import BROKEN, BUSY, NO_WAIT
from ..transport.waiting import never
from ..workers import shutdown
from . import backlog
from .state import ChannelState

#: Words of the table's head: whether the channel is closed; whether a writer waits for room; backlog messages under
#: way; whether it was closed by one that had failed; whether items bring descriptors; whether any of this has to be
#: looked at when an item is received.
CLOSED, ROOM_WANTED, BACKLOG_MESSAGES, CLOSED_BY_FAILURE, DESCRIPTORS, SLOW_PATH = range(
    FIRST_HEADER_WORD, FIRST_HEADER_WORD + 6
)
#: What ``DESCRIPTORS`` is when nobody can lose them any more.
SAFE: Final = 2
#: Words of a slot: items sent and taken, also by those who had it before; whether a backlog waits; ``SENT`` and
#: ``TAKEN`` when it was claimed; whether all handles wait, and what for; how often it was tried to receive something,
#: and how often there was nothing.
SENT, TAKEN, BACKLOG, SENT_AT_CLAIM, TAKEN_AT_CLAIM, WAITING, ATTEMPTS, FAILED_ATTEMPTS = range(
    FIRST_SLOT_WORD, FIRST_SLOT_WORD + 8
)

#: What may be under way, in bytes: normally, and when a backlog message has to leave.
_BUFFER_SIZE: Final = 160 * 1024
_BACKLOG_BUFFER_SIZE: Final = 1 << 20
_BUFFER_STEP: Final = 4096
#: How long, in seconds, a backlog message may wait for room, and a first descriptor for those who are receiving.
_LAST_TIMEOUT: Final = 5.0
#: How long, in seconds, a writer waits for room while others read, before its items become a backlog.
_ROOM_TIMEOUT: Final = 0.25
_ATTEMPT_POLL_INTERVAL: Final = 0.0005
#: A backlog message that is neither in the socket nor anybody's backlog is believed lost after so many seconds.
_LOST_TIMEOUT: Final = 2.0
#: Whoever waits for room looks at least so often, in seconds.
_POLL_INTERVAL: Final = 0.02

_OPEN: Final = ChannelState.OPEN
_CLOSED: Final = ChannelState.CLOSED

#: Lines that are open, or have a backlog. What exit has to take care of.
open_socket_channels: set[SocketChannel] = set()


@reset_in_child
def _reset() -> None:
    open_socket_channels.clear()


class SocketChannel:
    """One process's part of it. Takes over ``fds``: those of ``handle_descriptors``, or none to make a new one.

    Raises ResourceError if descriptors or memory have run out.
    """

    peer = SAME_MACHINE

    def __init__(self, name: bytes, fds: Sequence[int] = (), capacity: int | None = None) -> None:
        self.name = name
        size = kinds.handover_size()
        self.capacity = capacity
        with contextlib.ExitStack() as opened:  # what is to be closed again if the rest cannot be had
            rest = list(fds[2 * size :])
            opened.callback(close_fds, rest)
            if fds:
                self._in, self._out = kinds.adopt(fds[:size]), kinds.adopt(fds[size : 2 * size])
            else:
                self._in, self._out = kinds.pair()
                self._in.set_buffer_size(_BUFFER_SIZE)
            self._connection = Connection(
                self._out,
                outgoing=self._in,
                on_sent=lambda tag, data: self._count_sent(),
                on_backlog=self._announce_backlog,
                on_emptied=self._emptied,
            )
            opened.callback(self._connection.close)
            fds_of_table, rest[:2] = rest[:2], []
            self.table = PeerTable(fds_of_table, reset_words=(BACKLOG, WAITING))
            opened.callback(self.table.leave)
            room = next(iter(rest), None) if fds else descriptors.eventfd() if capacity else None
            #: Readable when there may be room again.
            self._room = -1 if room is None else room
            opened.pop_all()
        self.max_payload = self._in.max_payload
        self._words = self.table.words
        self._first = first = self.table.slot_offset(self.table.slot)
        self._words[first + SENT_AT_CLAIM] = self._words[first + SENT]
        self._words[first + TAKEN_AT_CLAIM] = self._words[first + TAKEN]
        # One who had the slot before may have left it in the middle of a try.
        self._words[first + FAILED_ATTEMPTS] = max(
            0, int(self._words[first + ATTEMPTS]) - int(self._words[first + TAKEN])
        )
        self._start_counting()
        self._unpacking = threading.RLock()
        self._outbox = self._connection.outbox
        self._fence = threading.RLock()
        self._send_in_time = self._in.send_with_timeout
        self._send_bare = self._in.send_bare
        self._try_receive = self._connection.take
        self._receive_bare = self._out.receive_bare
        if capacity is not None:
            self.try_write = _defer_write  # type: ignore[method-assign]
            self.send = self._send_if_room  # type: ignore[method-assign]
        elif self._send_bare is None:
            self.try_write = self._try_write_any  # type: ignore[method-assign]
        if capacity is not None or self._receive_bare is None:
            self.try_read = self._try_read_any  # type: ignore[method-assign]
        self._can_lose = self._receive_bare is not None
        #: What came in a backlog message and can go nowhere else.
        self._unforwarded: deque[Received] = deque()
        #: Whether a writer that is faster than its readers waits a moment for room, before its items become a backlog.
        self._waits_briefly = self._send_bare is not None
        #: How many items had been taken when a writer that waits for room looked last.
        self._taken_before = 0
        self._at_end = False
        #: How many parts of the channel (``core.Core``) use this; a part that is garbage does until it is given up.
        self._users = 1
        #: Whether what was written before the closing is being passed on.
        self._is_forwarding = False
        #: Backlog messages under way and items taken as they were last seen, while nothing else was, and since when.
        self._backlog_messages_seen = 0, 0
        self._unchanged_since = 0.0
        #: Whether nothing more is to be written here: a backlog is about to leave as the last.
        self._is_leaving = False
        self.left = False
        closed_in_child(self)
        open_socket_channels.add(self)
        if fds:
            self.table.count_handle_received()

    # Writing

    def set_initial_counts(self, sent: int) -> None:
        """So many items have been written and read before. Called before anybody uses it."""
        for word in (SENT, ATTEMPTS, TAKEN):
            self.table.add(word, sent)
        self._start_counting()

    def _start_counting(self) -> None:
        self._count_sent, self._count_taken, self._count_attempt, self._count_failed_attempt = map(
            self.table.counter, (SENT, TAKEN, ATTEMPTS, FAILED_ATTEMPTS)
        )

    def try_write(self, obj: Any) -> ChannelState | None:
        cls = type(obj)
        try:
            # As encode does, without calling it.
            plain = only_scalars(map(type, obj)) if cls is tuple else cls in SCALARS
        except TypeError:  # the class of some class cannot be hashed
            plain = False
        if plain:
            payload = dumps(obj, 5)
            outbox = self._outbox  # is_idle, without calling it
            idle = not outbox.pending and not outbox.submitted and not outbox.sending_thread
            if idle and len(payload) <= self.max_payload and not self._words[CLOSED]:
                try:
                    self._send_bare(payload, NO_WAIT)  # type: ignore[misc]
                except OSError as error:
                    # Any other may be a signal handler's, a TimeoutError perhaps, after the item has left.
                    if error.errno not in BUSY and error.errno not in BROKEN and self._in.fileno() >= 0:
                        raise
                else:
                    self._count_sent()
                    return _OPEN
        return self._try_write_any(obj)

    def _try_write_any(self, obj: Any) -> ChannelState | None:
        try:
            payload = encode(obj, self.max_payload)
        except Exception:
            return None
        return _OPEN if self.send(payload) else self.state()

    def send(self, payload: Any) -> bool:
        if type(payload) is bytes and self._waits_briefly and self._outbox.is_idle:
            if self.is_closed:
                return False
            try:
                until = time.monotonic() + _ROOM_TIMEOUT
                while not self._send_in_time(payload):
                    if not self._is_being_read() or time.monotonic() > until:
                        return self._send_or_keep(payload)
            except BrokenPipeError:
                return False
            self._count_sent()
            return True
        return self._send_or_keep(payload)

    def _is_being_read(self) -> bool:
        """Whether anybody has taken something since this was asked last."""
        before, self._taken_before = self._taken_before, self.table.sum(TAKEN)
        return self._taken_before != before

    def _send_or_keep(self, payload: Any) -> bool:
        """Send it now, or as soon as there is room."""
        if self.is_closed:
            return False
        if type(payload) is not bytes and self._can_lose:
            self._announce_descriptors()
        try:
            self._outbox.send(payload)
        except BrokenPipeError:
            return False
        if len(self._outbox):
            self._waits_briefly = False
        return True

    def _announce_backlog(self, any_: bool) -> bool:
        """Announce a backlog, or that there is none any more. Called by the one that sends."""
        if self.left:
            return False
        self._words[self._first + BACKLOG] = int(any_)
        with self._fence:
            pass
        if any_ and self._words[CLOSED] and not self._is_forwarding:
            self._words[self._first + BACKLOG] = 0
            return False
        return True

    def _send_if_room(self, payload: Any) -> bool:
        assert self.capacity is not None
        while True:
            with self.table.locked():
                if self.left or self._words[CLOSED]:
                    return False
                if self.num_items() < self.capacity:
                    return self._send_or_keep(payload)
                self._words[ROOM_WANTED] = 1
            if polling.readable(_POLL_INTERVAL, *([self._room] if self._room >= 0 else [])):
                with contextlib.suppress(OSError):
                    os.read(self._room, 8)
            if self.on_wait_for_room is not None:
                self.on_wait_for_room()

    #: Called by a writer that waits for room, now and then; may raise.
    on_wait_for_room: Callable[[], None] | None = None

    def _announce_descriptors(self) -> None:
        """See that nobody receives without them. The invariants say how."""
        words, table = self._words, self.table
        if words[DESCRIPTORS] != SAFE:
            with table.locked():
                words[DESCRIPTORS] = max(1, int(words[DESCRIPTORS]))
                words[SLOW_PATH] = 1
                slots = [table.slot, *(slot for slot, lives in table.other_slots() if lives)]
            if words[DESCRIPTORS] != SAFE:
                membarrier.global_barrier()
                self._wait_for_attempts({table.slot_offset(slot): slot for slot in slots})
                words[DESCRIPTORS] = SAFE
        self._can_lose = False

    def _wait_for_attempts(self, slots: dict[int, int]) -> None:
        words = self._words

        def is_receiving(first: int) -> bool:
            ended = words[first + TAKEN] + words[first + FAILED_ATTEMPTS]  # before what was tried: both only grow
            return bool(ended < words[first + ATTEMPTS])

        until = time.monotonic() + _LAST_TIMEOUT  # a try takes microseconds; but its process may have been stopped
        while True:
            slots = {first: slot for first, slot in slots.items() if is_receiving(first) and self.table.is_alive(slot)}
            if not slots or time.monotonic() > until:
                return
            time.sleep(_ATTEMPT_POLL_INTERVAL)

    def _emptied(self) -> None:
        """The backlog has left, or nobody can receive it. Called by the reactor, which must not wait for a lock that
        another process holds."""
        self._waits_briefly = self._send_bare is not None
        if not self.left and (self._words[CLOSED] or not self._users):
            cleanup.call_soon(self._continue_ending)

    def _continue_ending(self) -> None:
        self.finish_closing()
        self._leave_if_unused()

    # Reading

    def can_take(self) -> bool:
        return not self.left and bool(self._unforwarded or self._out.is_readable())

    def try_read(self) -> tuple[ChannelState, Any] | None:
        """The next item, with the channel's state, if there is one.

        This is for what most items are, a small pickle: a reader that has to keep up with several writers does little
        else.
        """
        self._count_attempt()
        if self._words[SLOW_PATH]:  # once and for all
            self._count_failed_attempt()
            self.try_read = self._try_read_any  # type: ignore[method-assign]
            return self._try_read_any()
        try:
            data = self._receive_bare(MAX_MESSAGE, NO_WAIT)  # type: ignore[misc]
        except BlockingIOError:
            self._count_failed_attempt()
            return None
        except BaseException as error:
            self._count_failed_attempt()
            if isinstance(error, OSError) and self.left:
                return None
            raise
        if not data:  # the end
            self._count_failed_attempt()
            return self._try_read_any()
        self._count_taken()
        return _OPEN, loads(data)

    def _try_read_any(self) -> tuple[ChannelState, Any] | None:
        """The same for any item, in any state."""
        received = self.take()
        return None if received is None else (_CLOSED if self.is_closed else _OPEN, codec.decode(*received))

    def take(self) -> Received | None:
        if self._unforwarded:
            try:
                return self._unforwarded.popleft()
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
        if received[1] and BacklogMessage.is_one(received[0]):
            item = self._unpack(received)
            if item is None:
                return self.take()
            received = item
        else:
            self._count_attempt()
            self._count_taken()
        if self._words[ROOM_WANTED]:
            self._signal_room()
        return received

    def _signal_room(self) -> None:
        self._words[ROOM_WANTED] = 0
        with contextlib.suppress(OSError):
            os.write(self._room, (1).to_bytes(8, "little"))

    def outlet(self) -> int:
        """The descriptor that is readable while there are items, or the end."""
        return self._out.fileno()

    def wake_all(self) -> None:
        """End each ``wait`` that has begun: there may be something to look at."""
        self._connection.wake_all()

    def wait(self, deadline: float, stop: Callable[[], object] = never) -> Received | None:
        if self._at_end or self.left:
            return self.take() if self._unforwarded else None
        return self._connection.wait(self.take, deadline, stop)

    # Closing

    def close(self, *, failed: bool = False) -> None:
        with self.table.locked():
            if self.left or self._words[CLOSED]:
                return
            self._words[CLOSED_BY_FAILURE] = int(failed)
            self._words[CLOSED] = self._words[SLOW_PATH] = 1
        self.finish_closing()
        if self.capacity is not None:
            self._signal_room()

    def finish_closing(self) -> None:
        """Shut the socket down if the channel is closed and nothing is to be written any more.

        Whoever waits calls this now and then: the one who has closed may be dead.
        """
        with self.table.locked():
            if self.left or not self._words[CLOSED]:
                return
            if self._has_backlog():
                self._backlog_messages_seen = 0, 0
                return
            if self._has_backlog_message():
                return
            with contextlib.suppress(OSError):
                self._in.stop_sending()

    def _has_backlog_message(self) -> bool:
        """Whether one is under way. If its receiver was killed with it, it is given up after a while."""
        if not self._words[BACKLOG_MESSAGES]:
            return False
        seen = int(self._words[BACKLOG_MESSAGES]), self.table.sum(TAKEN)
        if seen != self._backlog_messages_seen or self._out.is_readable():
            self._backlog_messages_seen, self._unchanged_since = seen, time.monotonic()
        elif time.monotonic() - self._unchanged_since > _LOST_TIMEOUT:
            self._words[BACKLOG_MESSAGES] = 0
        return bool(self._words[BACKLOG_MESSAGES])

    def _has_backlog(self) -> bool:
        return any(
            self._words[self.table.slot_offset(slot) + BACKLOG] and self.table.is_alive(slot)
            for slot in self.table.used_slots()
        )

    @property
    def was_failed(self) -> bool:
        """Whether it was closed by one that had failed."""
        return not self.left and bool(self._words[CLOSED_BY_FAILURE])

    @property
    def is_closed(self) -> bool:
        return self.left or self._is_leaving or bool(self._words[CLOSED])

    def state(self) -> ChannelState:
        if not self.is_closed:
            return ChannelState.OPEN
        return ChannelState.CLOSED if self.num_items() else ChannelState.DRAINED

    def num_items(self) -> int:
        if self.left:
            return 0
        if self._at_end or not (self._out.is_readable() or self._has_backlog()):
            return len(self._unforwarded)
        return max(1, self.table.sum(SENT) + len(self._outbox) - self.table.sum(TAKEN)) + len(self._unforwarded)

    def counts(self) -> tuple[int, int, int]:
        if self.left:
            return self._last_counts
        sent, taken, sent_before, taken_before = (
            int(self._words[self._first + word]) for word in (SENT, TAKEN, SENT_AT_CLAIM, TAKEN_AT_CLAIM)
        )
        return sent - sent_before + len(self._outbox), taken - taken_before, len(self._outbox)

    # Coming and going

    def handle_descriptors(self) -> list[anonymous.Descriptor]:
        """Descriptors from which another process makes its part."""
        fds = [*self._connection.handover(), *self.table.handover()]
        if self._room >= 0:
            fds.append(self._room)
        return anonymous.duplicates(fds, self.table.count_handles_sent)

    def release(self) -> None:
        """One part does not use it any more: leave if it was the last, as soon as there is no backlog."""
        with self.table.locked():
            self._users -= 1
            self._leave_if_unused()

    def _leave_if_unused(self) -> None:
        with self.table.locked():
            if not self._users and not len(self._outbox):
                self.leave(failed=shutdown.failed)

    def retain(self) -> bool:
        """One more part uses it, so that it does not leave; False if it is too late."""
        with self.table.locked():
            self._users += 1
            return not self.left

    def leave(self, *, failed: bool = False, at_exit: bool = False) -> None:
        """Give up this process's part; what it has written is still read. ``failed``: see ``PeerTable.leave``.

        A backlog leaves at once, as a backlog message. ``at_exit``: there are handles that other threads may be using.
        """
        with self.table.locked():
            if self.left:
                return
            # Also for those who are in the middle of writing, and will find no backlog.
            self._is_leaving = True
            self.try_write = self._write_nothing  # type: ignore[method-assign]
            self._send_bare = self._send_in_time = _send_nothing  # type: ignore[assignment]
            if not self._outbox.is_idle:
                self._send_backlog_message()
            self.finish_closing()
            self._last_counts = self.counts()
            self.left = True
            self.try_read = self._try_read_any  # type: ignore[method-assign]
        recycling.expire_in_flight()
        open_socket_channels.discard(self)
        for each in self._unforwarded:
            codec.discard(*each)
        self._connection.close(leave_open=at_exit)
        if not at_exit and self._room >= 0:
            os.close(self._room)
            self._room = -1
        self.table.leave(failed=failed, keep_memory=at_exit)

    def _write_nothing(self, obj: Any) -> ChannelState | None:
        return self.state()

    def _send_backlog_message(self) -> None:
        """Send the backlog as one item; give it up if nobody is there who could read it."""
        sent = False
        self._announce_descriptors()  # takes its time, in which the reactor may send the backlog
        unsent = self._outbox.withdraw()
        if not unsent:  # it has left meanwhile
            self._words[self._first + BACKLOG] = 0
            return
        self._words[BACKLOG_MESSAGES] += 1
        try:
            with backlog.encode(unsent) as (message, fd):
                sent = self._send_at_last(message, fd)
        except OSError:
            pass  # nobody can receive it, or there are no descriptors left to send it with
        if not sent and any(lives for _, lives in self.table.other_slots()):
            print(f"torchwq: {len(unsent)} items of a channel are lost: nobody has made room for them", file=sys.stderr)
        if sent:
            for _ in unsent:
                self._count_sent()
        else:
            self._words[BACKLOG_MESSAGES] -= 1
        self._words[self._first + BACKLOG] = 0

    def _send_at_last(self, message: bytes, fd: int) -> bool:
        """Send one message although there is no room; False if others live and have not made any for a while."""
        # Room is made in small steps: other writers have backlogs, too, and what they wait for is the same room.
        try:
            for room in range(_BUFFER_SIZE, _BACKLOG_BUFFER_SIZE, _BUFFER_STEP):
                self._in.set_buffer_size(room)
                if self._in.try_send(message, [fd]):
                    return True
            until = time.monotonic() + _LAST_TIMEOUT
            while time.monotonic() < until and any(lives for _, lives in self.table.other_slots()):
                polling.writable(_POLL_INTERVAL, self._in.fileno())
                if self._in.try_send(message, [fd]):
                    return True
        finally:
            self._in.set_buffer_size(_BUFFER_SIZE)
        return False

    def _unpack(self, received: Received) -> Received | None:
        """The first item of a backlog message. The others become a backlog of this process; if they cannot, they stay.

        None if there is none in it.
        """
        items = BacklogMessage.decode(*received)
        for _ in items:
            self._count_attempt()
            self._count_taken()
        first = items.popleft() if items else None
        with self._unpacking:
            self._forward(items)
        with self.table.locked():
            self._words[BACKLOG_MESSAGES] = max(0, int(self._words[BACKLOG_MESSAGES]) - 1)
        self.finish_closing()
        return first

    def _forward(self, items: deque[Received]) -> None:
        self._is_forwarding = True
        while items:
            item = backlog.as_payload(items[0])
            try:
                self._outbox.send(item)
            except BrokenPipeError:  # the channel was closed
                if isinstance(item, backlog.ForwardedItem):
                    item.detach()
                break
            items.popleft()
        self._is_forwarding = False
        if items:
            self.try_read = self._try_read_any  # type: ignore[method-assign]
            self._unforwarded += items

    def abandon(self) -> None:
        self.left = True
        if self._room >= 0:
            os.close(self._room)
            self._room = -1


def _send_nothing(*args: Any) -> Any:
    raise BrokenPipeError(errno.EPIPE, "the channel is being left")


def _defer_write(obj: Any) -> None:
    """There may have to be waited."""
