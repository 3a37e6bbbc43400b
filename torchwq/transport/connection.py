"""One side of a connection: its endpoint, the outbox for it, and the threads that sleep until a message comes.

A queue's owner and its workers' handles, threads that read a queue's socket, a channel between processes, a worker and
its owner, a link: each is one of these. So there is one outbox, one way to sleep, and one order of closing.

Invariants:

* A connection takes its endpoints over at once. If it cannot be made, they are closed, and nothing is left.
* ``send`` and ``take`` never block and take no lock of this object. They are the bound methods of outbox and endpoint,
  so that the hot path makes no call more.
* ``wait`` is the only place where a thread sleeps that others can wake: by a message, the alarm, or the closing.
* The child of a fork closes its copies of the descriptors; it sends nothing, shuts nothing down and waits for nothing.

Note [Closing a connection].

Any thread may close at any time, also one that runs a callback of the outbox. A finalizer leaves it to
:mod:`~torchwq.transport.cleanup`. A second ``close`` does nothing. The order is:

1. ``stop_waiting``: each sleeper wakes, tries once more, and gets None if there is no message; no thread sleeps again.
   The last sleeper closes the alarm. Messages that have arrived can still be taken, and others be sent.
2. The reactor forgets the endpoints, before their descriptors are closed: see the reactor's invariants.
3. The outbox refuses every ``send``, gives back the messages that wait, and returns when no thread sends.
4. The endpoints are closed. A thread that takes meanwhile gets its message or EOFError, one that sends
   ``closed_error()``.

``close_when_sent`` refuses every later ``send``. The rest happens when all messages that wait were sent, or nobody can
receive them, in the thread that sends, which may be the reactor's. Until then messages can be taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from . import polling, reactor
from .alarm import Alarm
from .endpoint import Endpoint, Received
from .fork import closed_in_child
from .outbox import Outbox, Sent
from .waiting import Waiter, never

T = TypeVar("T")


class Connection:
    """Safe to use from several threads.

    Args:
        endpoint: where messages come from, and go to. Taken over.
        outgoing: where they go to, if that is another one: each side of a channel has both ends of it. Taken over.
        waitable: whether threads sleep in ``wait``, which takes an alarm.
        numbered, on_sent, closed_error, on_backlog, on_emptied: see :class:`~torchwq.transport.outbox.Outbox`.

    Raises:
        ResourceError: no descriptor is free.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        outgoing: Endpoint | None = None,
        waitable: bool = True,
        numbered: bool = False,
        on_sent: Sent | None = None,
        closed_error: Callable[[], Exception] = BrokenPipeError,
        on_backlog: Callable[[bool], bool] | None = None,
        on_emptied: Callable[[], None] | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.outgoing = endpoint if outgoing is None else outgoing
        self._waiter: Waiter | None = None
        try:
            if waitable:
                self._waiter = Waiter(endpoint)
        except BaseException:
            self._close_ends()
            raise
        self.outbox = Outbox(
            self.outgoing,
            numbered=numbered,
            on_sent=on_sent,
            closed_error=closed_error,
            on_backlog=on_backlog,
            on_emptied=on_emptied,
        )
        #: See ``Outbox.send``.
        self.send = self.outbox.send
        #: See ``Endpoint.try_receive``.
        self.take = endpoint.try_receive
        self._is_watched = False
        self._is_closed = False
        closed_in_child(self)

    @property
    def alarm(self) -> Alarm:
        """Ends every ``wait`` while it is set."""
        assert self._waiter is not None
        return self._waiter.alarm

    def wait(
        self, attempt: Callable[[], T | None], deadline: float | None, stop: Callable[[], object] = never
    ) -> T | None:
        """See ``Waiter.wait``. None also after ``stop_waiting``."""
        assert self._waiter is not None
        return self._waiter.wait(attempt, deadline, stop)

    def wake_all(self) -> None:
        """See ``Waiter.wake_all``."""
        assert self._waiter is not None
        self._waiter.wake_all()

    def receive(self, seconds: float | None = None) -> Received | None:
        """The next message; None if there is none after ``seconds``, or if another thread has taken it.

        Raises EOFError. Nothing else ends the wait, not even the alarm.
        """
        received = self.take()
        if received is None and polling.readable(seconds, self.fileno()):
            received = self.take()
        return received

    def is_readable(self) -> bool:
        """Whether there is a message, or the end of messages."""
        return bool(polling.readable(0, self.fileno()))

    def fileno(self) -> int:
        """Readable when there is a message or the end of messages; -1 once it is closed."""
        return self.endpoint.fileno()

    def filenos(self) -> tuple[int, int]:
        """That of ``fileno``, and one that is readable when the alarm is set."""
        return self.fileno(), self.alarm.fileno()

    def handover(self) -> list[int]:
        """The descriptors, which stay this object's, from which another process makes the same endpoints."""
        return [fd for end in self._ends() for fd in end.handover()]

    def watch(self, callback: Callable[[], None] | None) -> None:
        """Let the reactor call this whenever there is a message or the end of messages; None: no more."""
        if self.fileno() >= 0 and (self._is_watched or callback is not None):
            self._is_watched = callback is not None
            reactor.get().set_reader(self.fileno(), callback)

    def stop_waiting(self) -> None:
        """End every wait; no thread waits again."""
        if self._waiter is not None:
            self._waiter.close()

    def close_when_sent(self, then: Callable[[], None] | None = None) -> None:
        """Refuse every later ``send``, and close when no message waits, or call ``then``, which closes."""
        self.outbox.close_when_sent(self.close if then is None else then)

    def close(self, *, leave_open: bool = False) -> None:
        """See Note [Closing a connection].

        Args:
            leave_open: the process ends, and other threads may be using the endpoints.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self.stop_waiting()
        self.watch(None)
        self.outbox.close()
        if not leave_open:
            self._close_ends()
            return
        for end in self._ends():
            end.leave_open()

    def _ends(self) -> list[Endpoint]:
        return [self.endpoint] if self.outgoing is self.endpoint else [self.outgoing, self.endpoint]

    def _close_ends(self) -> None:
        for end in self._ends():
            end.close()

    def abandon(self) -> None:
        if self._waiter is not None:
            self._waiter.abandon()
        self.outbox.abandon()
        for end in self._ends():
            end.abandon()
