"""One direction of messages: inside the process first, then over a connection.

A queue's questions, its answers, and the items of a channel pass through a pipe. As long as only threads of one process
take part, messages wait in a mailbox, and nothing is pickled that need not be. When another process comes, the pipe
gets a :class:`Carrier`, which is what connects processes: a socket and what belongs to it.

Invariants:

* ``lock`` covers "is there a carrier, is it closed?" and putting a message. So nothing is put after the closing, and
  nothing is left behind when the messages move.
* Messages are taken from the mailbox first. So messages that were written before the pipe has moved come before those
  written after, and the messages of one writer keep their order.
* While messages move, nobody takes any, and a reader waits until they have moved. So they are read in their order, also
  if the move fails.
* A pipe moves once and never back. While it moves, a message that is being encoded may ask for the pipe to move: a
  message may have a handle in it. That is done already then, as far as the handle needs it.
* A reader that waits sees a message, the closing, or the carrier, whatever comes first: who brings one of these wakes
  those who wait afterwards.

Note [Moving a pipe].

All messages that wait are encoded for other processes first. If one of them cannot go, all stay where they are, in
their order, and the error is raised. Else the carrier ``begins``: it learns how many messages were written and taken
before; they leave in their order, and so does what a signal handler has written meanwhile. Then those who wait look
again, and find the carrier.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from ..marshalling import codec
from ..transport.endpoint import Received
from ..transport.mailbox import Mailbox
from ..transport.waiting import never

R = TypeVar("R")


class Incoming(Protocol):
    """What brings messages of other processes to a pipe."""

    def take(self) -> Received | None:
        """The next message, if there is one."""

    def can_take(self) -> bool:
        """Whether there is a message to take."""

    def wait(self, attempt: Callable[[], R | None], deadline: float | None, stop: Callable[[], object], /) -> R | None:
        """See ``Pipe.wait``."""

    def wake_all(self) -> None:
        """End each ``wait`` that has begun."""

    def filenos(self) -> Sequence[int]:
        """One of these is readable when there is a message, or the end."""


class Carrier(Incoming, Protocol):
    """What takes the messages of a pipe to other processes, too."""

    @property
    def max_payload(self) -> int:
        """How large a message may be, in bytes."""

    def begin(self, before: int) -> None:
        """The pipe moves here; so many messages were written and taken before."""

    def cancel(self) -> None:
        """The pipe cannot move here. What was opened for it is closed."""

    def send(self, payload: codec.Encoded, /) -> object:
        """Send one message, now or as soon as there is room in the socket."""


S = TypeVar("S", bound=Incoming)
C = TypeVar("C", bound=Carrier)


class Pipe(Generic[S]):
    """Messages of this process's threads and, over the carrier, of others. Safe to use from several threads."""

    def __init__(self) -> None:
        self.box: Mailbox[Received] = Mailbox()
        #: What connects the pipe with other processes; None as long as nobody else has it.
        self.carrier: S | None = None
        self.is_closed = False
        #: Whether messages are just moving to the carrier. Nobody takes those that come later then.
        self.is_moving = False

    def put(self, payload: codec.Encoded) -> bool:
        """Put a message where threads of this process find it. False, and it is not put, if the pipe is closed."""
        if self.is_closed:
            return False
        self.box.put(codec.deliver_local(payload))
        carrier = self.carrier
        if carrier is not None:
            carrier.wake_all()
        return True

    def carry(self, carrier: S) -> None:
        """Let messages of other processes come over the carrier. Those of this process's threads stay here."""
        self.carrier = carrier
        self.box.wake_all()

    # Reading

    def take(self) -> Received | None:
        """The next message; None if there is none."""
        box = self.box
        if box.messages and not self.is_moving:
            try:
                return box.pop()
            except IndexError:  # another thread was faster
                pass
        carrier = self.carrier
        return None if carrier is None else carrier.take()

    def can_take(self) -> bool:
        """Whether there is a message to take."""
        carrier = self.carrier
        return self.box.has_message() or (carrier is not None and carrier.can_take())

    def wait(
        self, attempt: Callable[[], R | None], deadline: float | None, stop: Callable[[], object] = never
    ) -> R | None:
        """What ``attempt`` gives as soon as it gives something; None after ``deadline`` (time.monotonic), if there is a
        reason to ``stop``, or for no reason. Who makes a reason calls ``wake_all`` then."""
        carrier, messages = self.carrier, self.box.messages
        if carrier is None:
            return self.box.wait(attempt, deadline, lambda: self.carrier is not None or self.is_closed or stop())
        return carrier.wait(attempt, deadline, lambda: messages or stop())

    def wake_all(self) -> None:
        """Let everyone who waits look at the state of things."""
        self.box.wake_all()
        carrier = self.carrier
        if carrier is not None:
            carrier.wake_all()

    def filenos(self) -> Sequence[int]:
        """One of these is readable when there is a message, or the end. Others are, once there is a carrier."""
        carrier = self.carrier
        not_empty = self.box.not_empty().fileno()
        return (not_empty,) if carrier is None else (not_empty, *carrier.filenos())

    # Closing

    def close(self) -> None:
        """Nothing more is put here; what was put can still be taken. Wakes everyone who waits."""
        self.is_closed = True
        self.box.end()
        self.wake_all()

    def discard(self) -> None:
        """Throw away what nobody has taken, and give up the mailbox's descriptor."""
        while (received := self.box.take()) is not None:
            codec.discard(*received)
        self.box.close()


