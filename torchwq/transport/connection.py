"""One side's part of a connection: the endpoint, what waits to be sent over it, and who sleeps until something comes.

Each side that sends and receives messages is put together here: a queue's owner and its workers' handles, threads that
read a queue's socket, a channel between processes, a worker and its owner, a link. So there is one outbox, one way to
sleep, and one order of closing.

Invariants:

* A connection takes its ends over at once. If it cannot be made, they are closed, and nothing is left.
* ``send`` and ``take`` never block and take no lock of this object. They are bound once: who sends or takes for each
  message looks up no more than they do.
* ``wait`` is the only place where a thread sleeps that others can wake: by a message, the alarm, or the closing.
* In the child of a fork all copies of descriptors are closed; nothing is sent, shut down or waited for (``abandon``).

Note [Closing a connection].

Any thread may close at any time, also the one that is told that everything is sent. A finalizer leaves it to
:mod:`~torchwq.transport.cleanup`. A second ``close`` does nothing. The order is:

1. ``stop_waiting``: who sleeps wakes, tries once more, and gets None if nothing is there; nobody sleeps again. The last
   sleeper gives the alarm's descriptors up. What has come can still be taken, and everything be sent.
2. The reactor forgets the ends, before their descriptors are closed: see the reactor's invariants.
3. The outbox takes nothing more, gives what waits back to whom it belongs, and returns when nobody sends.
4. The ends are closed. A thread that takes meanwhile gets its message or EOFError, one that sends
   ``closed_error()``.

``close_when_sent`` refuses what is written from now on; the rest happens as soon as what waits was sent, or nobody can
receive it, in the thread that sees to that, which may be the reactor's. Until then the ends stay open, and what has
come can be taken.
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
        outgoing: where they go to, if that is another one: whoever has a channel has both ends of it. Taken over.
        waitable: whether threads sleep in ``wait``. Where only the reactor looks for messages, no alarm is needed.
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
        #: Send one payload, now or as soon as there is room: see ``Outbox.send``.
        self.send = self.outbox.send
        #: The next message, or None: see ``Endpoint.try_receive``.
        self.take = endpoint.try_receive
        self._is_watched = False
        self._is_closed = False
        closed_in_child(self)

    @property
    def alarm(self) -> Alarm:
        """Ends every ``wait`` as long as it is set."""
        assert self._waiter is not None
        return self._waiter.alarm

    def wait(
        self, attempt: Callable[[], T | None], deadline: float | None, stop: Callable[[], object] = never
    ) -> T | None:
        """What ``attempt`` gives as soon as it gives something; it is made whenever a message may have come.

        None after ``deadline`` (time.monotonic), if the alarm is set, or after ``stop_waiting``. Also if there is a
        reason to ``stop``; who makes one calls ``wake_all`` then.
        """
        assert self._waiter is not None
        return self._waiter.wait(attempt, deadline, stop)

    def wake_all(self) -> None:
        """Have everybody who waits now look at the state of things."""
        assert self._waiter is not None
        self._waiter.wake_all()

    def receive(self, seconds: float | None = None) -> Received | None:
        """The next message; None if there is none after ``seconds``, or if another thread has taken it.

        Only a message or its end wakes who waits here. Raises EOFError.
        """
        received = self.take()
        if received is None and polling.readable(seconds, self.fileno()):
            received = self.take()
        return received

    def is_readable(self) -> bool:
        """Whether there is a message, or the end, of which taking tells."""
        return bool(polling.readable(0, self.fileno()))

    def fileno(self) -> int:
        """Readable when there is a message or the end; -1 once it is closed."""
        return self.endpoint.fileno()

    def filenos(self) -> tuple[int, int]:
        """One is readable when there is a message or the end, the other when the alarm is set."""
        return self.fileno(), self.alarm.fileno()

    def handover(self) -> list[int]:
        """The descriptors, which stay this object's, from which another process makes the same ends."""
        return [fd for end in self._ends() for fd in end.handover()]

    def watch(self, callback: Callable[[], None] | None) -> None:
        """Let the reactor call this whenever there is a message or the end; None: no more."""
        if self.fileno() >= 0 and (self._is_watched or callback is not None):
            self._is_watched = callback is not None
            reactor.get().set_reader(self.fileno(), callback)

    def stop_waiting(self) -> None:
        """Wake who sleeps; nobody sleeps again."""
        if self._waiter is not None:
            self._waiter.close()

    def close_when_sent(self, then: Callable[[], None] | None = None) -> None:
        """Take nothing more to be sent, and close, or call ``then``, which closes, as soon as nothing waits."""
        self.outbox.close_when_sent(self.close if then is None else then)

    def close(self, *, leave_open: bool = False) -> None:
        """See Note [Closing a connection].

        Args:
            leave_open: the process ends, and other threads may be in the middle of using the ends.
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
