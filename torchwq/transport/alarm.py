"""A flag that a thread can sleep on together with sockets: set until cleared, whoever looks.

Level-triggered on purpose. Several threads may wait on one queue, and a state such as "closed" must wake each of
them; so waiters never reset the flag, only the owner of the state does, when the state no longer holds.
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
        self._set = False
        fd = descriptors.eventfd()
        self._read_fd, self._write_fd = descriptors.pipe() if fd is None else (fd, fd)
        self._closing = descriptors.close_with(self, *{self._read_fd, self._write_fd})
        closed_in_child(self)

    def set(self) -> None:
        with self._lock:
            if not self._set and self._closing.alive:
                self._set = True
                os.write(self._write_fd, (1).to_bytes(8, "little"))

    def clear(self) -> None:
        with self._lock:
            if self._set and self._closing.alive:
                self._set = False
                os.read(self._read_fd, 8)

    def is_set(self) -> bool:
        return self._set

    def fileno(self) -> int:
        return self._read_fd if self._closing.alive else -1

    def close(self) -> None:
        with self._lock:
            self._closing()

    def abandon(self) -> None:
        self._closing()
