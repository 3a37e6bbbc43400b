"""Counts a handle that is under way within this process, until it is accepted or nobody can accept it any more."""

from __future__ import annotations

import sys
from collections.abc import Callable

from ..transport import cleanup


class Invitation:
    """What a letter encloses for a handle; subclasses make the handle. It may be accepted more than once.

    ``count(1)`` is called when it is made, and ``count(-1)`` once: by ``settle``, or when it is garbage.
    """

    _count: Callable[[int], None] | None = None  # also of one that could not be made

    def __init__(self, count: Callable[[int], None]) -> None:
        self._count = count
        count(1)

    def settle(self) -> None:
        """It was accepted."""
        count, self._count = self._count, None
        if count is not None:
            count(-1)

    def __del__(self) -> None:
        # Garbage is collected at any moment, in any thread, with any lock held.
        count = self._count
        if count is not None and not sys.is_finalizing():
            cleanup.later(lambda: count(-1))
