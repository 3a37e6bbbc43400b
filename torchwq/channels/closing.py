"""Closing a channel: when is its socket shut down?

Note [Closing a channel].

Closing is shutdown(2) of the socket, which all processes share: every reader gets what is left and then the end, every
writer an error, every sleeper wakes. What was written before the closing is still read, and nothing is written after
it. So the socket is shut down, under the table's lock, when CLOSED is set, no living process has a BACKLOG, and no
backlog message is under way.

* A writer sets its BACKLOG and then looks at CLOSED; who closes sets CLOSED and then looks at each BACKLOG; with a
  fence in between. So one of them sees the other (Dekker's algorithm).
* A backlog message counts in BACKLOG_MESSAGES from before it leaves until its items are a backlog again, or have left.
  If its receiver is killed with it, nobody counts it back: it is believed lost if for ``_LOST_TIMEOUT`` the socket
  stays empty and nobody takes anything.
* The process that has closed the channel may be dead. So whoever waits calls ``finish`` now and then.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Final

from ..transport.endpoint import Endpoint
from .table import BACKLOG_MESSAGES, CLOSED, CLOSED_BY_FAILURE, SLOW_PATH, TAKEN, ChannelTable

_LOST_TIMEOUT: Final = 2.0


class Closing:
    """``close`` and ``finish`` are called with the table's lock held, and not after this process has left.

    Args:
        incoming, outgoing: the ends of the socket where items come from, and go to.
    """

    def __init__(self, table: ChannelTable, incoming: Endpoint, outgoing: Endpoint) -> None:
        self._table = table
        self._words = table.words
        self._incoming, self._outgoing = incoming, outgoing
        self._fence = threading.RLock()
        #: Backlog messages under way and items taken, as they were last seen, and since when they have not changed.
        self._last_seen = 0, 0
        self._unchanged_since = 0.0

    @property
    def is_closed(self) -> bool:
        return bool(self._words[CLOSED])

    @property
    def was_failed(self) -> bool:
        """Whether one that had failed has closed the channel."""
        return bool(self._words[CLOSED_BY_FAILURE])

    def close(self, failed: bool) -> None:
        self._words[CLOSED_BY_FAILURE] = int(failed)
        self._words[CLOSED] = self._words[SLOW_PATH] = 1

    def finish(self) -> None:
        """Shut the socket down if the channel is closed and nothing is to be written any more."""
        if not self.is_closed:
            return
        if self._table.any_backlog():
            self._last_seen = 0, 0
        elif not self._awaits_backlog_message():
            with contextlib.suppress(OSError):
                self._outgoing.stop_sending()

    def _awaits_backlog_message(self) -> bool:
        """Whether one is under way, and not lost with its receiver."""
        if not self._words[BACKLOG_MESSAGES]:
            return False
        seen = int(self._words[BACKLOG_MESSAGES]), self._table.sum(TAKEN)
        if seen != self._last_seen or self._incoming.is_readable():
            self._last_seen, self._unchanged_since = seen, time.monotonic()
        elif time.monotonic() - self._unchanged_since > _LOST_TIMEOUT:
            self._words[BACKLOG_MESSAGES] = 0
        return bool(self._words[BACKLOG_MESSAGES])

    def announce_backlog(self, any_: bool, *, is_forwarded: bool) -> bool:
        """Show others that this process has a backlog, or none any more; False if it may not have one.

        Args:
            is_forwarded: whether its items were written before the closing.
        """
        self._table.show_backlog(any_)
        with self._fence:
            pass
        if any_ and self.is_closed and not is_forwarded:
            self._table.show_backlog(False)
            return False
        return True
