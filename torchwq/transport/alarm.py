"""A flag that a thread can sleep on together with sockets: set until cleared, whoever looks.

Level-triggered on purpose. Several threads may wait on one queue, and a state such as "closed" must wake each of
them; so waiters never reset the flag, only the owner of the state does, when the state no longer holds. There may be
several reasons to be set: it is set while there is any.
"""

from __future__ import annotations

import os
import threading

from . import descriptors
from .process import closed_in_child


class Alarm:
    """An event with a descriptor: readable while it is set. Safe to use from several threads."""

    def __init__(self) -> None:
        # Reentrant: a finalizer that runs in the middle of ``set`` may set it, too.
        self._lock = threading.RLock()
        self._reasons: set[str] = set()
        fd = descriptors.eventfd()
        self._read_fd, self._write_fd = descriptors.pipe() if fd is None else (fd, fd)
        self._closing = descriptors.close_with(self, *{self._read_fd, self._write_fd})
        closed_in_child(self)

    def set(self, reason: str = "state") -> None:
        with self._lock:
            if not self._closing.alive:
                return
            if self._reasons:
                self._reasons.add(reason)
            else:
                self._reasons.add(reason)
                os.write(self._write_fd, (1).to_bytes(8, "little"))

    def clear(self, reason: str = "state") -> None:
        with self._lock:
            if self._closing.alive and reason in self._reasons:
                self._reasons.discard(reason)
                if not self._reasons:
                    os.read(self._read_fd, 8)

    def is_set(self) -> bool:
        return bool(self._reasons)

    def fileno(self) -> int:
        return self._read_fd if self._closing.alive else -1

    def close(self) -> None:
        with self._lock:
            self._closing()

    def abandon(self) -> None:
        self._closing()
