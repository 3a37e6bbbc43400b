"""The questions of a queue, at its owner: numbered, counted, remembered, and let in as there is room.

They pass through a pipe. As long as no other process has a handle they wait for threads of this process. Then they go
to the socket that all workers share; threads of this process read from it, too, by an end of their own, which outlives
the owner's, because what was written before the closing is still read.

Invariants:

* Questions are numbered in the order in which they are written, from 1. Workers note the numbers of those they take.
* ``taking`` covers "take a question and note it" for all threads of this process together, so that they note them in
  their order. It is held while the questions move, too. It is taken after the pipe's lock.
* A process that is killed between taking a question and noting it leaves the counts short. So what the counts say is in
  the socket is believed only while the socket is not empty.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from ..pipe.pipe import MovingPipe
from ..pipe.room import Room, SharedRoom
from ..transport import descriptors, kinds
from ..transport.connection import Connection
from ..transport.endpoint import Endpoint, Received
from ..transport.timing import MAX_SLEEP
from ..transport.trailer import number_of
from .counters import ASKED, SENT, TAKEN_BY_THREADS, Counters
from .history import History
from .membership import Membership

R = TypeVar("R")


class QuestionSocket:
    """What carries questions to other processes, and how threads of this one read them there.

    Args:
        connection: the owner's, which it writes to.
        theirs: the end that workers read from.
        history: knows the number of the question that has entered the socket last.
    """

    def __init__(self, connection: Connection, theirs: Endpoint, history: History) -> None:
        self.max_payload = theirs.max_payload
        self.send = connection.send
        self._outbox = connection.outbox
        self._endpoint = connection.endpoint
        self._theirs = theirs
        #: Of the threads of this process, if there are any that may read.
        self._reader: Connection | None = None
        self._ended = False
        self._history = history

    def begin(self, before: int) -> None:
        self._outbox.number = self._history.last = before

    def cancel(self) -> None:
        """Threads read here no more."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()

    @property
    def last_sent(self) -> int:
        """Number of the question that has entered the socket last."""
        return self._history.last

    @property
    def last_number(self) -> int:
        """Number of the question that was written last."""
        return self._outbox.number

    def unread(self) -> int | None:
        """How many are in the socket; None where that cannot be known."""
        return self._endpoint.unread_by_peer()

    def handover(self) -> list[int]:
        return self._theirs.handover()

    def open_reader(self) -> None:
        """Let threads of this process read. Raises ResourceError."""
        if self._reader is None:
            self._reader = Connection(kinds.adopt(descriptors.dup_all(self._theirs.handover())))

    def close_reader(self, *, is_closed: bool) -> None:
        """No thread of this process reads any more; ``is_closed``: none will."""
        if self._reader is not None:
            self.cancel()
            self._ended = is_closed

    def has_ended(self, *, is_closed: bool) -> bool:
        """Whether no question is left, and none will come; ``is_closed``: the owner has closed the queue."""
        return self._ended or (is_closed and self._reader is None)

    def take(self) -> Received | None:
        reader = self._reader
        if reader is None:
            return None
        try:
            return reader.take()
        except EOFError:
            self._ended = True
            return None

    def can_take(self) -> bool:
        reader = self._reader
        return reader is not None and reader.endpoint.is_readable()

    def wait(self, attempt: Callable[[], R | None], deadline: float | None, stop: Callable[[], object]) -> R | None:
        reader = self._reader
        if reader is None or self._ended:
            return attempt()
        latest = time.monotonic() + MAX_SLEEP
        return reader.wait(attempt, latest if deadline is None else min(latest, deadline), stop)

    def wake_all(self) -> None:
        reader = self._reader
        if reader is not None:
            reader.wake_all()

    def filenos(self) -> Sequence[int]:
        reader = self._reader
        return () if reader is None else reader.filenos()


class Questions(MovingPipe[QuestionSocket]):
    """The pipe of questions, and what the owner knows of them.

    Args:
        capacity: how many may wait to be taken before writing waits; None: any number.
        counters: where workers note what they take.
        members: the workers' handles.
    """

    def __init__(self, capacity: int | None, counters: Counters, members: Membership) -> None:
        super().__init__()
        self.taking = threading.RLock()
        self._counters = counters
        self._members = members
        self.history = History(
            members.numbers_in_hand, counters.native_word(SENT) or functools.partial(counters.count, SENT)
        )
        #: Of the question that a thread of this process has taken last.
        self.number_taken = 0
        self.room = None if capacity is None else Room(capacity, self.count_untaken, lambda: self.is_closed)
        self._room_guard = threading.RLock()
        self._shared_room: SharedRoom | None = None
        #: What carries them to other processes, once they have the queue.
        self.socket: QuestionSocket

    def connect(self, connection: Connection, theirs: Endpoint) -> None:
        """Over this connection they will go."""
        self.socket = QuestionSocket(connection, theirs, self.history)

    # Other processes

    @property
    def is_local(self) -> bool:
        """Whether no other process has the queue."""
        return self.carrier is None

    def move_to_socket(self) -> bool:
        """See ``move``. With ``lock`` and ``taking`` held."""
        return self.move(self._open_socket)

    def _open_socket(self) -> QuestionSocket:
        if self.room is not None:
            self.room.share(self._open_room())
        if self._members.any_threads:
            self.socket.open_reader()
        return self.socket

    def _open_room(self) -> SharedRoom:
        with self._room_guard:
            if self._shared_room is None:
                self._shared_room = SharedRoom(self._counters.words, ASKED)
            return self._shared_room

    def handover(self) -> list[int]:
        """Descriptors from which another process makes what it reads from, which stay this object's."""
        room = [] if self.room is None else self._open_room().handover()
        return [*self.socket.handover(), self._counters.fd, *room]

    # Written and sent

    @property
    def count(self) -> int:
        """How many questions were ever written; also the number of the last one."""
        return self.written if self.carrier is None else self.carrier.last_number

    @property
    def sent(self) -> int:
        """Number of the last question that workers find; those after it wait in the outbox."""
        return self.written if self.carrier is None else self.carrier.last_sent

    def unread(self) -> int | None:
        """How many wait where workers find them; None where that cannot be known."""
        return len(self.box) if self.carrier is None else self.carrier.unread()

    def count_untaken(self) -> int:
        """How many no worker has taken."""
        if self.carrier is None:
            return len(self.box.messages)
        sent = self.carrier.last_sent
        in_socket = 0 if self.is_closed else sent - self._members.count_taken()
        if in_socket and self.carrier.unread() == 0:
            in_socket = 0  # a worker died with a question that it had not noted
        return self.carrier.last_number - sent + in_socket

    def describe(self, number: int) -> str:
        """A question in a few words."""
        return self.history.describe(number)

    # Taken by threads of this process

    def take_numbered(self) -> Received | None:
        """The next question, which ``number_taken`` says the number of. With ``taking`` held."""
        if self.carrier is None:
            try:
                received = self.box.pop()
            except IndexError:
                return None
            self.number_taken += 1
            return received
        found = self.carrier.take()
        if found is not None:
            self.number_taken = number_of(found[0])
            self._counters.count(TAKEN_BY_THREADS)
        return found

    def is_over(self) -> bool:
        """Whether no question is left for threads of this process, and none will come."""
        if self.carrier is None:
            return self.is_closed and not self.box.messages
        return self.carrier.has_ended(is_closed=self.is_closed)

    # The end

    def close(self) -> None:
        super().close()
        self.history.clear()
        if self.room is not None:
            self.room.wake_all()

    def release(self) -> None:
        """Nobody can be handed the queue any more."""
        if self._shared_room is not None:
            self._shared_room.close()
