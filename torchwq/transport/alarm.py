"""A flag that a thread can sleep on together with sockets: set until it is cleared.

An alarm is level-triggered: several threads may wait on one queue, and a state such as "closed" must wake each of them.
So waiters never clear it; only the owner of the state does, when the state no longer holds. It is set while there is
any reason for it.

Source: eventfd(2); pipe(2) where the system has none.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import Final

from . import descriptors
from .fork import closed_in_child

#: More bytes than are ever in an alarm's pipe.
_PIPE_CAPACITY: Final = 4096


class Alarm:
    """An event with a descriptor: readable while it is set. Safe to use from several threads."""

    def __init__(self) -> None:
        # Reentrant: a finalizer that runs in the middle of ``set`` may call it, too.
        self._lock = threading.RLock()
        self._reasons: set[str] = set()
        self._is_signalled = False
        fd = descriptors.eventfd()
        self._read_fd, self._write_fd = descriptors.pipe() if fd is None else (fd, fd)
        self._closing = descriptors.close_with(self, *{self._read_fd, self._write_fd})
        closed_in_child(self)

    def set(self, reason: str = "state") -> None:
        with self._lock:
            if self._closing.alive and reason not in self._reasons:
                self._reasons.add(reason)
                self._update()

    def clear(self, reason: str = "state") -> None:
        with self._lock:
            if self._closing.alive and reason in self._reasons:
                self._reasons.discard(reason)
                self._update()

    def _update(self) -> None:
        """Make the descriptor readable or not, whatever a signal handler sets or clears in the middle of this."""
        while True:
            is_set = bool(self._reasons)
            if is_set and not self._is_signalled:
                os.write(self._write_fd, (1).to_bytes(8, "little"))
            elif not is_set:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._read_fd, _PIPE_CAPACITY)
            self._is_signalled = is_set
            if is_set == bool(self._reasons):
                return

    def is_set(self) -> bool:
        return bool(self._reasons)

    def fileno(self) -> int:
        return self._read_fd if self._closing.alive else -1

    def close(self) -> None:
        with self._lock:
            self._closing()

    def abandon(self) -> None:
        self._closing()
