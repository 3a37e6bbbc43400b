"""The table of peers: who has something open, in memory that all of them share. Each has a slot, and counts there.

For what belongs to no process in particular, as channels and locks do not: nobody is there whom the others could tell
of their coming and going. So each tells it in the table, and the kernel tells of those who could not: a process holds
its slot by a lock on the table's memory (``peers.locks``), which ends with the process, however it ends.

Invariants:

* Only its holder writes the words of a slot.
* A slot is claimed, and words of the head are changed, under the lock of the head. That lock, too, ends with its
  holder: what is changed under it is changed word by word, such that it may end after any of them.
* A slot whose holder has left is FREE, and keeps its counts: they go on counting under the next holder, so that sums
  over all slots stay true. A slot that is not FREE and not held is a dead process's. It stays so, for all to see, until
  ``REUSED_AFTER`` others have come after it: then it is claimed again, and its counts, too, go on.
* Each *tenancy* of a slot has a number of its own. Who remembers deaths remembers tenancies, not slots.
* Whoever claims a slot, leaves one or shows something that others wait for rings the *bell* afterwards: an eventfd that
  all processes have, which nobody reads. Each process that waits hears each ring, by an edge-triggered epoll of its own
  (``monitor``). A process that is killed rings nothing; of that its pidfd tells.
* A handle that leaves for another process is counted in ISSUED before, and in REDEEMED when it is there. So one that is
  under way is seen in the difference of the sums; one whose message nobody will read stays there for ever.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from ..errors import ResourceError
from ..transport import descriptors
from ..transport.atomic import HAS_GIL
from ..transport.fork import closed_in_child
from .locks import RecordLocks, lockable_memory, opened_again
from .words import WORD, SharedWords

SLOTS: Final = 4096
_WIDTH: Final = 16  # two cache lines

#: How many come before a dead process's slot is claimed again: until then everybody can be told of the death.
REUSED_AFTER: Final = 1024

#: Words of the head: how many slots were ever claimed, and how often one was; how often it was a dead process's. The
#: others are the user's.
_CLAIMED, _CAME, _SUCCEEDED = range(3)
#: Words of a slot: its holder's process id, 0 if it is FREE, with FAILED set if it has failed; the tenancy's number;
#: handles sent to other processes, and received; in which PID namespace the holder has its id, 0 if that is not known.
#: The others are the user's.
_HOLDER, _TENANCY, _ISSUED, _REDEEMED, _PROCESS_IDS = range(5)
_FAILED: Final = 1 << 62
#: The first words that the user may use, of the head and of a slot.
FIRST_OF_HEAD, FIRST_OF_SLOT = 3, 5

# Which byte's lock means what; slot n's is byte 1 + n.
_HEAD_LOCK: Final = 0
_FIRST_LOCK: Final = 1


def _made() -> tuple[int, int]:
    """New memory, and its bell; -1 where the system has no eventfd."""
    fd = lockable_memory(WORD * _WIDTH * (1 + SLOTS))
    try:
        bell = descriptors.eventfd()
    except BaseException:
        os.close(fd)
        raise
    return fd, -1 if bell is None else bell


def _adopted(fds: Sequence[int]) -> tuple[int, int]:
    return (fds[0], fds[1]) if len(fds) > 1 else (fds[0], -1)


def _process_ids() -> int:
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


class PeerTable:
    """One process's mapping of a table, with its slot. Safe to use from several threads.

    Args:
        fds: what ``handover`` gave in another process, which this object takes over, also if it fails; none to make a
            new table.
        states: words of a slot that say how its holder is now, and do not count: 0 for each new holder.

    Raises ResourceError if descriptors or memory have run out, or slots.
    """

    def __init__(self, fds: Sequence[int] = (), states: Sequence[int] = ()) -> None:
        fd, self.bell = _adopted(fds) if fds else _made()
        try:
            self._memory = SharedWords(_WIDTH, SLOTS, _WIDTH, fd)
        except BaseException:
            descriptors.close_fds([self.bell])
            raise
        self._lock_fd = -1
        self._thread_lock = threading.RLock()
        self._depth = 0
        self.words = self._memory.words
        self.slot = -1
        try:
            try:
                self._lock_fd = opened_again(fd)
            except OSError as error:
                raise descriptors.exhausted(error) from error
            self._locks = RecordLocks(self._lock_fd)
            closed_in_child(self)
            self.slot = self._claim(states)
        except BaseException:
            self.leave()
            raise

    @property
    def fd(self) -> int:
        """The table's memory; -1 after ``leave``."""
        return self._memory.fd

    def handover(self) -> list[int]:
        """The descriptors for another process: one or two, as many in each process."""
        return [self.fd] if self.bell < 0 else [self.fd, self.bell]

    def ring(self) -> None:
        """Let all who wait look at the table."""
        with self._thread_lock:
            if self.bell >= 0:
                os.write(self.bell, (1).to_bytes(8, "little"))

    def _claim(self, states: Sequence[int]) -> int:
        words = self.words
        with self.locked():
            slot = self._lock_one()
            if slot is None:
                raise ResourceError(0, f"a channel or mutex cannot be open in more than {SLOTS} processes at a time")
            first = self.index(slot)
            for word in states:
                words[first + word] = 0
            words[_SUCCEEDED] += bool(words[first + _HOLDER])
            words[_CLAIMED] = max(int(words[_CLAIMED]), slot + 1)
            words[_CAME] += 1
            words[first + _TENANCY] = words[_CAME]
            words[first + _PROCESS_IDS] = _process_ids()
            words[first + _HOLDER] = os.getpid()
        self.ring()
        return slot

    def _lock_one(self) -> int | None:
        """Take the lock of a slot that is FREE; or that of the first who has died, if enough have come since."""
        claimed, came = int(self.words[_CLAIMED]), int(self.words[_CAME])
        holders = self._memory.column(_HOLDER, claimed).tolist()
        for slot, holder in enumerate(holders):
            if not holder and self._locks.acquire(_FIRST_LOCK + slot):
                return slot
        if claimed >= REUSED_AFTER:
            tenancies = self._memory.column(_TENANCY, claimed).tolist()
            for tenancy, slot in sorted(zip(tenancies, range(claimed), strict=True)):
                if came - tenancy < REUSED_AFTER and claimed < SLOTS:
                    break
                if holders[slot] and not self.lives(slot) and self._locks.acquire(_FIRST_LOCK + slot):
                    return slot
        return claimed if claimed < SLOTS and self._locks.acquire(_FIRST_LOCK + claimed) else None

    # Locks

    def lock_extra(self, *, wait: bool) -> bool:
        """Take a lock that is its user's, as a process: its threads must see to it that only one of them does."""
        return self._locks.acquire(_FIRST_LOCK + SLOTS, wait=wait)

    def unlock_extra(self) -> None:
        self._locks.release(_FIRST_LOCK + SLOTS)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the head, which is for moments only. Reentrant."""
        with self._thread_lock:
            if not self._depth and self._lock_fd >= 0:
                self._locks.acquire(_HEAD_LOCK, wait=True)
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if not self._depth and self._lock_fd >= 0:
                    self._locks.release(_HEAD_LOCK)

    # Slots

    def index(self, slot: int) -> int:
        """Where the words of a slot begin."""
        return self._memory.first_of(slot)

    def claimed(self) -> range:
        """Every slot that was ever claimed."""
        return range(int(self.words[_CLAIMED]))

    def pid(self, slot: int) -> int:
        """Who holds it; 0 if nobody does."""
        return int(self.words[self.index(slot) + _HOLDER]) & ~_FAILED

    def shares_process_ids(self, slot: int) -> bool:
        """Whether the process id of a slot's holder means that process here, too."""
        theirs = self.shown(slot, _PROCESS_IDS)
        return theirs != 0 and theirs == self.shown(self.slot, _PROCESS_IDS)

    def others_came(self) -> bool:
        """Whether it was ever open in another process."""
        return int(self.words[_CAME]) > 1

    def tenancy(self, slot: int) -> int:
        """The number of the present tenancy of a slot, or of the last one: no other of any slot has it."""
        return int(self.words[self.index(slot) + _TENANCY])

    @property
    def losses(self) -> int:
        """How many have died or failed. Only grows."""
        return int(self.words[_SUCCEEDED]) + sum(not lives for _, lives in self.others())

    def others(self) -> Iterator[tuple[int, bool]]:
        """The slots of other processes that have it open, and those that died or failed: slot, and whether it lives."""
        return ((slot, lives) for slot, _, lives in self.tenancies())

    def tenancies(self) -> Iterator[tuple[int, int, bool]]:
        """The same, with the number of the tenancy in between."""
        for slot in self.claimed():
            if slot == self.slot:
                continue
            while True:  # whoever claims it again has its lock before he changes the number
                tenancy = self.tenancy(slot)
                lives = self._is_held(slot)
                if tenancy == self.tenancy(slot):
                    break
            if lives is not None:
                yield slot, tenancy, lives

    def _is_held(self, slot: int) -> bool | None:
        """Whether its holder lives; None if it is free. One who leaves while this looks has not died."""
        at = self.index(slot) + _HOLDER
        while holder := self.words[at]:
            if self.lives(slot):
                return True
            # Whoever leaves says so before giving up the lock.
            if self.words[at] == holder and not self.lives(slot):
                return False
        return None

    def has_failed(self, slot: int) -> bool:
        """Whether a slot that does not live was left by a worker that ended with an error, and was not killed."""
        return bool(self.words[self.index(slot) + _HOLDER] & _FAILED)

    def lives(self, slot: int) -> bool:
        """Whether its holder lives and has it open."""
        if slot == self.slot:
            return True
        return not self.has_failed(slot) and self._locks.is_held(_FIRST_LOCK + slot)

    # Counts

    def counter(self, word: int) -> Callable[[], None]:
        """What adds one to a word of this process's slot, which only this may change then. Any thread may call it.

        With the GIL it is one call of C code, in which no other thread can come between reading and writing; it is part
        of what each item costs. Without, it takes a lock.
        """
        at = self.index(self.slot) + word
        count = map(self.words.__setitem__, itertools.repeat(at), itertools.count(int(self.words[at]) + 1)).__next__
        if HAS_GIL:
            return count
        lock = threading.Lock()

        def count_locked() -> None:
            with lock:
                count()

        return count_locked

    def add(self, word: int, number: int) -> None:
        """Add to a word of this process's slot, if it has not left."""
        with self.locked():
            if self.fd >= 0:
                self.words[self.index(self.slot) + word] += number

    def show(self, word: int, value: int) -> None:
        """Let others see ``value`` in this process's slot, if it has not left."""
        with self.locked():
            if self.fd >= 0:
                self.words[self.index(self.slot) + word] = value

    def shown(self, slot: int, word: int) -> int:
        return int(self.words[self.index(slot) + word])

    def sum(self, word: int) -> int:
        """Sum of a word over all slots."""
        return sum(self._memory.column(word, int(self.words[_CLAIMED])))

    # Handles under way to other processes

    def count_issued(self, number: int) -> None:
        """So many more handles are about to leave for other processes; they have not left after all, if negative."""
        self.add(_ISSUED, number)

    def count_redeemed(self) -> None:
        """A handle has come to this process."""
        self.add(_REDEEMED, 1)

    def any_issued(self) -> bool:
        """Whether a handle ever left for another process."""
        return self.sum(_ISSUED) > 0

    def any_under_way(self) -> bool:
        """Whether a handle is on its way to another process, or lost with its message."""
        return self.sum(_ISSUED) > self.sum(_REDEEMED)

    # Leaving

    def leave(self, *, failed: bool = False, keep_memory: bool = False) -> None:
        """Give up the slot and the memory. ``failed``: as one who cannot do what others wait for. May be called again.

        ``keep_memory``: other threads may still count in it; the process ends.

        A slot that was not given up is a dead process's.
        """
        with self._thread_lock:
            if self.fd < 0:
                return
            if self.slot >= 0:
                self.words[self.index(self.slot) + _HOLDER] = os.getpid() | _FAILED if failed else 0
                self.ring()
            if not keep_memory:
                self._memory.close()
            self._close()

    def abandon(self) -> None:
        """Give up the descriptors, and with them the locks, without a word."""
        self._thread_lock, self._depth = threading.RLock(), 0  # a thread that a fork has not copied may have it
        self._close()

    def _close(self) -> None:
        self._memory.abandon()
        fds, self._lock_fd, self.bell = (self._lock_fd, self.bell), -1, -1
        descriptors.close_fds(fds)
