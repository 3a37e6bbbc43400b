"""The answers of other processes, at the queue's owner.

All workers write to one socket. The owner takes answers from there. While a worker is leaving, the reactor takes them,
too, and keeps them in an inbox, because nobody has to read for a worker to be able to end.

Invariants:

* ``receiving`` covers "inbox first, then the socket", so that answers keep their order although the reactor moves some
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
from typing import TYPE_CHECKING, TypeVar

from .. import _native
from ..marshalling import codec
from ..marshalling.wire import References
from ..memory.promises import KeptBlocks, SenderLeft
from ..transport.connection import Connection
from ..transport.endpoint import Endpoint, Received
from ..transport.locks import new_lock
from ..transport.outbox import Outbox
from ..transport.trailer import BARE, KIND, PICKLE

R = TypeVar("R")


class PythonAnswerFields:
    """The part of ``AnswerSocket`` that each answer passes through."""

    __slots__ = ("inbox", "is_looking", "kept", "receive", "receiving")

    receiving: threading.RLock
    inbox: deque[Received]
    #: Of blocks that answers refer to without bringing them. Looked at with ``receiving`` held.
    kept: KeptBlocks
    receive: Callable[[], Received | None]
    #: Whether the thread that has ``receiving`` is just taking an answer out of the socket.
    is_looking: bool

    def take(self) -> Received | None:
        """The next answer; None if there is none."""
        with self.receiving:
            return self.inbox.popleft() if self.inbox else self._take_locked()

    def take_from_socket(self) -> Received | None:
        """The same past the inbox."""
        with self.receiving:
            return self._take_locked()

    def _take_locked(self) -> Received | None:
        if self.is_looking:
            return self.take_past()
        self.is_looking = True
        try:
            return self.kept.take(self.receive)
        except EOFError:
            return None  # closed by another thread; the caller looks at that
        finally:
            self.is_looking = False

    def take_past(self) -> Received | None:
        raise NotImplementedError


AnswerFields = PythonAnswerFields
if not TYPE_CHECKING and _native.core is not None:
    AnswerFields = _native.core.AnswerFields


class AnswerSocket(AnswerFields):
    """Brings the answers of other processes to the owner.

    Args:
        connection: the owner's.
        theirs: the end that workers write to.
        words: memory that the workers share, where lost answers are counted, in word ``lost``.
    """

    def __init__(self, connection: Connection, theirs: Endpoint, words: memoryview, lost: int) -> None:
        self._connection = connection
        self._end = connection.endpoint
        self.receive = connection.take
        self.receiving = new_lock()
        self.inbox = deque()
        self.is_looking = False
        self.kept = KeptBlocks(References, words, lost, self._look_aside)
        self.add_sender = self.kept.add_sender
        #: What the owner says to itself, in the order of the answers.
        self._to_itself = Outbox(theirs)

    @property
    def has_inbox(self) -> bool:
        """Whether there are answers that no descriptor tells of."""
        return bool(self.inbox)

    def take_past(self) -> Received | None:
        """The next answer, while a call further up this thread's stack may have another one in hand."""
        try:
            next_one = self._end.peek()
        except (EOFError, OSError):  # it has been closed
            return None
        return self.receive() if next_one and next_one[KIND] in (BARE, PICKLE) else None

    def can_take(self) -> bool:
        # A message may be there that concerns the connection only.
        return bool(self.inbox) or (self._connection.is_readable() and self._look_aside())

    def _look_aside(self) -> bool:
        """See ``KeptBlocks``."""
        with self.receiving, contextlib.suppress(OSError, EOFError):  # it has just been closed
            return not self.is_looking and self.kept.take_control_messages(self._end)
        return True

    def wait(self, attempt: Callable[[], R | None], deadline: float | None, stop: Callable[[], object]) -> R | None:
        with self.receiving:
            is_nested = self.is_looking  # by nobody but a call further up this thread's stack
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
        with self.receiving:
            while count < most and (received := self.take_from_socket()) is not None:
                self.inbox.append(received)
                count += 1
        return True if count else None

    def sender_left(self, sender: int) -> None:
        """What this sender had promised ends behind all that it has sent."""
        self._to_itself.send_control(SenderLeft(sender))
        self.kept.schedule_poll()

    def close(self) -> None:
        """Nothing more is taken; what nobody has read is thrown away."""
        with self.receiving:
            unread, self.inbox = self.inbox, deque()
        for message in unread:
            codec.discard(*message)
        with self.receiving:
            self.kept.close()

    def end(self) -> None:
        """The end that workers write to is about to be closed here."""
        self._to_itself.close()