class MovingPipe(Pipe[C]):
    """A pipe whose messages all go over the carrier, once there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.RLock()
        #: How many messages were put into the mailbox.
        self.written = 0
        self._on_the_move: list[Received] = []

    def put_if_local(self, payload: codec.Encoded) -> bool | None:
        """As ``put``; None, and the message is not put, if messages go over the carrier now."""
        with self.lock:
            if self.carrier is not None:
                return None
            if self.is_closed:
                return False
            self.written += 1
            self.box.put(codec.deliver_local(payload))
            return True

    def move(self, open_carrier: Callable[[], C]) -> bool:
        """Let messages go over the carrier from now on. A second call changes nothing. False if a call further up this
        thread's stack is still at it.

        Raises MarshalError, if a message that waits cannot go to another process, or what ``open_carrier`` raises;
        nothing has changed then. See Note [Moving a pipe].
        """
        with self.lock:
            if self.carrier is not None or self.is_moving:
                return not self.is_moving
            self.is_moving = True
            try:
                self._move(open_carrier())
            finally:
                self._on_the_move = []
                self.is_moving = False
                self.box.wake_all()  # also if it has failed: nobody has taken what was put back
        return True

    def count_local(self) -> int:
        """How many messages wait here; those that just move, too."""
        return len(self.box.messages) + len(self._on_the_move)

    def _move(self, carrier: C) -> None:
        waiting: list[Received] = []
        self._on_the_move, payloads = waiting, []
        try:
            while (received := self.box.take()) is not None:  # also what pickling, which runs any code, has written
                waiting.append(received)
                payloads.append(codec.for_other_processes(received[0], carrier.max_payload))
        except BaseException:
            while (received := self.box.take()) is not None:
                waiting.append(received)
            for received in waiting:
                self.box.put(received)
            carrier.cancel()
            raise
        carrier.begin(self.written - len(waiting))
        self.carrier = carrier
        for payload in payloads:
            carrier.send(payload)
        while (received := self.box.take()) is not None:  # a signal handler has written it just before
            carrier.send(codec.for_other_processes(received[0], carrier.max_payload))

    def filenos(self) -> Sequence[int]:
        carrier = self.carrier
        return super().filenos() if carrier is None else carrier.filenos()

    def close(self) -> None:
        with self.lock:
            super().close()
