"""A worker's side of a queue, in the process of its owner: questions and answers pass without a socket.

As long as no other process has a handle, questions wait in the owner's mailbox. Once one has, they wait in the socket
that all workers share, and these read from it too. Answers always go straight to the owner.

Invariants are those of ``worker``: each question taken is noted before it is handed out, in the order of the questions,
and a thread is busy from taking a question until it answers, takes another, or ends. The notes are here instead of on
the counters, and ``Questions.taking`` is the lock over taking and noting, for all these sides together.
"""

from __future__ import annotations

import threading
from _thread import get_ident

from ..errors import QueueClosed
from ..marshalling import codec
from ..memory.anonymous import Descriptor
from ..transport.capabilities import SAME_PROCESS
from ..transport.endpoint import Received
from ..workers import threads
from ..workers.failures import Failure
from ..workers.thread_exit import ThreadExitHook
from .failing import Failed
from .members import Notes
from .owner import Owner
from .role import CLOSED_HERE, ENDED, Role


class ThreadSide(Role):
    """A worker's role, for threads of the owner's process."""

    peer = SAME_PROCESS
    max_payload = codec.UNLIMITED

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self.capacity = owner.capacity
        self.notes = Notes()
        self.written = 0
        self._busy = self.notes.busy_threads
        self._known: set[int] = set()
        self._threads = threading.local()
        super().__init__()
        self.number = owner.add_thread(self.notes)
        owner.sides.add(self)
        self._failures = threads.current_failures()
        self._failures.add(self)
        self._is_in_doubt = False
        self._opened()

    def take(self) -> Received | None:
        owner, ident, notes = self.owner, get_ident(), self.notes
        questions = owner.questions
        with questions.taking:
            if self.closed:
                return None
            received = questions.take_numbered()
            if received is None:
                if questions.is_over():
                    self.closed = ENDED
                return None
            notes.number = questions.number_taken
            notes.taken += 1
            self._busy.add(ident)
        if ident not in self._known:
            self._known.add(ident)
            self._threads.exit_hook = ThreadExitHook(self, ident)
        if questions.room is not None:
            questions.room.made()
        return received

    def send(self, payload: codec.Encoded) -> None:
        owner = self.owner
        if self.closed or owner.closed:
            raise self.closed_error()
        owner.answers.put(payload)
        self.written += 1
        self._busy.discard(get_ident())

    def on_thread_exit(self, ident: int) -> None:
        self._known.discard(ident)
        self._busy.discard(ident)
        self.owner.answers.wake_all()  # drain looks at who is busy

    def sleep(self, deadline: float | None) -> Received | None:
        return self.owner.questions.wait(self.take, deadline, lambda: self.closed or self.owner.closed)

    def may_raise(self) -> bool:
        return bool(self.closed) or self.owner.questions.is_over()

    def raise_failure(self) -> None:
        if self.closed:
            raise QueueClosed(self.closed)

    def handle_descriptors(self) -> list[Descriptor]:
        return self.owner.handle_descriptors()

    def has_message(self) -> bool:
        return self.owner.questions.can_take()

    def fileno(self) -> int:
        with self.owner.questions.taking:  # else the questions move in between, and the move does not see who watches
            return super().fileno()

    def watch(self) -> None:
        self._readiness.set(*self.owner.questions.filenos())

    def rewatch(self) -> None:
        """Questions come from elsewhere now."""
        if self._readiness.is_watched:
            self.watch()

    def close(self, in_doubt: bool = False) -> None:
        with self.owner.questions.taking:
            if self.closed == CLOSED_HERE:
                return
            self.closed = CLOSED_HERE
        self._failures.remove(self)
        if in_doubt and self._failures.mark_in_doubt(self):
            self._is_in_doubt = True
            self.owner.troubles.doubt(self, self.notes)
        self.owner.remove_thread(self.number)
        self._retire()

    def worker_failed(self, failure: Failure) -> None:
        worker = threads.current()
        self.owner.troubles.note_failure(Failed(worker, None, self.owner.members.in_hand(self.number), failure))
        self.worker_succeeded()

    def worker_succeeded(self) -> None:
        if self._is_in_doubt:
            self.owner.troubles.doubt_is_over(self)

    @property
    def unsent(self) -> int:
        return 0

    @property
    def last_taken(self) -> int:
        """Which of the owner's questions this handle has taken last; they count from 1."""
        return self.notes.number
