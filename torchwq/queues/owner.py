"""The owner's side of a queue: it writes questions, reads answers, and knows who its workers are.

Invariants:

* Both ends of the queue's connection are open here until the queue is closed: ours to use, theirs to hand out. So a
  write never fails for want of a worker, and questions wait for the first one.
* Each worker's handle is a :class:`Member`: a liveness link and a slot on the board. A link that ends without a
  goodbye is a death. It is reported once, by a blocking call, after the answers that are there were handed out.
* "No worker is left" means: some had come, all have gone, no handle is pending, and no worker
  of this process was started so recently that it may still come.
* Answers are sent before a goodbye, and the kernel keeps both. So when a member is known to be gone, every answer
  it gave is in the socket.
* Questions are numbered in the order in which they enter the socket, from 1.
* ``_receiving`` covers "inbox first, then the socket", so that answers keep their order although the reactor, too,
  moves answers into the inbox while a worker is leaving: nobody has to read for a worker to be able to end.
* Lock order: ``_gate``, ``taking``, then ``_lock``, which is never held while sending. All are reentrant: a finalizer
  or a signal handler may write, read or close in the middle of anything.
* A question that was let into a queue with a ``capacity`` counts, until it has been written, as one that waits.
* As long as no other process has a handle, questions are ``inside`` and not in the socket. ``_gate`` covers "is
  it still there?" and putting a question, ``taking`` "is it still there?" and taking one; both are held while the
  questions move to the socket. They never move back.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from ..errors import QueueClosed, ResourceError, WorkerDied
from ..marshalling import codec
from ..marshalling.wire import References
from ..memory import recycling
from ..memory.anonymous import Descriptor, duplicates
from ..memory.board import LOST, SLOTS, Board
from ..memory.promises import KeptBlocks, SenderLeft
from ..transport import cleanup, kinds, reactor
from ..transport import link as links
from ..transport.capabilities import SAME_MACHINE, SAME_PROCESS
from ..transport.endpoint import Received
from ..transport.link import Link
from ..transport.mailbox import Mailbox
from ..transport.outbox import Outbox
from ..transport.trailer import BARE, KIND, PICKLE
from ..workers import threads, worker
from .failing import Failed, NeverCame
from .history import History
from .inside import Inside
from .members import Member, Notes, Side, patience
from .protocol import ADOPT, GOODBYE, IN_DOUBT, LEAVING, TOOK, FunctionFailed, Hello, Seat, kind_of
from .role import SocketRole

#: Waits for questions to be taken look at the board at least this often, in seconds.
_GLANCE: Final = 0.02
#: A question that nobody seems to have taken although the socket is empty is given up as lost after this, in seconds.
_LOST_AFTER: Final = 0.2
#: How long, in seconds, a handle that an error has closed may keep a reader from hearing that nobody is left; and a
#: worker that has failed, its error from being told.
_LONGEST_DOUBT: Final = 5.0
_LONGEST_END: Final = 1.0
_TOLD_LATELY: Final = 64
#: How many answers the reactor takes in at a time.
_AT_ONCE: Final = 256


class Owner(SocketRole, worker.EndListener):
    """The owner's role. ``on_close(owner)`` runs once, when it is closed, before its ends are."""

    def __init__(self, capacity: int | None, on_close: Callable[[Owner], None]) -> None:
        with contextlib.ExitStack() as made:  # what is to be closed again if the rest cannot be had
            reactor.get()  # which closes it when it is dropped, also if no descriptor is free then
            ours, self._theirs = kinds.pair()
            made.callback(self._theirs.close)
            super().__init__(ours, True, self._note_sent)
            made.callback(self.connection.close)
            self.board = Board()
            made.pop_all()
        self._receive = self.connection.take
        self._for_others = self.max_payload
        self.peer, self.max_payload = SAME_PROCESS, codec.UNLIMITED
        self.capacity = capacity
        self.send = self._send_here if capacity is None else self._send_if_room
        #: Questions, for threads of this process.
        self.inside = Inside()
        #: Answers of threads of this process.
        self.answers: Mailbox[Received] = Mailbox()
        #: Whether a process has a handle, which may answer, although the questions are still inside.
        self._is_opening = False
        self._gate = threading.RLock()
        self.taking = threading.RLock()
        self.someone_waits_for_room = False
        #: Questions that there is room for and that are being written, and how many there ever were.
        self._admitted: set[object] = set()
        self._admissions = 0
        self._waiting_for_room = 0
        #: Handles on their way to threads of this process, and those that they have.
        self.pending_handles = 0
        self.sides: weakref.WeakSet[Side] = weakref.WeakSet()
        self._last_side = 0
        self._is_released = False
        self.closed_ns = 0
        self._on_close = on_close
        self._receiving = threading.RLock()
        self._lock = threading.RLock()
        self._taken = threading.Condition(self._lock)
        self._last_sent = 0
        self._history = History()
        self._inbox: deque[Received] = deque()
        #: How many threads are in ``drain``, which looks at the alarm for other reasons than the inbox.
        self._draining = 0
        #: Whether the thread that has ``_receiving`` is just taking an answer out of the socket. What a finalizer or a
        #: signal handler takes meanwhile may refer to what that answer has brought: they find nothing.
        self._is_looking = False
        #: Of blocks that answers refer to without bringing them. Looked at with ``_receiving`` held.
        self._kept = KeptBlocks(References, self.board.words, LOST, self._look_aside)
        #: What the owner says to itself, in the order of the answers.
        self._to_itself = Outbox(self._theirs)
        self._members: dict[int, Member] = {}
        self._ending = 0  # members whose links ended without a goodbye, and of whom no more is known yet
        self._came = 0
        #: Slots of the board that were ever given out, and those of them that are free.
        self._slots = 0
        self._free: deque[int] = deque()
        self._taken_by_gone = 0
        self._possibly_lost = 0
        self._pids: set[object] = set()
        self._groups: set[int] = set()
        self._will_look = False
        #: What is to be told to one who waits: deaths and failures of workers.
        self._deaths: deque[WorkerDied | Failed | NeverCame] = deque()
        self._last_end = ""
        #: Whether failures are to be told; who makes a queue for his own use may hear of them otherwise.
        self.tells_failures = True
        #: What has told lately: several handles of a worker tell of the same failure.
        self._told: deque[object] = deque(maxlen=_TOLD_LATELY)
        #: Handles that were closed by an error which may be a failure; until when that hinders "nobody is left".
        self._in_doubt: dict[Member | Side, float] = {}
        worker.add_end_listener(self)
        self._opened()

    # Writing

    def _send_here(self, payload: Any) -> None:
        with self._gate:
            questions = self.inside.box
            if questions is not None:
                if self.closed:
                    raise QueueClosed(self.closed)
                self.outbox.number = self._last_sent = self._last_sent + 1
                questions.put(codec.deliver_local(payload))
                return
        self.outbox.send(codec.for_other_processes(payload, self._for_others))

    def _send_if_room(self, payload: codec.Encoded) -> None:
        question = object()
        try:
            self._wait_for_room(question)
            self._send_here(payload)
        finally:
            self._admitted.discard(question)
            if self.someone_waits_for_room:
                self.note_taken()

    def open_to_processes(self) -> None:
        """Move the questions that are here to the socket, where other processes find them. May be called again.

        Raises MarshalError or ResourceError, and changes nothing, if one of them cannot travel.
        """
        with self._gate, self.taking:
            questions = self.inside.box
            if questions is None:
                return
            waiting, payloads = [], []
            try:
                while (
                    received := questions.take()
                ) is not None:  # also what pickling, which runs any code, has written
                    waiting.append(received)
                    payloads.append(codec.for_other_processes(received[0], self._for_others))
                self._open_inner()
            except BaseException:
                for received in waiting:
                    questions.put(received)
                raise
            self.outbox.number -= len(waiting)
            self.peer, self.max_payload = SAME_MACHINE, self._for_others
            if self.capacity is None:
                self.send = self.outbox.send
            self.inside.box = None
            for payload in payloads:
                self.outbox.send(payload)
            while (received := questions.take()) is not None:  # written by a signal handler just before
                self.outbox.number -= 1
                self.outbox.send(codec.for_other_processes(received[0], self._for_others))
        for side in list(self.sides):
            side.rewatch()
        questions.end()
        questions.close()
        self.answers.wake_all()

    def _note_sent(self, number: int, data: bytes) -> None:
        self._last_sent = number
        if self._history.add(number, data):
            with self._lock:
                self._history.keep(m.slot.number for m in self._members.values() if m.slot.busy)

    def _has_room(self, question: object) -> bool:
        """Whether there is room for one more question; it is kept for this one then."""
        assert self.capacity is not None
        with self._lock:
            while True:
                before = self._admissions
                if self._untaken() + len(self._admitted) >= self.capacity:
                    return False
                if before == self._admissions:  # no finalizer or signal handler has written while this looked
                    self._admissions += 1
                    self._admitted.add(question)
                    return True

    def _wait_for_room(self, question: object) -> None:
        if self._has_room(question):
            return
        with self._taken:
            self._waiting_for_room += 1
            self.someone_waits_for_room = True
            if not self.closed:
                self.board.set_asked(True)
            try:
                while not self._has_room(question):
                    if self.closed:
                        raise QueueClosed(self.closed)
                    if self.alarm.is_set():
                        self.raise_failure()
                    self.outbox.flush()  # the reactor cannot, if a finalizer that it runs is what waits here
                    self._taken.wait(_GLANCE)
            finally:
                self._waiting_for_room -= 1
                if not self._waiting_for_room:
                    self.someone_waits_for_room = False
                    if not self.closed:
                        self.board.set_asked(False)

    def _untaken(self) -> int:
        questions = self.inside.box
        if questions is not None:
            return len(questions)
        waiting = self.outbox.number - self._last_sent
        with self._lock:
            in_socket = self._last_sent - self._count_taken() if not self.closed else 0
        if in_socket and self.end.unread_by_peer() == 0:
            in_socket = 0  # a worker died with a question that it had not noted
        return waiting + in_socket

    def _count_taken(self) -> int:
        return self._taken_by_gone + sum(member.slot.taken for member in self._members.values())

    # Reading

    def take(self) -> Received | None:
        if self.inside.box is not None and not self._inbox and not self._is_opening:
            if self.closed:
                return None
            try:
                return self.answers.pop()
            except IndexError:
                return None
        with self._receiving:
            if self._inbox:
                return self._inbox.popleft()
            if self._last_side and (answer := self.answers.take()) is not None:  # threads have, or had, handles
                return answer
            return self._take_from_socket()

    def sleep(self, deadline: float | None) -> Received | None:
        if self.inside.box is not None:
            return self.answers.wait(self.take, deadline, self._may_not_wait)
        with self._receiving:
            is_nested = self._is_looking  # nobody but a call further up this thread's stack
        return self.connection.wait(self._take_nested if is_nested else self.take, deadline)

    def _take_nested(self) -> Received | None:
        received = self.take()
        if received is None and not self.closed and self.end.peek():  # the call further up goes on when this one ends
            raise RuntimeError(
                "a finalizer or a signal handler waits for a tensor in the middle of a read of the same thread: read "
                "with nonblocking=True there"
            )
        return received

    def _may_not_wait(self) -> bool:
        return self.alarm.is_set() or bool(self.closed) or self.inside.box is None

    def has_message(self) -> bool:
        if self._inbox or self.answers.has_message():
            return True
        return super().has_message() and self._look_aside()  # it may be one that concerns the connection only

    def _look_aside(self) -> bool:
        """See ``KeptBlocks``."""
        with self._receiving, contextlib.suppress(OSError, EOFError):  # it has just been closed
            return not self._is_looking and self._kept.take_control_messages(self.end)
        return True

    def settle(self) -> None:
        with self._lock:
            self._update_alarm()

    def watch(self) -> None:
        self._readiness.set(*self.connection.filenos(), self.answers.not_empty().fileno())

    def _take_from_socket(self) -> Received | None:
        """The next answer. With ``_receiving`` held."""
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
        """The next answer, while a call further up this thread's stack may have another in hand that it has not looked
        at: one that may need what that one brings stays where it is."""
        try:
            next_one = self.end.peek()
        except (EOFError, OSError):  # it has been closed
            return None
        return self._receive() if next_one and next_one[KIND] in (BARE, PICKLE) else None

    def _absorb(self, most: float = math.inf) -> bool | None:
        """Move what is in the socket, or came from threads, to the inbox; True if there was anything."""
        if self.inside.box is not None and not self._is_opening:
            return None
        count = 0
        with self._receiving:
            while count < most and (received := self.answers.take() or self._take_from_socket()) is not None:
                self._inbox.append(received)
                count += 1
        return True if count else None

    def _absorb_for_leavers(self) -> None:
        """Make room for the last answers of a worker that is leaving; the reactor calls this while one is.

        Some at a time: the reactor calls again while there are more, and sees to others in between.
        """
        if self._absorb(_AT_ONCE):
            self.alarm.set()

    def raise_failure(self) -> None:
        with self._lock:
            if self.closed:
                raise QueueClosed(self.closed)
            death = self._deaths.popleft() if self._deaths else None
            if death is None and self._nobody_left():
                raise WorkerDied(
                    "no worker is left to answer: every worker that had opened this queue has ended or closed it"
                    + (f"; the last to die: {self._last_end}" if self._last_end else "")
                    + ". If one of them failed, join() of its map raises its error"
                )
            self._update_alarm()
        if death is not None:
            raise death if isinstance(death, WorkerDied) else death.error()

    def drain(self, timeout: float | None) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            self._draining += 1
        try:
            self._drain(timeout, deadline)
        finally:
            with self._lock:
                self._draining -= 1
                self._update_alarm()

    def _drain(self, timeout: float | None, deadline: float | None) -> None:
        mark = self.outbox.number
        quiet_since = time.monotonic()
        while True:
            if self.closed:
                raise QueueClosed(self.closed)
            if self._absorb():
                quiet_since = time.monotonic()
            if self._deaths:
                self.raise_failure()
            if self._is_drained(mark, time.monotonic() - quiet_since):
                return
            if self.alarm.is_set():
                self.raise_failure()
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                raise TimeoutError(f"the queue was not drained within {timeout} s")
            until = now + _GLANCE if deadline is None else min(now + _GLANCE, deadline)
            if self.inside.box is not None:
                self.answers.wait(lambda: self._is_drained(mark, 0) or None, until, self._may_not_wait)
            elif self.connection.wait(self._absorb, until):
                quiet_since = time.monotonic()

    def _is_drained(self, mark: int, quiet: float) -> bool:
        if self._last_sent < mark:
            return False
        questions = self.inside.box
        unread = self.end.unread_by_peer() if questions is None else len(questions)
        with self._lock:
            missing = mark - self._count_taken()
            if missing > 0 and (unread or missing > self._possibly_lost or quiet < _LOST_AFTER):
                return False
            if self._ending:
                return False
            return not any(
                member.slot.busy and (member.slot.busy > 1 or member.slot.number <= mark)
                for member in self._members.values()
            )

    # Members

    def handle_descriptors(self) -> list[Descriptor]:
        self.open_to_processes()
        ours, theirs = links.pair()
        made = [Descriptor(theirs)]
        with self._lock:
            try:
                made[:0] = duplicates([*self._theirs.handover(), self.board.fd])
            except BaseException:
                ours.close()
                raise
            self._admit(ours, None)
        return made

    def open_by_name(self, link: Link, pid: int) -> bool:
        """Hand a worker's handle to the process that asks on ``link``; False if the queue cannot be had any more."""
        with self._lock:
            if self.board.fd < 0:
                return False
            self._is_opening = self.inside.box is not None
            try:
                self._admit(link, pid, [*self._theirs.handover(), self.board.fd])
            except ResourceError:  # the link is closed, and who asks comes again
                return True
        if self.inside.box is not None:
            cleanup.call_soon(self._open_or_close)  # not in the reactor's thread, which pickles nothing
        return True

    def _open_or_close(self) -> None:
        """A process has opened the queue by its name. What cannot travel to it cannot be had any more, either."""
        try:
            self.open_to_processes()
        except Exception as error:
            warnings.warn(
                f"a queue is closed: a process has opened it, and what was written to it cannot travel there: {error}",
                RuntimeWarning,
                stacklevel=1,
            )
            self.close()

    def _admit(self, link: Link, pid: int | None, fds: Sequence[int] = ()) -> None:
        """Make the process at the other end of ``link`` a member, and tell it its slot. Takes ``link`` over."""
        with self._lock:
            if self.board.fd < 0:
                link.close()
                raise QueueClosed(self.closed)
            if self._free:
                number = self._free.popleft()
            elif self._slots < SLOTS:
                number, self._slots = self._slots, self._slots + 1
            else:
                link.close()
                raise ResourceError(0, f"a queue cannot have more than {SLOTS} handles at a time: close some")
            slot = self.board.slot(number)
            slot.clear()
            sender, room = self._kept.add_sender()
            member = Member(number, slot, link, sender=sender)
            self._members[number] = member
            if pid is not None:
                self._arrive(member, pid)
        link.watch(functools.partial(self._hear, member), functools.partial(self._lose, member))
        try:
            link.send(Seat(number, self.capacity, sender, room).encode(), fds)
        except BrokenPipeError:
            pass  # its process is gone, of which the link tells
        except BaseException:
            self._remove(member)
            raise

    def _arrive(self, member: Member, pid: int) -> None:
        member.pid = pid
        process = worker.find(pid)
        self._note_arrival(pid, None if process is None else process.group)

    def _note_arrival(self, identity: object, group: int | None) -> None:
        self._came += 1
        self._pids.add(identity)
        if group is not None:
            self._groups.add(group)
        self._update_alarm()

    # Members that are threads of this process

    def admit_here(self, notes: Notes) -> int:
        """Make a thread of this process a member; returns its number. It may come to a queue that is closed."""
        process = threads.current()
        with self.taking, self._lock:
            if self.inside.box is None and not self.closed:
                self._open_inner(wanted=True)
            self._last_side -= 1
            number = self._last_side
            self._members[number] = Member(number, notes, None)
            identity = threading.current_thread() if process is None else process.identity
            self._note_arrival(identity, None if process is None else process.group)
            return number

    def dismiss_here(self, number: int) -> None:
        member = self._members.get(number)
        if member is not None:
            self._remove(member)
        self.answers.wake_all()
        self.inside.wake(bool(self.closed))
        self.see_off()

    def _open_inner(self, wanted: bool = False) -> None:
        """Let threads of this process, if there are any, read from the socket."""
        with self._lock:
            wanted = wanted or self.pending_handles > 0 or any(number < 0 for number in self._members)
        if wanted:
            self.inside.open_end(self._theirs.handover())

    def count_pending(self, number: int) -> None:
        """See ``HandleRef``."""
        with self.taking:
            self.pending_handles += number
            if number > 0 and self.inside.box is None and not self.closed:
                self._open_inner()
            if number < 0:
                self.see_off()

    def see_off(self) -> None:
        """Let go of what only threads of this process need, if none of them is left."""
        with self.taking, self._lock:
            if self.pending_handles or any(number < 0 for number in self._members):
                return
            self.inside.close(bool(self.closed))
            if self._is_released and self.board.fd >= 0:
                self.release()

    def note_taken(self) -> None:
        with self._taken:
            self._taken.notify_all()

    def _hear(self, member: Member, data: bytes, fds: list[int]) -> None:
        what = kind_of(data)
        if what == TOOK:
            with self._taken:
                self._taken.notify_all()
        elif what == Hello.KIND:
            with self._lock:
                self._arrive(member, Hello.decode(data))
        elif what == ADOPT and fds:
            try:
                self._admit(Link(fds.pop()), None)
            except (QueueClosed, ResourceError):
                pass  # the other end of that link sees it close
        elif what == LEAVING:
            with self._lock:
                member.leaving = True
                self._watch_for_leavers()
        elif what == GOODBYE:
            self._remove(member)
        elif what == IN_DOUBT:
            self.doubt(member)  # first: else a reader finds, in between, that nobody is left
            member.in_hand = self._remove(member, keep_link=True)
        elif what == FunctionFailed.KIND and member.pid is not None:
            in_hand = member.in_hand or self.in_hand_of(member.number, member)
            self.note_failure(Failed(worker.find(member.pid), member.pid, in_hand, FunctionFailed.decode(data)))
        for fd in fds:
            os.close(fd)

    def _remove(self, member: Member, keep_link: bool = False) -> str:
        """Forget a member; returns what it had in hand."""
        with self._lock:
            if self._members.get(member.number) is not member:
                return ""
            del self._members[member.number]
            in_hand = ""
            if not self.closed:
                self._taken_by_gone += member.slot.taken
                if member.slot.busy:
                    in_hand = self._history.describe(member.slot.number)
                if member.number >= 0:
                    self._free.append(member.number)
            self._update_alarm()
            self._watch_for_leavers()
            self._taken.notify_all()
        if member.sender:
            self._to_itself.send_control(SenderLeft(member.sender))  # behind all that it has sent
            self._kept.schedule_poll()
        if member.link is not None and not keep_link:
            member.link.close()
        return in_hand

    def _watch_for_leavers(self) -> None:
        leaving = any(member.leaving for member in self._members.values())
        self.connection.watch(self._absorb_for_leavers if leaving else None)

    def _lose(self, member: Member) -> None:
        """The process behind a link is gone and has not said goodbye."""
        with self._lock:
            self.doubt_is_over(member)
            known = self._members.get(member.number) is member
            recycling.expire_in_flight()
            if known and member.pid is not None:
                self._ending += 1
                self._possibly_lost += 1
        in_hand = self._remove(member)
        if not known or member.pid is None:
            return
        process = worker.find(member.pid)
        if process is None:
            self._report(worker.death_error(pid=member.pid, in_hand=in_hand))
        else:
            process.add_end_callback(lambda ended: self._report(ended.death_error(in_hand)))

    def _report(self, death: Exception) -> None:
        assert isinstance(death, WorkerDied)
        with self._lock:
            self._ending -= 1
            self._deaths.append(death)
            self._last_end = str(death)
            self._update_alarm()
            self._taken.notify_all()

    # Failures

    def doubt(self, who: Member | Side) -> None:
        """It was closed by an error that may turn out to be a failure of its worker."""
        with self._lock:
            if not self.closed:
                self._in_doubt[who] = time.monotonic() + _LONGEST_DOUBT
                reactor.get().call_later(_LONGEST_DOUBT, self._look_again)

    def doubt_is_over(self, who: Member | Side) -> None:
        with self._lock:
            if self._in_doubt.pop(who, None) is not None:
                if isinstance(who, Member) and who.link is not None:
                    who.link.close()
                self._update_alarm()
                self._taken.notify_all()

    def in_hand_of(self, number: int, who: Member | None = None) -> str:
        with self._lock:
            member = self._members.get(number)
            if member is None or not member.slot.busy or (who is not None and who is not member):
                return ""
            return self._history.describe(member.slot.number)

    def note_failure(self, failed: Failed) -> None:
        """A worker that has this queue open has failed; it is told when it has ended, so that its error is known."""
        failure, process = failed.failure, failed.process
        with self._lock:
            identity = (
                failed.pid,
                failure.number,
            )  # not the failure itself: its error may refer to a handle on this queue
            if self.closed or not self.tells_failures or identity in self._told:
                return
            self._told.append(identity)
            self._ending += 1
        if process is None:
            self._tell_failure(failed)
            return
        process.error_will_be_retrieved = True
        once = functools.partial(self._tell_failure, failed, deque([failed]))
        if failure.ends:
            process.add_end_callback(lambda _: once())
            reactor.get().call_later(_LONGEST_END, once)
        else:
            once()

    def _tell_failure(self, failed: Failed, unless_told: deque[Failed] | None = None) -> None:
        with self._lock:
            if unless_told is not None:
                if not unless_told:
                    return
                unless_told.clear()
            self._ending -= 1
            self._deaths.append(failed)
            self._last_end = failed.summary()
            self._update_alarm()
            self._taken.notify_all()
        self.answers.wake_all()

    def on_worker_end(self, process: worker.Worker) -> None:
        """A worker that failed before it opened this queue, while no other has come or is there, will not answer."""
        with self._lock:
            self._pids.discard(process.identity)
            if self.closed:
                return
            self._update_alarm()
            if self._came or process.exitcode == 0 or worker.active_workers():
                return
            self._deaths.append(NeverCame(process))
            self._update_alarm()

    def _nobody_left(self) -> bool:
        if not self._came or self._ending or self._members or self.pending_handles or self._is_in_doubt():
            return False
        return not self._expected()

    def _is_in_doubt(self) -> bool:
        now = time.monotonic()
        return any(until > now for until in self._in_doubt.values())

    def _expected(self) -> bool:
        """Whether a worker may still be on its way; if so, the alarm is looked at again when it should have come."""
        seconds = patience(self._pids, self._groups)
        if seconds > 0 and not self._will_look:
            self._will_look = True
            reactor.get().call_later(seconds, self._look_again)
        return seconds > 0

    def _look_again(self) -> None:
        with self._lock:
            self._will_look = False
            if not self.closed:
                self._update_alarm()

    def _update_alarm(self) -> None:
        if self.closed or self._deaths or self._nobody_left():
            self.alarm.set()
            self.answers.wake_all()
        else:
            self.alarm.clear()
            if (self._inbox and not self._draining) or (self.inside.box is None and len(self.answers)):
                self.alarm.set()  # so the readiness shows what is here

    # Closing

    def close(self) -> None:
        questions = self.inside.box
        may_go = self.pending_handles or any(not each.peer.same_process for each in worker.active_workers())
        if not self.closed and questions and may_go:
            try:
                self.open_to_processes()  # one that is on its way to it may be a process, or go on to one
            except Exception:
                pass  # then only threads of this process can read what is left
        with self._lock:
            if self.closed:
                return
            self.closed = "the queue is closed"
            self.closed_ns = time.monotonic_ns()
            members = [member for member in self._members.values() if member.number >= 0]
            self._members = {number: member for number, member in self._members.items() if number < 0}
            self._history.clear()
            unread, self._inbox = self._inbox, deque()
            members += [each for each in self._in_doubt if isinstance(each, Member)]
            self._in_doubt.clear()
            self._deaths.clear()
            self._taken.notify_all()
        for message in unread:  # not under the lock: it takes that of the memory
            codec.discard(*message)
        with self._receiving:
            self._kept.close()
        while self.answers.take() is not None:
            pass
        self.answers.wake_all()
        self.inside.wake(bool(self.closed))
        self._on_close(self)
        recycling.expire_in_flight()
        self.connection.stop_waiting()
        for member in members:
            if member.link is not None:
                member.link.close()
        self.connection.watch(None)
        try:
            self.end.stop_receiving()
        except OSError:
            pass  # nobody holds the other end any more
        self._retire()
        self.answers.close()
        self.see_off()
        self.connection.close_when_sent()

    def has_leftovers(self) -> bool:
        """Whether questions are still in the socket, or on their way to it, that nobody has taken."""
        return bool(len(self.outbox) or self.end.unread_by_peer())

    def release(self) -> None:
        """Close what late comers could still have been handed, as soon as none is under way in this process."""
        with self._lock:
            self._is_released = True
            if self.pending_handles:
                return
            self._to_itself.close()
            self._theirs.close()
            self.board.close()
            for member in self._members.values():
                if member.link is not None:
                    member.link.close()
            self._members = {number: member for number, member in self._members.items() if number < 0}

    def awaited(self) -> str:
        written, untaken, handles = self.counts()
        return f"no answer ({written} questions written, {untaken} not taken yet, {handles} workers' handles open)"

    def counts(self) -> tuple[int, int, int]:
        """Questions written, of these not yet taken, and workers' handles."""
        return self.outbox.number, 0 if self.closed else self._untaken(), len(self._members)
