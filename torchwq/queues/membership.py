"""Who has a worker's handle on a queue: how members come and leave, as the owner sees it.

Invariants:

* Each handle of another process is a :class:`~torchwq.queues.members.Member` with a link and a slot of the counters. A
  link that ends without a goodbye is a death. A thread of the owner's process is a member without a link, with a
  negative number.
* A worker sends its answers before its goodbye, and the kernel keeps both. So when a member is known to be gone, every
  answer that it gave is in the socket.
* "No worker is left" means: some had come, all have gone, no handle is pending or in doubt, no end is awaited, and no
  worker of this process was started so recently that it may still come.
* ``lock`` is the owner's. Nobody sends questions with it held.
"""

from __future__ import annotations

import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from ..errors import QueueClosed, ResourceError
from ..memory import recycling
from ..transport import reactor
from ..transport.link import Link
from ..workers import worker
from .counters import HANDLES, SLOTS, TAKEN_BY_GONE, Counters, Slot
from .failing import Failed
from .members import Member, Notes, time_to_come
from .protocol import ADOPT, GOODBYE, IN_DOUBT, LEAVING, FunctionFailed, Hello, Seat, kind_of
from .troubles import Troubles


class Owner(Protocol):
    """The owner's role, as far as its members concern it."""

    closed: str
    capacity: int | None

    def describe(self, number: int) -> str:
        """A question in a few words."""

    def add_sender(self) -> tuple[int, int]:
        """See ``KeptBlocks``."""

    def member_left(self, member: Member) -> None:
        """It has left, or its process has died. Called with no lock held."""

    def make_room_for_answers(self, *, wanted: bool) -> None:
        """Whether a member is leaving whose answers the socket does not take."""


