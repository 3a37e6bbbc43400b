"""Remembers the questions that workers may have in hand, to say what a dead one had.

A worker has in hand either one of the questions that were sent last, or an old one that it has been at for long. So
the last ones are kept in order, and now and then the old ones that are in hand are set aside before they drop out.

``note_sent`` is part of the native part, with a twin in Python.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

from .. import _native
from ..marshalling.wire import describe

#: How many questions are remembered: more than fit into a socket. Larger ones than so many bytes are not.
_RECENT: Final = 4096
_LARGEST: Final = 1024
_KEEP_EVERY: Final = _RECENT // 4


class PythonHistoryFields:
    """See ``History``."""

    #: Number of the question that was sent last.
    last: int
    largest: int
    keep_every: int
    #: Remembers a question's bytes.
    append: Callable[[bytes], None]
    #: Sets aside the questions that are in hand.
    keep: Callable[[], None]
    #: Counts a question, where others can see how many there were.
    count: Callable[[], None] | None

    def note_sent(self, number: int, data: bytes) -> None:
        """Remember a question that was just sent. Called by who has claimed the outbox."""
        self.last = number
        count = self.count
        if count is not None:
            count()
        self.append(data if len(data) <= self.largest else b"")
        if not number % self.keep_every:
            self.keep()


HistoryFields = PythonHistoryFields
if not TYPE_CHECKING and _native.core is not None:
    HistoryFields = _native.core.HistoryFields


class History(HistoryFields):
    """The last questions of one queue.

    Args:
        in_hand: gives the numbers of those that workers have in hand.
        count: called for each question that is sent, until ``clear``.
    """

    def __init__(self, in_hand: Callable[[], Iterable[int]], count: Callable[[], None] | None = None) -> None:
        self._in_hand = in_hand
        self._recent: deque[bytes] = deque(maxlen=_RECENT)
        self._kept: dict[int, bytes] = {}
        self.last, self.largest, self.keep_every = 0, _LARGEST, _KEEP_EVERY
        self.append, self.keep, self.count = self._recent.append, self._keep, count

    def _keep(self) -> None:
        """Set the questions in hand aside; drop those set aside before that are not among them."""
        self._kept = {number: self._find(number) for number in self._in_hand()}

    def _find(self, number: int) -> bytes:
        if number in self._kept:
            return self._kept[number]
        age = self.last - number
        return self._recent[-1 - age] if 0 <= age < len(self._recent) else b""

    def describe(self, number: int) -> str:
        """The question in a few words."""
        data = self._find(number)
        return f"question {number}" + (f" ({describe(data)})" if data else "")

    def clear(self) -> None:
        self.count = None
        self._recent.clear()
        self._kept.clear()
