"""The owner's side of a queue: it writes questions, reads answers, and knows who its workers are.

Invariants:

* Both ends of the queue's connection are open here until the queue is closed: ours to use, theirs to hand out. So a
  write never fails for want of a worker, and questions wait for the first one.
* Each worker's handle is a :class:`Member`: a liveness link and a slot on the board. A link that ends without a
  goodbye is a death. It is reported once, by a blocking call, after the answers that are there were handed out.
* "No worker is left" means: some had come, all have gone, no ticket for a handle is under way, and no worker
  of this process was started so recently that it may still come.
* Answers are sent before a goodbye, and the kernel keeps both. So when a member is known to be gone, every answer
  it gave is in the socket.
* Questions are numbered in the order in which they enter the socket, from 1.
* ``_receiving`` covers "inbox first, then the socket", so that answers keep their order although the reactor, too,
  moves answers into the inbox while a worker is leaving: nobody has to read for a worker to be able to end.
* Lock order: the outbox's lock, then ``_lock``. ``_lock`` is never held while sending on the queue.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from ..errors import QueueClosed, ResourceError, WorkerDied
from ..marshalling import codec
from ..memory import recycling
from ..memory.anonymous import Descriptor
from ..memory.board import SLOTS, Board
from ..memory.parcel import Parcel
from ..transport import endpoint, reactor
from ..transport import link as links
from ..transport.endpoint import Received
from ..transport.link import Link
from ..workers import deaths, worker
from .history import History
from .members import Member, patience
from .protocol import ADOPT, GOODBYE, HELLO, LEAVING, SLOT, TOOK
from .role import Role, open_roles

#: Waits for questions to be taken look at the board at least this often, in seconds.
_GLANCE: Final = 0.02
#: A question that nobody seems to have taken although the socket is empty is given up as lost after this, in seconds.
_LOST_AFTER: Final = 0.2


class Owner(Role, worker.EndListener):
    """The owner's role. ``on_close(owner)`` runs once, when it is closed, before its ends are."""

    def __init__(self, capacity: int | None, on_close: Callable[[Owner], None]) -> None:
        ours, self._theirs = endpoint.pair()
        super().__init__(ours, True, self._note_sent, threading.Lock())
        self._receive = ours.try_receive
        self.capacity = capacity
        if capacity is not None:
            self.send = self._send_if_room
        self.board = Board()
        self._on_close = on_close
        self._receiving = threading.Lock()
        self._lock = threading.RLock()
        self._taken = threading.Condition(self._lock)
        self._last_sent = 0
        self._history = History()
        self._inbox: deque[Received] = deque()
        self._absorbed = 0  # how many were ever in the inbox
        self._members: dict[int, Member] = {}
        self._ending = 0  # members whose links ended without a goodbye, and of whom no more is known yet
        self._came = 0
        self._free = deque(range(64))
        self._taken_by_gone = 0
        self._possibly_lost = 0
        self._pids: set[int] = set()
        self._groups: set[int] = set()
        self._will_look = False
        self._deaths: deque[WorkerDied] = deque()
        self._last_end = ""
        worker.listen(self)
        recycling.add_inlet(self)

    # Writing

    def _send_if_room(self, payload: bytes | Parcel) -> None:
        self._wait_for_room()
        self.outbox.send(payload)

    def _note_sent(self, number: int, data: bytes) -> None:
        self._last_sent = number
        if self._history.add(number, data):
            with self._lock:
                self._history.keep(m.slot.number for m in self._members.values() if m.slot.busy)

    def _wait_for_room(self) -> None:
        assert self.capacity is not None
        if self._untaken() < self.capacity:
            return
        with self._taken:
            self.board.set_asked(True)
            try:
                while not self.closed and self._untaken() >= self.capacity:
                    if self.alarm.is_set():
                        self.raise_trouble()
                    self._taken.wait(_GLANCE)
            finally:
                if not self.closed:
                    self.board.set_asked(False)

    def _untaken(self) -> int:
        waiting = self.outbox.number - self._last_sent
        with self._lock:
            in_socket = self._last_sent - self._count_taken() if not self.closed else 0
        if in_socket and self.end.unread() == 0:
            in_socket = 0  # a worker died with a question that it had not noted
        return waiting + in_socket

    def _count_taken(self) -> int:
        return self._taken_by_gone + sum(member.slot.taken for member in self._members.values())

    # Reading

    def take(self) -> Received | None:
        with self._receiving:
            if self._inbox:
                return self._inbox.popleft()
            return self._take_from_socket()

    def _take_from_socket(self) -> Received | None:
        try:
            return self._receive()
        except EOFError:
            return None  # closed by another thread; the caller looks at that

    def _absorb(self) -> bool | None:
        """Move what is in the socket to the inbox; True if there was anything."""
        found = None
        with self._receiving:
            while (received := self._take_from_socket()) is not None:
                self._inbox.append(received)
                self._absorbed += 1
                found = True
        return found

    def mark(self) -> list[int]:
        """See ``recycling.Inlet``: first for the socket; once that has been passed, for the inbox behind it."""
        return [self.end.mark()]

    def has_passed(self, mark: list[int]) -> bool:
        """Whether all answers that were here then were handed out; one that is just being taken may be overlooked."""
        if self.closed:
            return True
        if len(mark) == 1:
            if not self.end.has_passed(mark[0]):
                return False
            mark.append(self._absorbed)
        return self._absorbed - len(self._inbox) >= mark[1]

    def _absorb_for_leavers(self) -> None:
        """Make room for the last answers of a worker that is leaving; the reactor calls this while one is."""
        if self._absorb():
            self.alarm.set()

    def raise_trouble(self) -> None:
        with self._lock:
            if self.closed:
                raise QueueClosed(self.closed)
            if self._deaths:
                death = self._deaths.popleft()
                self._update_alarm()
                raise death
            if self._nobody_left():
                raise WorkerDied(
                    "no worker is left to answer: every worker that had opened this queue has ended or closed it"
                    + (f"; the last to die: {self._last_end}" if self._last_end else "")
                    + ". If one of them failed, join() of its map raises its error"
                )
            self._update_alarm()

    def drain(self, timeout: float | None) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        mark = self.outbox.number
        quiet_since = time.monotonic()
        while True:
            if self.closed:
                raise QueueClosed(self.closed)
            if self._absorb():
                quiet_since = time.monotonic()
            if self._deaths:
                self.raise_trouble()
            if self._is_drained(mark, time.monotonic() - quiet_since):
                return
            if self.alarm.is_set():
                self.raise_trouble()
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                raise TimeoutError(f"the queue was not drained within {timeout} s")
            if self.waiter.wait(self._absorb, now + _GLANCE if deadline is None else min(now + _GLANCE, deadline)):
                quiet_since = time.monotonic()

    def _is_drained(self, mark: int, quiet: float) -> bool:
        if self._last_sent < mark:
            return False
        unread = self.end.unread()
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

    def ticket(self) -> list[Descriptor]:
        ours, theirs = links.pair()
        with self._lock:
            tickets = [Descriptor(theirs)]
            self._admit(ours, None)
            return [Descriptor(os.dup(fd)) for fd in (*self._theirs.handover(), self.board.fd)] + tickets

    def open_by_name(self, link: Link, pid: int) -> bool:
        """Hand a worker's handle to the process that asks on ``link``; False if the queue cannot be had any more."""
        with self._lock:
            if self.board.fd < 0:
                return False
            try:
                self._admit(link, pid, [*self._theirs.handover(), self.board.fd])
            except (BrokenPipeError, ResourceError):
                link.close()
            return True

    def _admit(self, link: Link, pid: int | None, fds: Sequence[int] = ()) -> None:
        """Make the process at the other end of ``link`` a member, and tell it its slot. Takes ``link`` over."""
        with self._lock:
            if self.closed and not fds:
                link.close()
                raise QueueClosed(self.closed)
            if not self._free:
                next_free = len(self._members)
                if next_free >= SLOTS:
                    link.close()
                    raise ResourceError(f"a queue cannot have more than {SLOTS} handles at a time: close some")
                self._free.extend(range(next_free, min(2 * next_free, SLOTS)))
            number = self._free.popleft()
            member = Member(number, self.board.slot(number), link)
            member.slot.clear()
            self._members[number] = member
            if pid is not None:
                self._arrive(member, pid)
        link.watch(functools.partial(self._hear, member), functools.partial(self._lose, member))
        capacity = -1 if self.capacity is None else self.capacity
        link.send(SLOT.pack(b"Q", number, capacity, recycling.slot()), fds)

    def _arrive(self, member: Member, pid: int) -> None:
        member.pid = pid
        self._came += 1
        self._pids.add(pid)
        process = worker.find(pid)
        if process is not None:
            self._groups.add(process.group)
        self._update_alarm()

    def _hear(self, member: Member, data: bytes, fds: list[int]) -> None:
        what = data[:1]
        if what == TOOK:
            with self._taken:
                self._taken.notify_all()
        elif what == b"H":
            with self._lock:
                self._arrive(member, HELLO.unpack(data)[1])
        elif what == ADOPT and fds:
            try:
                self._admit(Link(fds.pop()), None)
            except (QueueClosed, ResourceError, BrokenPipeError):
                pass  # the other end of that link sees it close
        elif what == LEAVING:
            with self._lock:
                member.leaving = True
                self._watch_for_leavers()
        elif what == GOODBYE:
            self._remove(member)
        for fd in fds:
            os.close(fd)

    def _remove(self, member: Member) -> str:
        """Forget a member; returns what it had in hand."""
        with self._lock:
            if self._members.pop(member.number, None) is None:
                return ""
            in_hand = ""
            if not self.closed:
                self._taken_by_gone += member.slot.taken
                if member.slot.busy:
                    in_hand = self._history.describe(member.slot.number)
                self._free.append(member.number)
            self._update_alarm()
            self._watch_for_leavers()
            self._taken.notify_all()
        member.link.close()
        return in_hand

    def _watch_for_leavers(self) -> None:
        if self.end.fileno() >= 0:
            leaving = any(member.leaving for member in self._members.values())
            reactor.get().set_reader(self.end.fileno(), self._absorb_for_leavers if leaving else None)

    def _lose(self, member: Member) -> None:
        """The process behind a link is gone and has not said goodbye."""
        with self._lock:
            known = member.number in self._members
            recycling.suspect_losses()
            if known and member.pid is not None:
                self._ending += 1
                self._possibly_lost += 1
        in_hand = self._remove(member)
        if not known or member.pid is None:
            return
        process = worker.find(member.pid)
        if process is None:
            self._report(deaths.died(pid=member.pid, in_hand=in_hand))
        else:
            process.when_ended(lambda ended: self._report(ended.died(in_hand)))

    def _report(self, death: Exception) -> None:
        assert isinstance(death, WorkerDied)
        with self._lock:
            self._ending -= 1
            self._deaths.append(death)
            self._last_end = str(death)
            self._update_alarm()
            self._taken.notify_all()

    def worker_ended(self, process: worker.Worker) -> None:
        """A worker that failed before it opened this queue, while no other has come or is there, will not answer."""
        with self._lock:
            if self.closed:
                return
            self._update_alarm()
            if self._came or process.exitcode == 0 or worker.living():
                return
            death = process.died()
            assert isinstance(death, WorkerDied)
            death.args = (
                f"{death}. It had not opened this queue, and no other worker is there; join() of its map tells more",
            )
            self._deaths.append(death)
            self._update_alarm()

    def _nobody_left(self) -> bool:
        return self._came > 0 and not self._ending and not self._members and not self._expected()

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
        else:
            self.alarm.clear()

    # Closing

    def close(self) -> None:
        with self._lock:
            if self.closed:
                return
            self.closed = "the queue is closed"
            members, self._members = list(self._members.values()), {}
            self._history.clear()
            unread, self._inbox = self._inbox, deque()
            self._taken.notify_all()
        for message in unread:  # not under the lock: it takes that of the memory
            codec.discard(*message)
        self._on_close(self)
        recycling.suspect_losses()
        self.waiter.close()
        for member in members:
            member.link.close()
        reactor.get().set_reader(self.end.fileno(), None)
        try:
            self.end.stop_receiving()
        except OSError:
            pass  # nobody holds the other end any more
        open_roles.discard(self)
        self.outbox.close_when_sent(self.end.close)

    def has_leftovers(self) -> bool:
        """Whether questions are still there that nobody has taken."""
        return bool(len(self.outbox) or self.end.unread())

    def release(self) -> None:
        """Close what late comers could still have been handed."""
        with self._lock:
            self._theirs.close()
            self.board.close()
            for member in self._members.values():
                member.link.close()
            self._members.clear()

    def counts(self) -> tuple[int, int, int]:
        """Questions written, of these not yet taken, and workers' handles."""
        return self.outbox.number, 0 if self.closed else self._untaken(), len(self._members)