class Membership(worker.EndListener):
    """The members of one queue.

    Args:
        owner: whose queue it is.
        lock: the owner's.
        counters: those that the members share.
        troubles: what is told of members that die.
        changed: called, with the lock held, when members have come or left, or none may be left any more.
    """

    def __init__(
        self, owner: Owner, lock: threading.RLock, counters: Counters, troubles: Troubles, changed: Callable[[], None]
    ) -> None:
        self._owner = owner
        self._lock = lock
        self._counters = counters
        self._troubles = troubles
        self._changed = changed
        self._members: dict[int, Member] = {}
        #: How often one came.
        self._came = 0
        #: Whether a worker can have a handle, or open one. Else the end of a worker does not concern the queue.
        self.is_reachable = False
        #: Slots of the counters that were ever given out, and those of them that are free.
        self._slots = 0
        self._free: deque[int] = deque()
        self._taken_by_gone = 0
        #: Handles on their way to threads of this process.
        self.pending_handles = 0
        self._last_thread = 0
        #: Workers that have come, and the groups that they were started in.
        self._identities: set[object] = set()
        self._groups: set[int] = set()
        self._will_look = False

    # Who is there

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Member]:
        return iter(list(self._members.values()))

    @property
    def any_threads(self) -> bool:
        """Whether threads of this process have handles, or will have."""
        return self.pending_handles > 0 or any(number < 0 for number in self._members)

    def count_taken(self) -> int:
        """How many questions were taken, as far as they were noted."""
        with self._lock:
            return self._taken_by_gone + sum(member.slot.taken for member in self._members.values())

    def numbers_in_hand(self) -> list[int]:
        """Numbers of the questions that members are at."""
        with self._lock:
            return [member.slot.number for member in self._members.values() if member.slot.busy]

    def any_busy(self, mark: int) -> bool:
        """Whether a member is at a question up to the number ``mark``, or has several threads that are at some."""
        with self._lock:
            members = self._members.values()
            return any(each.slot.busy and (each.slot.busy > 1 or each.slot.number <= mark) for each in members)

    def in_hand(self, number: int, member: Member | None = None) -> str:
        """What the member with this number has in hand, if it is ``member``, in a few words."""
        with self._lock:
            found = self._members.get(number)
            if found is None or not found.slot.busy or (member is not None and found is not member):
                return ""
            return self._owner.describe(found.slot.number)

    def nobody_left(self) -> bool:
        """Whether no worker is left. With the lock held."""
        if not self._came or self._members or self.pending_handles or self._troubles.hides_the_end:
            return False
        return not self._expected()

    def _expected(self) -> bool:
        """Whether a worker may still be on its way. If so, this looks again when it should have come."""
        seconds = time_to_come(self._identities, self._groups)
        if seconds > 0 and not self._will_look:
            self._will_look = True
            reactor.get().call_later(seconds, self._look_again)
        return seconds > 0

    def _look_again(self) -> None:
        with self._lock:
            self._will_look = False
            self._changed()

    # Coming

    def add(self, link: Link, pid: int | None, fds: Sequence[int] = ()) -> None:
        """Make the process at the other end of ``link`` a member, and tell it its slot. Takes ``link`` over.

        Args:
            pid: of that process, if it is known; else it says so when it comes.
            fds: descriptors that it gets with its slot.

        Raises QueueClosed or ResourceError.
        """
        with self._lock:
            if self._counters.fd < 0:
                link.close()
                raise QueueClosed(self._owner.closed)
            if self._free:
                number = self._free.popleft()
            elif self._slots < SLOTS:
                number, self._slots = self._slots, self._slots + 1
            else:
                link.close()
                raise ResourceError(0, f"a queue cannot have more than {SLOTS} handles at a time: close some")
            slot = self._counters.slot(number)
            slot.clear()
            sender, room = self._owner.add_sender()
            member = Member(number, slot, link, sender=sender)
            self._members[number] = member
            self._counters.words[HANDLES] += 1
            if pid is not None:
                self._arrived(member, pid)
        link.watch(functools.partial(self._hear, member), functools.partial(self._link_ended, member))
        try:
            link.send(Seat(number, self._owner.capacity, sender, room).encode(), fds)
        except BrokenPipeError:
            pass  # its process is gone, of which the link tells
        except BaseException:
            self.remove(member)
            raise

    def _arrived(self, member: Member, pid: int) -> None:
        member.pid = pid
        process = worker.find(pid)
        self._note_arrival(pid, None if process is None else process.group)

    def add_thread(self, notes: Notes, process: worker.Worker | None) -> int:
        """Make a thread of this process a member, which ``process`` is the worker of, if it is one; returns its number.

        It may come to a queue that is closed.
        """
        with self._lock:
            self._last_thread -= 1
            number = self._last_thread
            self._members[number] = Member(number, notes, None)
            identity = threading.current_thread() if process is None else process.identity
            self._note_arrival(identity, None if process is None else process.group)
            return number

    def _note_arrival(self, identity: object, group: int | None) -> None:
        self._came += 1
        self._identities.add(identity)
        if group is not None:
            self._groups.add(group)
        self._changed()

    # What members say

    def _hear(self, member: Member, data: bytes, fds: list[int]) -> None:
        what = kind_of(data)
        if what == Hello.KIND:
            with self._lock:
                self._arrived(member, Hello.decode(data))
        elif what == ADOPT and fds:
            try:
                self.add(Link(fds.pop()), None)
            except (QueueClosed, ResourceError):
                pass  # the other end of that link sees it close
        elif what == LEAVING:
            with self._lock:
                member.leaving = True
                self._watch_for_leavers()
        elif what == GOODBYE:
            if not self._troubles.doubt_is_over(member):
                self.remove(member)
        elif what == IN_DOUBT:
            self._troubles.doubt(member, member.slot)  # first: else a reader finds, in between, that nobody is left
            member.in_hand = self.remove(member, keep_link=True)
        elif what == FunctionFailed.KIND and member.pid is not None:
            in_hand = member.in_hand or self.in_hand(member.number, member)
            failure = FunctionFailed.decode(data)
            self._troubles.note_failure(Failed(worker.find(member.pid), member.pid, in_hand, failure))
        for fd in fds:
            os.close(fd)

    # SenderLeft

    def remove_thread(self, number: int) -> None:
        """A thread of this process has no handle any more."""
        member = self._members.get(number)
        if member is not None:
            self.remove(member)

    def remove(self, member: Member, *, keep_link: bool = False) -> str:
        """Forget a member; returns what it had in hand."""
        with self._lock:
            if self._members.get(member.number) is not member:
                return ""
            del self._members[member.number]
            in_hand = ""
            if not self._owner.closed:
                slot = member.slot
                self._taken_by_gone += slot.taken
                if slot.busy:
                    in_hand = self._owner.describe(slot.number)
                if isinstance(slot, Slot):
                    self._free.append(member.number)
                    self._counters.words[HANDLES] -= 1
                    self._counters.words[TAKEN_BY_GONE] += slot.taken
                    slot.clear()
            self._changed()
            self._watch_for_leavers()
        self._owner.member_left(member)
        if member.link is not None and not keep_link:
            member.link.close()
        return in_hand

    def _watch_for_leavers(self) -> None:
        self._owner.make_room_for_answers(wanted=any(member.leaving for member in self._members.values()))

    def _link_ended(self, member: Member) -> None:
        """The process behind a link is gone and has not said goodbye."""
        with self._lock:
            was_in_doubt = self._troubles.doubt_is_over(member)
            known = self._members.get(member.number) is member
            recycling.expire_in_flight()
            if known and member.pid is not None:
                self._troubles.expect_report()
            elif was_in_doubt and member.pid is not None:
                self._troubles.ended_in_doubt(member.pid, member.in_hand)
        in_hand = self.remove(member)
        if known and member.pid is not None:
            self._troubles.process_lost(member.pid, in_hand)

    def on_worker_end(self, process: worker.Worker) -> None:
        """A worker that failed before it opened this queue, while no other has come or is there, will not answer."""
        with self._lock:
            self._identities.discard(process.identity)
            if self._owner.closed:
                return
            self._changed()
            is_alone = self.is_reachable and not self._came and not worker.active_workers()
            if is_alone and process.exitcode != 0:
                self._troubles.never_came(process)

    # The end

    def close(self) -> list[Member]:
        """The queue is closed: only threads of this process remain members. Returns the others. With the lock held."""
        others = [member for member in self._members.values() if member.number >= 0]
        self._members = {number: member for number, member in self._members.items() if number < 0}
        return others
