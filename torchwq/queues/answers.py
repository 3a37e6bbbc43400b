"""The answers of other processes, at the queue's owner.

All workers write to one socket. The owner takes answers from there. While a worker is leaving, the reactor takes them,
too, and keeps them in an inbox, because nobody has to read for a worker to be able to end.

Invariants:

* ``_receiving`` covers "inbox first, then the socket", so that answers keep their order although the reactor moves some
  into the inbox. It is reentrant: a finalizer or a signal handler may read in the middle of a read.
* A read that is interrupted so may have an answer in hand that brings what a later one refers to, see
  Note [in-band promises]. So the later read takes only what needs nothing, and finds no answer else.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

from ..marshalling import codec
from ..marshalling.wire import References
from ..memory.promises import KeptBlocks, SenderLeft
from ..transport.connection import Connection
from ..transport.endpoint import Endpoint, Received
from ..transport.outbox import Outbox
from ..transport.trailer import BARE, KIND, PICKLE

R = TypeVar("R")


class AnswerSocket:
    """Brings the answers of other processes to the owner.

    Args:
        connection: the owner's.
        theirs: the end that workers write to.
        words: memory that the workers share, where lost answers are counted, in word ``lost``.
    """

    def __init__(self, connection: Connection, theirs: Endpoint, words: memoryview, lost: int) -> None:
        self._connection = connection
        self._end = connection.endpoint
        self._receive = connection.take
        self._receiving = threading.RLock()
        self._inbox: deque[Received] = deque()
        #: Whether the thread that has ``_receiving`` is just taking an answer out of the socket.
        self._is_looking = False
        #: Of blocks that answers refer to without bringing them. Looked at with ``_receiving`` held.
        self._kept = KeptBlocks(References, words, lost, self._look_aside)
        self.add_sender = self._kept.add_sender
        #: What the owner says to itself, in the order of the answers.
        self._to_itself = Outbox(theirs)

    @property
    def has_inbox(self) -> bool:
        """Whether there are answers that no descriptor tells of."""
        return bool(self._inbox)

    def take(self) -> Received | None:
        with self._receiving:
            if self._inbox:
                return self._inbox.popleft()
            return self._take_from_socket()

    def _take_from_socket(self) -> Received | None:
        """With ``_receiving`` held."""
        if self._is_looking:
            return self._take_past()
        self._is_looking = True
        try:
            return self._kept.take(self._receive)
        except EOFError:
            return None  # closed by another thread; the caller looks at that
        finally:
            self._is_looking = False

    def _take_past(self) -> Received | None:
        """The next answer, while a call further up this thread's stack may have another one in hand."""
        try:
            next_one = self._end.peek()
        except (EOFError, OSError):  # it has been closed
            return None
        return self._receive() if next_one and next_one[KIND] in (BARE, PICKLE) else None

    def can_take(self) -> bool:
        # A message may be there that concerns the connection only.
        return bool(self._inbox) or (self._connection.is_readable() and self._look_aside())

    def _look_aside(self) -> bool:
        """See ``KeptBlocks``."""
        with self._receiving, contextlib.suppress(OSError, EOFError):  # it has just been closed
            return not self._is_looking and self._kept.take_control_messages(self._end)
        return True

    def wait(self, attempt: Callable[[], R | None], deadline: float | None, stop: Callable[[], object]) -> R | None:
        with self._receiving:
            is_nested = self._is_looking  # by nobody but a call further up this thread's stack
        return self._connection.wait(functools.partial(self._nested, attempt) if is_nested else attempt, deadline, stop)

    def _nested(self, attempt: Callable[[], R | None]) -> R | None:
        found = attempt()
        if found is None and self._end.fileno() >= 0 and self._end.peek():  # the call further up goes on after this one
            raise RuntimeError(
                "a finalizer or a signal handler waits for a tensor in the middle of a read of the same thread: read "
                "with nonblocking=True there"
            )
        return found

    def wake_all(self) -> None:
        self._connection.wake_all()

    def filenos(self) -> Sequence[int]:
        return (self._connection.fileno(),)

    def absorb(self, most: float = math.inf) -> bool | None:
        """Move what is in the socket to the inbox; True if there was anything."""
        count = 0
        with self._receiving:
            while count < most and (received := self._take_from_socket()) is not None:
                self._inbox.append(received)
                count += 1
        return True if count else None

    def sender_left(self, sender: int) -> None:
        """What this sender had promised ends behind all that it has sent."""
        self._to_itself.send_control(SenderLeft(sender))
        self._kept.schedule_poll()

    def close(self) -> None:
        """Nothing more is taken; what nobody has read is thrown away."""
        with self._receiving:
            unread, self._inbox = self._inbox, deque()
        for message in unread:
            codec.discard(*message)
        with self._receiving:
            self._kept.close()

    def end(self) -> None:
        """The end that workers write to is about to be closed here."""
        self._to_itself.close()
