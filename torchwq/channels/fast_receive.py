"""Reads small items by ``recv``, as long as no item of the channel has brought descriptors.

``try_read`` is part of the native part, which takes descriptors for no more time; this is how its twin reads.

Note [Receiving without descriptors].

``recv`` costs two thirds of ``recvmsg``, but loses the descriptors that an item brings. So nobody may be in it when the
first item with descriptors leaves:

* A reader counts ATTEMPTS, then looks at SLOW_PATH, then receives, then counts TAKEN or FAILED_ATTEMPTS. Once it has
  seen SLOW_PATH, it receives by ``recvmsg`` for good.
* The first writer with descriptors sets DESCRIPTORS to ANNOUNCED and sets SLOW_PATH, passes a memory barrier in all
  processes (membarrier(2), so that readers need none), and sends when it has seen each living slot without an attempt
  under way. Whoever begins an attempt later sees SLOW_PATH.
* That writer may be killed, so every other one with descriptors does the same, until one has set DESCRIPTORS to SAFE.
* An interruption may leave an attempt without its end: that costs the writers a wait. An end without its attempt would
  hide another attempt; it never comes about.
* Closing sets SLOW_PATH, too, so a reader that does not see it need not look at CLOSED.
* The native part loses no descriptors. It counts both ends of an attempt when it has taken an item.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pickle import loads
from typing import TYPE_CHECKING, Any, Final

from .. import _native
from ..memory import membarrier
from ..transport.endpoint import Endpoint, ReceiveBare, Received
from ..transport.seqpacket import MAX_MESSAGE
from ..transport.sockets import NO_WAIT
from .state import ChannelState
from .table import ANNOUNCED, ATTEMPTS, CLOSED, DESCRIPTORS, FAILED_ATTEMPTS, SAFE, SLOW_PATH, TAKEN, ChannelTable

#: How long, in seconds, a writer waits for readers. An attempt takes microseconds; but its process may be stopped.
_ATTEMPTS_TIMEOUT: Final = 5.0
_POLL_INTERVAL: Final = 0.0005

Result = tuple[ChannelState, Any]
Read = Callable[[], "Result | None"]


class PythonReceiverFields:
    """See ``FastReceiver``."""

    #: Reads any item, in any state of the channel.
    read_any: Read
    #: Whether this object reads at all.
    is_active: bool
    open_state: ChannelState
    _table: ChannelTable
    _words: memoryview
    _receive: ReceiveBare | None
    _has_left: bool
    #: What the native part reads and counts by. Not used by the twin.
    endpoint: Endpoint
    attempts: Callable[[], None]
    taken: Callable[[], None]
    closed: Any
    closed_state: ChannelState
    read_received: Callable[[Received], Result | None]

    def try_read(self) -> Result | None:
        """See ``ChannelBackend.try_read``. Most items are small pickles, and most of a reader's time is spent here."""
        if not self.is_active:
            return self.read_any()
        table = self._table
        table.count_attempt()
        if self._words[SLOW_PATH]:
            table.count_failed_attempt()
            self.is_active = False
            return self.read_any()
        try:
            data = self._receive(MAX_MESSAGE, NO_WAIT)  # type: ignore[misc]
        except BlockingIOError:
            table.count_failed_attempt()
            return None
        except BaseException as error:
            table.count_failed_attempt()
            if isinstance(error, OSError) and self._has_left:
                return None
            raise
        if not data:  # the end
            table.count_failed_attempt()
            return self.read_any()
        table.count_taken()
        return self.open_state, loads(data)


ReceiverFields = PythonReceiverFields
if not TYPE_CHECKING and _native.core is not None:
    ReceiverFields = _native.core.ReceiverFields


class FastReceiver(ReceiverFields):
    """Safe to use from several threads.

    Args:
        table: the channel's.
        incoming: where items come from.
        read_any: reads any item, in any state of the channel.
        read_received: the same with what was just received.
        is_bounded: whether the channel has a capacity: each item that is taken makes room, and this object reads none.
    """

    def __init__(
        self,
        table: ChannelTable,
        incoming: Endpoint,
        read_any: Read,
        read_received: Callable[[Received], Result | None],
        *,
        is_bounded: bool,
    ) -> None:
        receive = None if is_bounded else incoming.receive_bare
        self._table = table
        self._words = table.words
        self._receive = receive
        self.endpoint = incoming
        self.attempts, self.taken, self.closed = table.count_attempt, table.count_taken, table.native_word(CLOSED)
        self.open_state, self.closed_state = ChannelState.OPEN, ChannelState.CLOSED
        self.read_any, self.read_received = read_any, read_received
        self.is_active = receive is not None
        self._has_left = False
        #: Whether a reader may still lose descriptors, as far as this process knows.
        self._can_lose = receive is not None

    def stop(self) -> None:
        """Read by ``read_any`` from now on."""
        self.is_active = False

    def leave(self) -> None:
        """The channel's descriptors are about to be closed."""
        self.is_active = False
        self._has_left = True

    def announce_descriptors(self) -> None:
        """Return when nobody can lose the descriptors of an item that is sent from now on."""
        if not self._can_lose:
            return
        words, table = self._words, self._table
        if words[DESCRIPTORS] != SAFE:
            with table.locked():
                words[DESCRIPTORS] = max(ANNOUNCED, int(words[DESCRIPTORS]))
                words[SLOW_PATH] = 1
                slots = [table.slot, *(slot for slot, lives in table.other_slots() if lives)]
            if words[DESCRIPTORS] != SAFE:
                membarrier.global_barrier()
                self._wait_for_attempts(slots)
                words[DESCRIPTORS] = SAFE
        self._can_lose = False

    def _wait_for_attempts(self, slots: list[int]) -> None:
        """Return when each slot was seen without an attempt under way, or its process is dead."""
        table = self._table

        def is_receiving(slot: int) -> bool:
            ended = table.get_word(slot, TAKEN) + table.get_word(slot, FAILED_ATTEMPTS)  # first: both only grow
            return ended < table.get_word(slot, ATTEMPTS)

        until = time.monotonic() + _ATTEMPTS_TIMEOUT
        while True:
            slots = [slot for slot in slots if is_receiving(slot) and table.is_alive(slot)]
            if not slots or time.monotonic() > until:
                return
            time.sleep(_POLL_INTERVAL)
