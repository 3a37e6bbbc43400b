"""The handles that one process has on a thing, and the handles that are on their way to threads of this process.

A thread that waits asks here whether another handle of its process could still end the wait. Handles on their way to
other processes are counted in the table of peers.
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
        #: How many handles are on their way to threads of this process.
        self.pending = 0
        self.ever_pending = False

    def add(self, handle: H) -> None:
        with self._lock:
            self._handles.add(handle)

    def discard(self, handle: H) -> None:
        with self._lock:
            self._handles.discard(handle)

    def all(self) -> list[H]:
        """The handles that are in use."""
        with self._lock:
            return list(self._handles)

    def count_pending(self, number: int) -> None:
        """``number`` more handles are pending; if it is negative, so many have arrived or were dropped."""
        with self._lock:
            self.ever_pending = self.ever_pending or number > 0
            self.pending += number

    def any_other_than(self, handles: Container[H]) -> bool:
        """Whether there is a pending handle, or one that is not in ``handles``."""
        return self.pending > 0 or any(each not in handles for each in self.all())
