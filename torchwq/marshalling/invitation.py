"""Counts a handle that is under way within this process, until it is accepted or nobody can accept it any more."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable

from ..transport import cleanup


class Invitation:
    """What a letter encloses for a handle; subclasses make the handle. It may be accepted more than once.

    ``count(1)`` is called when it is made, and ``count(-1)`` once: by ``settle``, or when it is garbage.
    """

    def __init__(self, count: Callable[[int], None]) -> None:
        count(1)
        self._uncounted = weakref.finalize(self, _uncount_later, count)
        self._uncounted.atexit = False
        self._count = count

    def settle(self) -> None:
        """It was accepted."""
        if self._uncounted.detach() is not None:
            self._count(-1)


def _uncount_later(count: Callable[[int], None]) -> None:
    """It is garbage, which is collected at any moment, in any thread, with any lock held."""
    cleanup.later(functools.partial(count, -1))
