"""What the two roles of a queue share: the loop of a blocking read, and what a fork does."""

from __future__ import annotations

import abc
import queue
import threading
import time
from collections.abc import Callable

from ..errors import QueueClosed
from ..memory.anonymous import Descriptor
from ..memory.parcel import TRAILER, Parcel
from ..transport.alarm import Alarm
from ..transport.endpoint import Endpoint, Received
from ..transport.outbox import Outbox, Sent
from ..transport.process import closed_in_child, reset_in_child
from ..transport.waiting import Waiter

ENDED = "the queue is closed: its owner has closed it, or has ended"

#: Every role that is not closed yet, or has something left to send. What exit has to take care of.
open_roles: set[Role] = set()


@reset_in_child
def _forget() -> None:
    open_roles.clear()


class Role(abc.ABC):
    """One handle's side of a queue. Safe to use from several threads.

    ``closed`` says why the handle cannot be used any more; empty as long as it can.
    """

    def __init__(self, end: Endpoint, numbered: bool, sent: Sent, lock: threading.Lock) -> None:
        self.end = end
        self.closed = ""
        self.max_payload = end.max_message - TRAILER
        self.alarm = Alarm()
        self.waiter = Waiter(end, self.alarm)
        self.outbox = Outbox(end, numbered=numbered, sent=sent, lock=lock, refusal=self.closed_error)
        #: Send one payload, now or as soon as there is room. Raises QueueClosed.
        self.send: Callable[[bytes | Parcel], None] = self.outbox.send
        closed_in_child(self)
        open_roles.add(self)

    @abc.abstractmethod
    def take(self) -> Received | None:
        """Take the next message if there is one."""

    @abc.abstractmethod
    def raise_trouble(self) -> None:
        """Called when the alarm is set and no message is there: raise what it stands for, or return to go on."""

    @abc.abstractmethod
    def ticket(self) -> list[Descriptor]:
        """Descriptors of its own from which another process makes a worker's handle."""

    @abc.abstractmethod
    def close(self) -> None: ...

    def wait(self, nonblocking: bool, timeout: float | None) -> Received | None:
        """The next message, after ``take`` has found none; None if ``nonblocking``. Raises queue.Empty."""
        if self.closed:
            raise QueueClosed(self.closed)
        if nonblocking:
            return None
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            if self.alarm.is_set():
                received = self.take()
                if received is not None:
                    return received
                self.raise_trouble()
            received = self.waiter.wait(self.take, deadline)
            if received is not None:
                return received
            if self.closed:
                raise QueueClosed(self.closed)
            if deadline is not None and time.monotonic() >= deadline and not self.alarm.is_set():
                raise queue.Empty

    def closed_error(self) -> QueueClosed:
        return QueueClosed(self.closed or ENDED)

    def abandon(self) -> None:
        self.closed = (
            "this handle was made before a fork and belongs to the parent process: "
            "open the queue by its name here, or pass it to workers started by torchwq"
        )
