"""Sends small items straight into the socket, past an idle outbox.

An item may go past the outbox if nothing waits there: it keeps its place behind everything that was sent before. A full
socket does not make a backlog at once, either: a writer that is faster than its readers is better held up by the kernel
than by a list that grows. So it waits for room, up to ``_ROOM_TIMEOUT``, as long as somebody reads. If nobody reads, it
does not wait: a write must not block for long.

``try_write`` is part of the native part, with a twin in Python.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from pickle import dumps
from typing import TYPE_CHECKING, Any, Final

from .. import _native
from ..marshalling.copies import SCALARS, only_scalars
from ..transport.endpoint import Endpoint
from ..transport.outbox import Outbox
from ..transport.sockets import BROKEN, BUSY, NO_WAIT
from .state import ChannelState
from .table import CLOSED, TAKEN, ChannelTable

_OPEN: Final = ChannelState.OPEN

#: How long, in seconds, a writer waits for room while others read, before its items become a backlog.
_ROOM_TIMEOUT: Final = 0.25

Write = Callable[[Any], "ChannelState | None"]


class PythonSenderFields:
    """See ``FastSender``."""

    outbox: Outbox
    #: Where the outbox sends to.
    endpoint: Endpoint
    open: ChannelState
    #: Writes any object, in any state of the channel; and one that is encoded.
    write_any: Write
    write_encoded: Write
    max_payload: int
    #: Whether items may go past the outbox at all.
    is_active: bool
    #: The words by which the native part counts what has left, and sees whether the channel is closed. Not used by the
    #: twin.
    sent: Callable[[], None]
    closed: Any
    _table: ChannelTable
    _words: memoryview
    #: These refuse as soon as this process leaves.
    _send_bare: Callable[[bytes, int], object]
    _send_with_timeout: Callable[[bytes], bool]

    def try_write(self, obj: Any) -> ChannelState | None:
        """See ``ChannelBackend.try_write``. Most items are small, and most of a writer's time is spent here."""
        cls = type(obj)
        try:
            # As encode does, without calling it.
            plain = self.is_active and (only_scalars(map(type, obj)) if cls is tuple else cls in SCALARS)
        except TypeError:  # the class of some class cannot be hashed
            plain = False
        if plain:
            payload = dumps(obj, 5)
            outbox = self.outbox  # is_idle, without calling it
            idle = not outbox.pending and not outbox.submitted and not outbox.sending_thread
            if idle and len(payload) <= self.max_payload and not self._words[CLOSED]:
                try:
                    self._send_bare(payload, NO_WAIT)
                except OSError as error:
                    # Any other may be a signal handler's, a TimeoutError perhaps, after the item has left.
                    if error.errno not in BUSY and error.errno not in BROKEN and self.endpoint.fileno() >= 0:
                        raise
                else:
                    self._table.count_sent()  # looked up: it is another one after ``set_initial_counts``
                    return self.open
        return self.write_any(obj)


SenderFields = PythonSenderFields
if not TYPE_CHECKING and _native.core is not None:
    SenderFields = _native.core.SenderFields


class FastSender(SenderFields):
    """Safe to use from several threads.

    Args:
        table: the channel's.
        outbox: sends what this object does not.
        outgoing: where both send to.
        write_any: writes any object, in any state of the channel.
        write_encoded: the same with an object that is encoded.
        may_wait: whether ``try_send`` may wait for room: not where its caller holds the table's lock.
    """

    def __init__(
        self,
        table: ChannelTable,
        outbox: Outbox,
        outgoing: Endpoint,
        write_any: Write,
        write_encoded: Write,
        *,
        may_wait: bool,
    ) -> None:
        self._table = table
        self._words = table.words
        self.outbox = outbox
        self.endpoint = outgoing
        self.sent, self.closed, self.open = table.count_sent, table.native_word(CLOSED), _OPEN
        self.max_payload = outgoing.max_payload
        self.write_any, self.write_encoded = write_any, write_encoded
        has_send_bare = outgoing.send_bare is not None
        self.is_active = has_send_bare
        self._send_bare = outgoing.send_bare or _refuse
        self._send_with_timeout = outgoing.send_with_timeout
        #: Whether ``send`` waits for room. Not while there is a backlog.
        self._waits = self._may_wait = has_send_bare and may_wait
        #: How many items had been taken when a writer that waits for room looked last.
        self._last_taken = 0

    def try_send(self, payload: bytes) -> bool:
        """Send one item, waiting for room if somebody makes some; False if the outbox is to send it.

        Raises BrokenPipeError if nobody can receive it.
        """
        if not self._waits or not self.outbox.is_idle:
            return False
        until = time.monotonic() + _ROOM_TIMEOUT
        while not self._send_with_timeout(payload):
            if not self._is_being_read() or time.monotonic() > until:
                return False
        self._table.count_sent()
        return True

    def _is_being_read(self) -> bool:
        """Whether anybody has taken something since this was asked last."""
        before, self._last_taken = self._last_taken, self._table.sum(TAKEN)
        return self._last_taken != before

    def pause(self) -> None:
        """There is a backlog: do not wait for room."""
        self._waits = False

    def resume(self) -> None:
        """There is no backlog any more."""
        self._waits = self._may_wait

    def leave(self) -> None:
        """Send nothing more, also for threads that are in the middle of writing."""
        self.is_active = False
        self._send_bare = self._send_with_timeout = _refuse


def _refuse(*args: Any) -> Any:
    raise BrokenPipeError(errno.EPIPE, "this process is leaving the channel")
