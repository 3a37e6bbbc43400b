"""Reads small items by ``recv``, as long as no item of the channel has brought descriptors.

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
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pickle import loads
from typing import Any, Final

from ..memory import membarrier
from ..transport.endpoint import ReceiveBare
from ..transport.seqpacket import MAX_MESSAGE
from ..transport.sockets import NO_WAIT
from .state import ChannelState
from .table import ANNOUNCED, ATTEMPTS, DESCRIPTORS, FAILED_ATTEMPTS, SAFE, SLOW_PATH, TAKEN, ChannelTable

_OPEN: Final = ChannelState.OPEN

#: How long, in seconds, a writer waits for readers. An attempt takes microseconds; but its process may be stopped.
_ATTEMPTS_TIMEOUT: Final = 5.0
_POLL_INTERVAL: Final = 0.0005

Read = Callable[[], "tuple[ChannelState, Any] | None"]


class FastReceiver:
    """Safe to use from several threads.

    Args:
        table: the channel's.
        receive: see ``Endpoint.receive_bare``; None if the channel's socket has none.
        read_any: reads any item, in any state of the channel.
    """

    def __init__(self, table: ChannelTable, receive: ReceiveBare | None, read_any: Read) -> None:
        self._table = table
        self._words = table.words
        self._receive = receive
        self._read_any = read_any
        self._is_active = receive is not None
        self._has_left = False
        #: Whether a reader may still lose descriptors, as far as this process knows.
        self._can_lose = receive is not None

    def stop(self) -> None:
        """Read by ``read_any`` from now on."""
        self._is_active = False

    def leave(self) -> None:
        """The channel's descriptors are about to be closed."""
        self._is_active = False
        self._has_left = True

    def try_read(self) -> tuple[ChannelState, Any] | None:
        """See ``ChannelBackend.try_read``. Most items are small pickles, and most of a reader's time is spent here."""
        if not self._is_active:
            return self._read_any()
        table = self._table
        table.count_attempt()
        if self._words[SLOW_PATH]:
            table.count_failed_attempt()
            self._is_active = False
            return self._read_any()
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
            return self._read_any()
        table.count_taken()
        return _OPEN, loads(data)

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
