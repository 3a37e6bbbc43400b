"""A connection between two threads: a pair of mailboxes instead of a socket.

A message is the object that was sent, not a copy. The methods are those of
:class:`~torchwq.transport.connection.Connection` that two threads need. Threads share an interpreter, so a thread that
waits for another does not spin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

from .mailbox import Mailbox

T = TypeVar("T")

#: Stands in the place of the descriptors of a message between processes.
_NO_FDS: Final[list[int]] = [-1]


class LocalEndpoint:
    """One end. Safe to use from several threads."""

    max_payload: Final = 1 << 62

    def __init__(self, inbox: Mailbox[Any]) -> None:
        self._inbox = inbox
        self._peer: LocalEndpoint
        self._closed = False

    @property
    def peer(self) -> LocalEndpoint:
        """The other end."""
        return self._peer

    @property
    def closed(self) -> bool:
        return self._closed

    def send(self, message: Any) -> None:
        """Send a message. Raises BrokenPipeError if nobody can receive it."""
        if self._closed or self._peer._closed:
            raise BrokenPipeError("the other side is closed")
        self._peer._inbox.put(message)

    def take(self) -> tuple[Any, list[int]] | None:
        """Take one message; None if there is none now. Raises EOFError if none will come."""
        message = self._inbox.take()
        if message is not None:
            return message, _NO_FDS
        if self._closed or (self._peer._closed and not len(self._inbox)):
            raise EOFError
        return None

    def wait(self, attempt: Callable[[], T | None], deadline: float | None) -> T | None:
        """See ``Mailbox.wait``."""
        return self._inbox.wait(attempt, deadline)

    def fileno(self) -> int:
        """Readable while there are messages; -1 once it is closed."""
        return -1 if self._closed else self._inbox.not_empty().fileno()

    def stop_waiting(self) -> None:
        """End every wait; what has arrived can still be taken."""
        self.close()

    def close(self) -> None:
        self._closed = True
        self._inbox.wake_all()
        self._peer._inbox.wake_all()
        self._inbox.close()


def connect(ours: LocalEndpoint, theirs: LocalEndpoint) -> None:
    """Connect two new ends."""
    ours._peer, theirs._peer = theirs, ours


def pair() -> tuple[LocalEndpoint, LocalEndpoint]:
    """Two connected ends."""
    ours, theirs = LocalEndpoint(Mailbox()), LocalEndpoint(Mailbox())
    connect(ours, theirs)
    return ours, theirs
