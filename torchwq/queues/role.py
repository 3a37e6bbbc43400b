"""What all sides of a queue share: what a read is told, what a fork does, what the end of a thread does."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, Final

from ..errors import QueueClosed
from ..handles.readable import MessageSource
from ..memory.anonymous import Descriptor
from ..transport.capabilities import SAME_MACHINE, Capabilities
from ..transport.connection import Connection
from ..transport.endpoint import Endpoint, Received
from ..transport.fork import closed_in_child, reset_in_child
from ..transport.outbox import Sent
from ..transport.readiness import Readiness
from ..workers import threads

ENDED: Final = "the queue is closed: its owner has closed it, or has ended"
CLOSED_HERE: Final = "this handle is closed"
WAS_FORKED: Final = (
    "this handle was made before a fork and belongs to the parent process: "
    "open the queue by its name here, or pass it to workers started by torchwq"
)

#: Every role that is not closed yet, or has something left to send. What exit has to take care of.
open_roles: set[Role] = set()


@reset_in_child
def _forget() -> None:
    open_roles.clear()


class Role(MessageSource):
    """One handle's side of a queue. Safe to use from several threads.

    ``closed`` says why the handle cannot be used any more; empty as long as it can.
    """

    #: Who may read what is written, and how large a message may be.
    peer: Capabilities
    max_payload: int
    capacity: int | None
    #: Send one payload, now or as soon as there is room. Raises QueueClosed. Whoever encodes looks it up before
    #: ``peer``: it takes what was encoded for the one or the other.
    send: Callable[[Any], object]

    def __init__(self) -> None:
        self.closed = ""
        self._readiness = Readiness()

    def _opened(self) -> None:
        """It is complete: from now on it is closed at exit, in the child of a fork, and when its worker ends."""
        closed_in_child(self)
        threads.owned_by_this_worker(self)
        open_roles.add(self)

    @abc.abstractmethod
    def handle_descriptors(self) -> list[Descriptor]:
        """Descriptors of its own from which another process makes a worker's handle."""

    @abc.abstractmethod
    def close(self) -> None: ...

    @abc.abstractmethod
    def has_message(self) -> bool:
        """Whether there is something to take."""

    @abc.abstractmethod
    def watch(self) -> None:
        """Let the readiness stand for messages and trouble."""

    @property
    @abc.abstractmethod
    def unsent(self) -> int:
        """How many messages wait in this process."""

    def on_empty(self) -> None:
        if self.closed:
            raise QueueClosed(self.closed)
        self.settle()

    def awaited(self) -> str:
        return "no question"

    def settle(self) -> None:
        """Let the readiness show what there is, after somebody was told that there is something, and has looked."""

    def fileno(self) -> int:
        if self.closed:
            raise QueueClosed(self.closed)
        if not self._readiness.is_watched:
            self.watch()
        return self._readiness.fileno()

    def is_ready(self) -> bool:
        if self.closed or self.has_message():
            return True
        self.settle()
        return self.may_raise()

    def close_for_worker(self, worker: threads.ThreadWorker, failed: bool) -> None:
        """See ``threads.OwnedResource``."""
        self.close()

    def closed_error(self) -> QueueClosed:
        return QueueClosed(self.closed or ENDED)

    def abandon(self) -> None:
        self.closed = WAS_FORKED

    def _retire(self) -> None:
        """It is closed, and has nothing left to do."""
        open_roles.discard(self)
        self._readiness.close()


class SocketRole(Role):
    """A side that holds an end of the queue's connection."""

    def __init__(self, end: Endpoint, numbered: bool, sent: Sent, emptied: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.connection = Connection(
            end, numbered=numbered, on_sent=sent, closed_error=self.closed_error, on_emptied=emptied
        )
        self.end, self.alarm, self.outbox = end, self.connection.alarm, self.connection.outbox
        self.peer = SAME_MACHINE
        self.max_payload = end.max_payload
        self.send = self.connection.send

    def sleep(self, deadline: float | None) -> Received | None:
        return self.connection.wait(self.take, deadline)

    def may_raise(self) -> bool:
        return bool(self.closed) or self.alarm.is_set()

    def has_message(self) -> bool:
        return self.connection.is_readable()

    def watch(self) -> None:
        self._readiness.set(*self.connection.filenos())

    @property
    def unsent(self) -> int:
        return len(self.outbox)
