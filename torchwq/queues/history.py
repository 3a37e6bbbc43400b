"""Remembers the questions that workers may have in hand, to say what a dead one had.

A worker has in hand either one of the questions that were sent last, or an old one that it has been at for long. So
the last ones are kept in order, and now and then the old ones that are in hand are set aside before they drop out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Final

from ..marshalling.wire import describe

#: How many questions are remembered: more than fit into a socket. Larger ones than so many bytes are not.
_RECENT: Final = 4096
_LARGEST: Final = 1024
_KEEP_EVERY: Final = _RECENT // 4


class History:
    """The last questions of one queue. ``add`` and ``keep`` are called under the outbox's lock."""

    def __init__(self) -> None:
        self._recent: deque[bytes] = deque(maxlen=_RECENT)
        self._kept: dict[int, bytes] = {}
        self._last = 0

    def add(self, number: int, data: bytes) -> bool:
        """Remember a question that was just sent; True if it is time to ``keep`` those in hand."""
        self._last = number
        self._recent.append(data if len(data) <= _LARGEST else b"")
        return not number % _KEEP_EVERY

    def keep(self, in_hand: Iterable[int]) -> None:
        """Set these questions aside; drop those set aside before that are not among them."""
        self._kept = {number: self._find(number) for number in in_hand}

    def _find(self, number: int) -> bytes:
        if number in self._kept:
            return self._kept[number]
        age = self._last - number
        return self._recent[-1 - age] if 0 <= age < len(self._recent) else b""

    def describe(self, number: int) -> str:
        """The question in a few words."""
        data = self._find(number)
        return f"question {number}" + (f" ({describe(data)})" if data else "")

    def clear(self) -> None:
        self._recent.clear()
        self._kept.clear()
