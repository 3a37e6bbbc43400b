"""A worker's side of a queue: it reads questions and writes answers.

Invariants:

* Each question taken is noted in this handle's slot of the counters before it is handed to the caller. The slot's
  number is that of the latest question, in whatever order threads, or the calls of one thread's stack, note theirs.
* ``taking`` covers "receive and note". It is reentrant: a finalizer or a signal handler may read, write or close in
  the middle of it. So what the notes say is changed by statements that nothing interrupts, see
  Note [Statements that nothing interrupts], and looked at afresh after each call.
* A thread of this handle is *busy* from taking a question until an answer of its has left for the socket, or it takes
  another question, or it ends. The slot says how many are.
* A goodbye is sent on the link after the last answer has left, never before. The link ends when the goodbye has left:
  one that ends without it is a death to the owner.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Sequence

from .. import _native
from ..errors import QueueClosed
from ..memory.anonymous import Descriptor, duplicates
from ..memory.promises import SentBlocks
from ..pipe.room import SharedRoom
from ..transport import descriptors, kinds
from ..transport import link as links
from ..transport.link import Link
from ..transport.locks import new_lock
from ..transport.timing import REPLY_TIMEOUT
from ..workers import threads
from ..workers.failures import Failure
from ..workers.thread_exit import ThreadExitHook
from .counters import ASKED, LOST, Counters
from .protocol import ADOPT, GOODBYE, IN_DOUBT, LEAVING, FunctionFailed, Hello, Seat
from .role import CLOSED_HERE, ENDED, SocketRole
from .taking import TakerFields

#: How long, in seconds, the end of the process waits for the thread that has sent the last answer to say goodbye.
_LAST_PATIENCE = 2.0


class WorkerSide(TakerFields, SocketRole):
    """A worker's role. Takes over ``fds``: the endpoint's, those of the counters, and of the room, if there is one."""

    def __init__(self, fds: Sequence[int], link: Link, slot: int, capacity: int | None) -> None:
        self.taking = new_lock()
        self.busy = set()
        self.known = set()
        #: What is to be told as soon as the last answer has left.
        self._untold: deque[bytes] = deque()
        with contextlib.ExitStack() as made:  # what is to be closed again if the rest cannot be had
            size = kinds.handover_size()
            rest = list(fds[size + 1 :])
            made.callback(descriptors.close_fds, rest)
            end = kinds.adopt(fds[:size])
            made.callback(end.close)
            self._counters = Counters(fds[size])
            made.callback(self._counters.close)
            self.room = None
            if capacity is not None:
                room_fds, rest[:] = list(rest), []
                self.room = SharedRoom(self._counters.words, ASKED, room_fds)
                made.callback(self.room.close)
            super().__init__(end, False, self.answered, self._tell_untold)
            made.pop_all()
        self.receive = self.connection.take
        self.capacity = capacity
        self._slot = self._counters.slot(slot)
        self.state = 0
        if _native.core is None:
            self._number_at, self._state_at = self._slot.number_index, self._slot.state_index
        else:
            self.address = self._counters.address(self._slot.number_index)
        self._link = link
        self._threads = threading.local()
        self.written = 0
        self._failures = threads.current_failures()
        self._failures.add(self)
        self._is_in_doubt = False
        #: Held until it has left.
        self._here = threading.Lock()
        self._here.acquire()
        self._opened()

    def promise(self, sender: int, room: int) -> None:
        """Make promises from now on, see Note [in-band promises]."""
        self.outbox.promises = SentBlocks(sender, room, self.outbox.send_control, self._counters.words, LOST)

    def meet(self, ident: int) -> None:
        """See to it that a thread which ends is not busy any more."""
        self.known.add(ident)
        self._threads.exit_hook = ThreadExitHook(self, ident)

    def on_thread_exit(self, ident: int) -> None:
        self.known.discard(ident)
        self.idle(ident)

    def raise_failure(self) -> None:
        if self.closed:
            raise QueueClosed(self.closed)

    def owner_gone(self) -> None:
        if not self.closed:
            self.closed = ENDED
            self.alarm.set()

    def handle_descriptors(self) -> list[Descriptor]:
        """Another worker's handle; the owner learns of it over this one's link."""
        ours, fd = links.pair()
        theirs = Descriptor(fd)
        try:
            self._link.send(ADOPT, [ours.fileno()])
        except BrokenPipeError:
            pass  # the owner is gone: whoever gets this handle will see that
        finally:
            ours.close()
        with self.taking:
            room = [] if self.room is None else self.room.handover()
            fds = duplicates([*self.end.handover(), self._counters.fd, *room])
        return [*fds, theirs]

    def worker_failed(self, failure: Failure) -> None:
        self._untold.append(FunctionFailed.encode(failure))
        if self.outbox.is_idle:
            self._tell_untold()
        self.worker_succeeded()

    def worker_succeeded(self) -> None:
        if self._is_in_doubt:
            self._is_in_doubt = False
            if self._counters.fd < 0:  # it has left already
                self._tell(GOODBYE)
                self._link.close_when_sent(self._retire)

    def _tell_untold(self) -> None:
        while self._untold:
            self._tell(self._untold.popleft())

    def close(self, in_doubt: bool = False) -> None:
        if self._counters.fd < 0 or self.closed == CLOSED_HERE:
            return
        self.closed = CLOSED_HERE
        self.alarm.set()
        self._is_in_doubt = in_doubt and self._failures.mark_in_doubt(self)
        self._failures.remove(self)
        if len(self.outbox):
            # The owner may be waiting for this worker to end, and not be reading.
            self._tell(LEAVING)
        self.outbox.close_when_sent(self._leave)

    def _tell(self, what: bytes) -> None:
        try:
            self._link.send(what)
        except BrokenPipeError:
            pass  # the owner is gone

    def _leave(self) -> None:
        """Called as soon as the last answer has left."""
        self._tell_untold()
        self._tell(IN_DOUBT if self._is_in_doubt else GOODBYE)
        with self.taking:
            self.connection.close()
            if self.room is not None:
                self.room.close()
            self._close_counters()
        if not self._is_in_doubt:
            self._link.close_when_sent(self._retire)
        self._here.release()

    def _close_counters(self) -> None:
        self.address = 0  # first: the native part writes there
        self._counters.close()

    def wait_sent(self) -> None:
        """Wait until all that the owner has to be told has left. Called when it is closed."""
        self.outbox.wait_empty()
        self._here.acquire(timeout=_LAST_PATIENCE)
        self._link.wait_sent()

    def abandon(self) -> None:
        super().abandon()
        self.address = 0
        self._counters.abandon()

    @property
    def last_taken(self) -> int:
        """Which of the owner's questions this handle has taken last; they count from 1."""
        return 0 if self.closed else self._slot.number


def accept(fds: Sequence[int], link: Link) -> WorkerSide:
    """Make a worker's side from the descriptors of ``handle_descriptors``. Takes all of them over.

    Raises QueueClosed if the owner is gone without having answered.
    """
    try:
        reply = link.wait(REPLY_TIMEOUT)
    except EOFError:
        reply = None
    if reply is None:
        link.close()
        for fd in fds:
            os.close(fd)
        raise QueueClosed(ENDED)
    side = seated(fds, link, reply[0])
    try:
        link.send(Hello.encode(os.getpid()))
    except BrokenPipeError:
        pass  # closed by its owner meanwhile: what is left in it can still be read
    return side


def seated(fds: Sequence[int], link: Link, reply: bytes) -> WorkerSide:
    """Make a worker's side with the slot that the owner's reply names."""
    seat = Seat.decode(reply)
    try:
        side = WorkerSide(fds, link, seat.slot, seat.capacity)
    except BaseException:
        with contextlib.suppress(BrokenPipeError):
            link.send(GOODBYE)  # nobody has died
        link.close()
        raise
    side.promise(seat.sender, seat.room)
    return side
