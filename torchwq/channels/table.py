"""A channel's table of peers: its words, and the counts of this process.

Note [Counts of a channel].

* SENT and TAKEN are counted after the fact. A process that is killed in between has sent an item that is not counted,
  or has taken one that still is. So the counts are believed only while the socket is not empty.
* The counts of a slot go on under its next holder (see ``peers.table``). What a holder has done itself is the
  difference to the counts at its claim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from ..peers.table import FIRST_HEADER_WORD, FIRST_SLOT_WORD, PeerTable

#: Words of the table's head: whether the channel is closed; whether a writer waits for room; how many backlog messages
#: are under way; whether one that had failed has closed it; whether items bring descriptors; whether a reader has to
#: look at any of this.
CLOSED, ROOM_WANTED, BACKLOG_MESSAGES, CLOSED_BY_FAILURE, DESCRIPTORS, SLOW_PATH = range(
    FIRST_HEADER_WORD, FIRST_HEADER_WORD + 6
)
#: What DESCRIPTORS is when somebody is about to send some, and when nobody can lose them any more.
ANNOUNCED, SAFE = 1, 2
#: Words of a slot: items sent and taken; whether a backlog waits; SENT and TAKEN at the claim; what all handles of the
#: process wait for (see ``failure_detector``); attempts to receive without descriptors, and those that took nothing.
SENT, TAKEN, BACKLOG, SENT_AT_CLAIM, TAKEN_AT_CLAIM, WAITING, ATTEMPTS, FAILED_ATTEMPTS = range(
    FIRST_SLOT_WORD, FIRST_SLOT_WORD + 8
)
_COUNTED: Final = (SENT, TAKEN, ATTEMPTS, FAILED_ATTEMPTS)


class ChannelTable(PeerTable):
    """One process's mapping of a channel's table. See :class:`~torchwq.peers.table.PeerTable`."""

    #: Each adds one to a word of this process, in any thread: see ``PeerTable.counter``.
    count_sent: Callable[[], None]
    count_taken: Callable[[], None]
    count_attempt: Callable[[], None]
    count_failed_attempt: Callable[[], None]

    def __init__(self, fds: Sequence[int] = ()) -> None:
        super().__init__(fds, reset_words=(BACKLOG, WAITING))
        #: Where the words of this process begin.
        self.offset = self.slot_offset(self.slot)
        self._set_own(SENT_AT_CLAIM, self.own(SENT))
        self._set_own(TAKEN_AT_CLAIM, self.own(TAKEN))
        # The slot's last holder may have left it in the middle of an attempt.
        self._set_own(FAILED_ATTEMPTS, max(0, self.own(ATTEMPTS) - self.own(TAKEN)))
        self._start_counting()

    def _start_counting(self) -> None:
        self.count_sent, self.count_taken, self.count_attempt, self.count_failed_attempt = map(self.counter, _COUNTED)

    def set_initial_counts(self, count: int) -> None:
        """So many items were written and read before. Called before anybody counts."""
        for word in (SENT, ATTEMPTS, TAKEN):
            self.add(word, count)
        self._start_counting()

    def own(self, word: int) -> int:
        """A word of this process."""
        return int(self.words[self.offset + word])

    def _set_own(self, word: int, value: int) -> None:
        self.words[self.offset + word] = value

    def show_backlog(self, any_: bool) -> None:
        """Let others see whether this process has a backlog. Takes no lock, as who sends must not."""
        self._set_own(BACKLOG, int(any_))

    def any_backlog(self) -> bool:
        """Whether any living process has a backlog."""
        return any(self.get_word(slot, BACKLOG) and self.is_alive(slot) for slot in self.used_slots())

    def any_other_lives(self) -> bool:
        return any(lives for _, lives in self.other_slots())

    def num_sent(self, slot: int) -> int:
        """How many items the holder of a slot has sent."""
        return self.get_word(slot, SENT) - self.get_word(slot, SENT_AT_CLAIM)

    def num_taken(self, slot: int) -> int:
        """How many items the holder of a slot has taken."""
        return self.get_word(slot, TAKEN) - self.get_word(slot, TAKEN_AT_CLAIM)

    def num_in_socket(self) -> int:
        """How many items are sent and not taken, as far as they are counted."""
        return self.sum(SENT) - self.sum(TAKEN)
