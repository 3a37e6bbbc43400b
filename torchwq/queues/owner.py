"""The owner's side of a queue: it writes questions, reads answers, and knows who its workers are.

This file puts the parts together: ``questions`` and ``answers``, each a pipe, ``membership``, and ``troubles``.
Invariants:

* Both ends of the queue's connection are open here until the queue is closed: the owner uses one, and hands the other
  out. So a write never fails for want of a worker, and questions wait for the first one.
* The alarm of the connection is set while there is something to tell, or an answer that no descriptor tells of.
* Lock order: the lock of the questions' pipe, ``questions.taking``, then ``_lock``, which is never held while questions
  are sent. All are reentrant: a finalizer or a signal handler may write, read or close in the middle of anything.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Final

from ..errors import QueueClosed, ResourceError, WorkerDied
from ..marshalling import codec
from ..memory import recycling
from ..memory.anonymous import Descriptor, duplicates
from ..pipe.pipe import Pipe
from ..transport import cleanup, kinds, reactor
from ..transport import link as links
from ..transport.capabilities import SAME_MACHINE, SAME_PROCESS
from ..transport.endpoint import Received
from ..transport.link import Link
from ..workers import threads, worker
from .answers import AnswerSocket
from .counters import LOST, Counters
from .members import Member, Notes, Side
from .membership import Membership
from .questions import Questions
from .role import SocketRole
from .troubles import Troubles

#: How many answers the reactor takes in at a time.
_AT_ONCE: Final = 256


class Owner(SocketRole):
    """The owner's role. ``on_close(owner)`` runs once, when it is closed, before its ends are."""

    def __init__(self, capacity: int | None, on_close: Callable[[Owner], None], name: str = "") -> None:
        self.capacity = capacity
        self._lock = threading.RLock()
        with contextlib.ExitStack() as made:  # what is to be closed again if the rest cannot be had
            reactor.get()  # which closes it when it is dropped, also if no descriptor is free then
            ours, self._theirs = kinds.pair()
            made.callback(self._theirs.close)
            made.callback(ours.close)
            self.counters = Counters(name=name)
            made.callback(self.counters.close)
            self.troubles = Troubles(self._lock, self._changed)
            self.members = Membership(self, self._lock, self.counters, self.troubles, self._changed)
            self.questions = Questions(capacity, self.counters, self.members)
            super().__init__(ours, True, self.questions.history.note_sent)
            made.pop_all()
        self.questions.connect(self.connection, self._theirs)
        self.describe = self.questions.describe
        self._for_others = self.max_payload
        self.peer, self.max_payload = SAME_PROCESS, codec.UNLIMITED
        self.send = self._send if capacity is None else self._send_if_room
        #: Answers: of threads of this process, and of others.
        self.answers: Pipe[AnswerSocket] = Pipe()
        self._answer_socket = AnswerSocket(self.connection, self._theirs, self.counters.words, LOST)
        self.add_sender = self._answer_socket.add_sender
        self.sides: weakref.WeakSet[Side] = weakref.WeakSet()
        #: How many threads are in ``absorbing``: they look at the alarm for other reasons than the inbox.
        self._absorbing = 0
        self._is_released = False
        self.closed_ns = 0
        self._on_close = on_close
        worker.add_end_listener(self.members)
        self._opened()

    # Writing

    def _send(self, payload: codec.Encoded) -> bool:
        """Always True."""
        if self.closed:
            raise QueueClosed(self.closed)
        was_put = self.questions.put_if_local(payload)
        if was_put is None:
            self.outbox.send(codec.for_other_processes(payload, self._for_others))
        elif not was_put:
            raise QueueClosed(self.closed)
        return True

    def _send_if_room(self, payload: codec.Encoded, deadline: float | None = None) -> None:
        room = self.questions.room
        assert room is not None
        send = functools.partial(self._send, payload)
        if room.try_write(send) is None:
            room.write(send, self._look_for_room, deadline)

    def send_within(self, payload: codec.Encoded, deadline: float) -> None:
        if self.capacity is None:
            self.send(payload)
        else:
            self._send_if_room(payload, deadline)

    def _look_for_room(self) -> None:
        """A write waits for room: raise what is to be told, if anything."""
        if self.alarm.is_set():
            self.raise_failure()
        self.outbox.flush()  # the reactor cannot, if a finalizer that it runs is what waits here

    # Other processes

    def open_to_processes(self) -> None:
        """Move the questions to the socket, where other processes find them. May be called again.

        Raises MarshalError or ResourceError, and changes nothing, if one of them cannot travel.
        """
        questions = self.questions
        with questions.lock, questions.taking:
            if not questions.is_local:
                return
            if not questions.move_to_socket():  # it is just moving: a question has this queue in it
                return
            # Whoever encodes looks up ``send`` before ``peer``.
            self.peer, self.max_payload = SAME_MACHINE, self._for_others
            if self.capacity is None:
                self.send = self.outbox.send
        self.answers.carry(self._answer_socket)
        for side in list(self.sides):
            side.rewatch()
        questions.box.end()
        questions.box.close()

    def handle_descriptors(self) -> list[Descriptor]:
        self.open_to_processes()
        self.answers.carry(self._answer_socket)
        ours, theirs = links.pair()
        made = [Descriptor(theirs)]
        with self._lock:
            try:
                made[:0] = duplicates(self.questions.handover())
            except BaseException:
                ours.close()
                raise
            self.members.add(ours, None)
        return made

    def open_by_name(self, link: Link, pid: int) -> bool:
        """Hand a worker's handle to the process that asks on ``link``; False if the queue cannot be had any more."""
        with self._lock:
            if self.counters.fd < 0:
                return False
            self.answers.carry(self._answer_socket)
            try:
                self.members.add(link, pid, self.questions.handover())
            except ResourceError:  # the link is closed, and who asks comes again
                link.close()
                return True
        if self.questions.is_local:
            # Not in the reactor's thread, which pickles nothing.
            cleanup.call_soon(functools.partial(_open_or_close, self))
        return True

    # Threads of this process

    def add_thread(self, notes: Notes) -> int:
        """Make a thread of this process a member; returns its number. It may come to a queue that is closed."""
        with self.questions.taking:
            if not self.questions.is_local and not self.closed:
                self.questions.socket.open_reader()
            return self.members.add_thread(notes, threads.current())

    def remove_thread(self, number: int) -> None:
        """A thread of this process has no handle any more."""
        self.members.remove_thread(number)
        self.questions.wake_all()
        self._close_for_threads()

    def count_pending(self, number: int) -> None:
        """See ``HandleRef``."""
        with self.questions.taking:
            self.members.pending_handles += number
            if number > 0 and not self.questions.is_local and not self.closed:
                self.questions.socket.open_reader()
            if number < 0:
                self._close_for_threads()

    def _close_for_threads(self) -> None:
        """Close what only threads of this process need, if none of them is left."""
        with self.questions.taking, self._lock:
            if self.members.any_threads:
                return
            if self.closed:
                self.questions.discard()
            self.questions.socket.close_reader(is_closed=bool(self.closed))
            if self._is_released and self.counters.fd >= 0:
                self.release()

    # Reading

    def take(self) -> Received | None:
        if self.closed:
            return None
        answers = self.answers
        if answers.box.messages:
            return answers.take()
        carrier = answers.carrier  # as Pipe.take has it, without calling it
        return None if carrier is None else carrier.take()

    def sleep(self, deadline: float | None) -> Received | None:
        return self.answers.wait(self.take, deadline, self.may_not_wait)

    def may_not_wait(self) -> bool:
        """Whether who waits for an answer has to look at something else."""
        return self.alarm.is_set() or bool(self.closed)

    def has_message(self) -> bool:
        return self.answers.can_take()

    def watch(self) -> None:
        self._readiness.set(*self.connection.filenos(), self.answers.box.not_empty().fileno())

    def settle(self) -> None:
        with self._lock:
            self._update_alarm()

    def raise_failure(self) -> None:
        with self._lock:
            if self.closed:
                raise QueueClosed(self.closed)
            trouble = self.troubles.next()
            if trouble is None and self.members.nobody_left():
                last = self.troubles.last_end
                raise WorkerDied(
                    "no worker is left to answer: every worker that had opened this queue has ended or closed it"
                    + (f"; the last to die: {last}" if last else "")
                    + ". If one of them failed, join() of its map raises its error"
                )
            self._update_alarm()
        if trouble is not None:
            raise trouble.error()

    def _changed(self) -> None:
        """Something has happened that may concern one who waits. With the lock held."""
        self._update_alarm()
        if self.questions.room is not None:
            self.questions.room.wake_all()

    def _update_alarm(self) -> None:
        if self.closed or self.troubles.any_to_tell or self.members.nobody_left():
            self.alarm.set()
            self.answers.wake_all()
        else:
            self.alarm.clear()
            if self._answer_socket.has_inbox and not self._absorbing:
                self.alarm.set()  # so the readiness shows what is here

    @contextlib.contextmanager
    def absorbing(self) -> Iterator[None]:
        """Within this, this thread moves answers out of the socket: those that are here already do not wake it."""
        with self._lock:
            self._absorbing += 1
        try:
            yield
        finally:
            with self._lock:
                self._absorbing -= 1
                self._update_alarm()

    # What members want of their owner

    def member_left(self, member: Member) -> None:
        """See ``membership``."""
        if member.sender:
            self._answer_socket.sender_left(member.sender)

    def make_room_for_answers(self, *, wanted: bool) -> None:
        """See ``membership``."""
        self.connection.watch(self._absorb_for_leavers if wanted else None)

    def _absorb_for_leavers(self) -> None:
        """Make room for the last answers of a worker that is leaving; the reactor calls this while one is.

        Some at a time: the reactor calls again while there are more, and sees to others in between.
        """
        if self._answer_socket.absorb(_AT_ONCE):
            self.alarm.set()

    # Closing

    def close(self) -> None:
        may_go = self.members.pending_handles or any(not each.peer.same_process for each in worker.active_workers())
        if not self.closed and self.questions.box.messages and may_go:
            try:
                self.open_to_processes()  # one that is on its way to it may be a process, or go on to one
            except Exception:
                pass  # then only threads of this process can read what is left
        with self._lock:
            if self.closed:
                return
            self.closed = "the queue is closed"
            self.closed_ns = time.monotonic_ns()
            links_left = self.members.close() + self.troubles.close()
        self._answer_socket.close()
        self.answers.close()
        self.answers.discard()
        self.questions.close()
        self._on_close(self)
        recycling.expire_in_flight()
        self.connection.stop_waiting()
        for member in links_left:
            if member.link is not None:
                member.link.close()
        self.connection.watch(None)
        try:
            self.end.stop_receiving()
        except OSError:
            pass  # nobody holds the other end any more
        self._retire()
        self._close_for_threads()
        self.connection.close_when_sent()

    def abandon(self) -> None:
        super().abandon()
        self.send = self._send  # which raises; a child must not wait for room

    def has_leftovers(self) -> bool:
        """Whether questions are still in the socket, or on their way to it, that nobody has taken."""
        return bool(len(self.outbox) or self.end.unread_by_peer())

    def release(self) -> None:
        """Close what late comers could still have been handed, as soon as none is under way in this process."""
        with self._lock:
            self._is_released = True
            if self.members.pending_handles:
                return
            self._answer_socket.end()
            self._theirs.close()
            self.questions.release()
            self.counters.close()
            for member in self.members.close():
                if member.link is not None:
                    member.link.close()

    def awaited(self) -> str:
        written, untaken, handles = self.counts()
        return f"no answer ({written} questions written, {untaken} not taken yet, {handles} workers' handles open)"

    def counts(self) -> tuple[int, int, int]:
        """Questions written, of these not yet taken, and workers' handles."""
        return self.questions.count, 0 if self.closed else self.questions.count_untaken(), len(self.members)


def _open_or_close(owner: Owner) -> None:
    """A process has opened the queue by its name. What cannot travel to it cannot be had any more, either."""
    try:
        owner.open_to_processes()
    except Exception as error:
        warnings.warn(
            f"a queue is closed: a process has opened it, and what was written to it cannot travel there: {error}",
            RuntimeWarning,
            stacklevel=1,
        )
        owner.close()
