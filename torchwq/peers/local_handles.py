"""The handles that a process has on one thing, and those that are on their way to its threads.

Who waits at a thing asks here whether another handle of this process could still do what it waits for. Handles on their
way to other processes are counted in the table of peers.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Container
from typing import Generic, TypeVar

H = TypeVar("H")


class LocalHandles(Generic[H]):
    """Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._handles: weakref.WeakSet[H] = weakref.WeakSet()
        #: How many are on their way to threads of this process.
        self.pending = 0
        #: Whether any ever was.
        self.ever_pending = False

    def add(self, handle: H) -> None:
        with self._lock:
            self._handles.add(handle)

    def discard(self, handle: H) -> None:
        with self._lock:
            self._handles.discard(handle)

    def all(self) -> list[H]:
        """Those that somebody has."""
        with self._lock:
            return list(self._handles)

    def count_pending(self, number: int) -> None:
        """So many more are pending; they have come, or were dropped, if negative."""
        with self._lock:
            self.ever_pending = self.ever_pending or number > 0
            self.pending += number

    def any_other_than(self, handles: Container[H]) -> bool:
        """Whether there is another one than these, or a pending one."""
        return self.pending > 0 or any(each not in handles for each in self.all())
