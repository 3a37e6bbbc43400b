"""Where threads of the owner's process find its questions.

As long as no other process has a handle, in a mailbox. Once one has, in the socket that all workers share, which these
threads read by an end of their own: it must outlive the owner's, since what was written before the closing is still
read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from ..transport import descriptors, kinds
from ..transport.connection import Connection
from ..transport.endpoint import Received
from ..transport.mailbox import Mailbox
from ..transport.readiness import Readiness
from ..transport.timing import MAX_SLEEP
from ..transport.trailer import number_of


class Inside:
    """The questions of one queue, for these threads. What changes it is called with ``Owner.taking`` held."""

    def __init__(self) -> None:
        #: The questions; None once they are in the socket.
        self.box: Mailbox[Received] | None = Mailbox()
        self._connection: Connection | None = None
        self._ended = False
        #: Of the question that was taken last.
        self.number = 0

    def take(self) -> Received | None:
        """The next question, whose ``number`` is known then. With ``Owner.taking`` held."""
        box = self.box
        if box is not None:
            try:
                question = box.pop()
            except IndexError:
                return None
            self.number += 1
            return question
        if self._connection is None:
            return None
        try:
            received = self._connection.take()
        except EOFError:
            self._ended = True
            return None
        if received is not None:
            self.number = number_of(received[0])
        return received

    def has_question(self) -> bool:
        box, connection = self.box, self._connection
        return box.has_message() if box is not None else connection is not None and connection.endpoint.is_readable()

    def is_over(self, closed: bool) -> bool:
        """Whether no question is left, and none will come; ``closed``: the owner has closed the queue."""
        if self.box is not None:
            return closed and not len(self.box)
        return self._ended or (closed and self._connection is None)

    def sleep(
        self, attempt: Callable[[], Received | None], deadline: float | None, stop: Callable[[], object]
    ) -> Received | None:
        """What ``attempt`` gives; None after ``deadline``, if there is a reason to ``stop``, or for no reason."""
        box, connection = self.box, self._connection
        if box is not None:
            return box.wait(attempt, deadline, lambda: box is not self.box or stop())
        if connection is None or self._ended:
            return attempt()
        glance = time.monotonic() + MAX_SLEEP
        return connection.wait(attempt, glance if deadline is None else min(glance, deadline))

    def wake(self, closed: bool) -> None:
        """Let those who wait look; ``closed``: no more will come."""
        box = self.box
        if box is not None and closed:
            box.end()
        elif box is not None:
            box.wake_all()

    def watch(self, readiness: Readiness) -> None:
        """Let ``readiness`` stand for questions and their end. To be called again when they have moved."""
        box, connection = self.box, self._connection
        if box is not None:
            readiness.set(box.not_empty().fileno())
        elif connection is not None:
            readiness.set(*connection.filenos())

    def open_end(self, handover: Sequence[int]) -> None:
        """Have an end, of these descriptors, which stay the caller's. Raises ResourceError."""
        if self._connection is None:
            self._connection = Connection(kinds.adopt(descriptors.dup_all(handover)))

    def close(self, closed: bool) -> None:
        """Nobody is here who takes questions; ``closed``: nobody will come."""
        if closed and self.box is not None:
            while self.box.take() is not None:
                pass
        if self._connection is not None:
            self._connection.close()
            self._connection = None
            self._ended = closed
