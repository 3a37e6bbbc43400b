"""What all sides of a queue share: the loop of a blocking read, what a fork does, what the end of a thread does."""

from __future__ import annotations

import abc
import queue
import time
from collections.abc import Callable
from typing import Any, Final

from ..errors import QueueClosed, WorkerDied
from ..memory.anonymous import Descriptor
from ..transport.capabilities import SAME_MACHINE, Capabilities
from ..transport.connection import Connection
from ..transport.endpoint import Endpoint, Received
from ..transport.outbox import Sent
from ..transport.process import closed_in_child, reset_in_child
from ..transport.readiness import Readiness
from ..workers import shutdown, threads

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


class Role(abc.ABC):
    """One handle's side of a queue. Safe to use from several threads.

    ``closed`` says why the handle cannot be used any more; empty as long as it can.
    """

    #: Who may read what is written, and how large a message may be.
    peer: Capabilities
    max_payload: int
    capacity: int | None
    #: Send one payload, now or as soon as there is room. Raises QueueClosed. Whoever encodes looks it up before
    #: ``peer``: it takes what was encoded for the one or the other.
    send: Callable[[Any], None]

    def __init__(self) -> None:
        self.closed = ""
        self._readiness = Readiness()

    def _opened(self) -> None:
        """It is complete: from now on it is closed at exit, in the child of a fork, and when its worker ends."""
        closed_in_child(self)
        threads.belongs_here(self)
        open_roles.add(self)

    @abc.abstractmethod
    def take(self) -> Received | None:
        """Take the next message if there is one."""

    @abc.abstractmethod
    def sleep(self, deadline: float | None) -> Received | None:
        """The next message; None after ``deadline`` (time.monotonic), or if there may be trouble."""

    @abc.abstractmethod
    def is_troubled(self) -> bool:
        """Whether there may be a reason to raise instead of waiting."""

    @abc.abstractmethod
    def raise_trouble(self) -> None:
        """Called when there may be trouble and no message is there: raise it, or return to go on."""

    @abc.abstractmethod
    def ticket(self) -> list[Descriptor]:
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

    def wait(self, nonblocking: bool, timeout: float | None) -> Received | None:
        """The next message, after ``take`` has found none; None if ``nonblocking``. Raises queue.Empty."""
        try:
            return self._wait(nonblocking, timeout)
        except (QueueClosed, WorkerDied):
            shutdown.hold_daemon()
            raise

    def _wait(self, nonblocking: bool, timeout: float | None) -> Received | None:
        if self.closed:
            raise QueueClosed(self.closed)
        if nonblocking:
            self.settle()
            return None
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            if self.is_troubled():
                received = self.take()
                if received is not None:
                    return received
                self.raise_trouble()
            received = self.sleep(deadline)
            if received is not None:
                return received
            if self.closed:
                raise QueueClosed(self.closed)
            if deadline is not None and time.monotonic() >= deadline and not self.is_troubled():
                raise queue.Empty(f"{self.awaited()} came within {timeout} s")

    def awaited(self) -> str:
        """What a read waits for, as the subject of a sentence."""
        return "no question"

    def settle(self) -> None:  # noqa: B027 - most have nothing to do
        """Let the readiness show what there is, after somebody was told that there is something, and has looked."""

    def fileno(self) -> int:
        """Readable when ``read`` would not have to wait."""
        if self.closed:
            raise QueueClosed(self.closed)
        if not self._readiness.is_watched:
            self.watch()
        return self._readiness.fileno()

    def is_ready(self) -> bool:
        """Whether ``read`` would not have to wait."""
        if self.closed or self.has_message():
            return True
        self.settle()
        return self.is_troubled()

    def let_go(self, worker: threads.ThreadWorker, failed: bool) -> None:
        """See ``threads.Belonging``."""
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
        self.connection = Connection(end, numbered=numbered, sent=sent, refusal=self.closed_error, emptied=emptied)
        self.end, self.alarm, self.outbox = end, self.connection.alarm, self.connection.outbox
        self.peer = SAME_MACHINE
        self.max_payload = end.max_payload
        self.send = self.connection.send

    def sleep(self, deadline: float | None) -> Received | None:
        return self.connection.wait(self.take, deadline)

    def is_troubled(self) -> bool:
        return self.alarm.is_set()

    def has_message(self) -> bool:
        return self.connection.is_readable()

    def watch(self) -> None:
        self._readiness.set(*self.connection.filenos())

    @property
    def unsent(self) -> int:
        return len(self.outbox)
