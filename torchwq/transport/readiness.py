"""One descriptor that is readable when any of several is: the ``fileno()`` of a queue or channel.

The sources of messages may change while a user watches the descriptor, for example when a process first opens a queue
that only threads have used. So it is a descriptor of its own, and only the set behind it changes.
"""

from __future__ import annotations

import contextlib
import errno
import select
import selectors
import threading
from typing import Any, Final

from ..errors import ResourceError
from . import descriptors
from .fork import closed_in_child

_EPOLL: Final = hasattr(select, "epoll")
_IN: Final = select.EPOLLIN if _EPOLL else selectors.EVENT_READ


def _epoll() -> select.epoll:
    poll = descriptors.epoll()
    if poll is None:
        raise ResourceError(
            errno.ENOSYS,
            "this system does not let the process call epoll_create1, without which there is no fileno(): allow that "
            "call in the seccomp filter of the sandbox or container, or use torchwq.select",
        )
    return poll


class Readiness:
    """A set of descriptors, and one that stands for all of them, opened at the first ``fileno()``."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._fds: set[int] = set()
        self._poll: Any = None
        closed_in_child(self)

    @property
    def is_watched(self) -> bool:
        return self._poll is not None

    def set(self, *fds: int) -> None:
        """Stand for these descriptors from now on."""
        with self._lock:
            for fd in self._fds.difference(fds):
                self._remove(fd)
            for fd in set(fds) - self._fds:
                self._add(fd)
            self._fds = set(fds)

    def fileno(self) -> int:
        with self._lock:
            if self._poll is None:
                # On the BSDs and macOS: a kqueue can itself be watched.
                self._poll = _epoll() if _EPOLL else selectors.KqueueSelector()  # type: ignore[attr-defined,unused-ignore]
                for fd in self._fds:
                    self._add(fd)
            fd = int(self._poll.fileno())
            return fd

    def _add(self, fd: int) -> None:
        if self._poll is not None:
            self._poll.register(fd, _IN)

    def _remove(self, fd: int) -> None:
        if self._poll is not None:
            with contextlib.suppress(OSError):  # closed already
                self._poll.unregister(fd)

    def close(self) -> None:
        with self._lock:
            self.abandon()

    def abandon(self) -> None:
        poll, self._poll = self._poll, None
        if poll is not None:
            poll.close()
