"""The table of peers: who has something open, in memory that all of them share. Each has a slot, and counts there.

For what belongs to no process in particular, as channels and locks do not: nobody is there whom the others could tell
of their coming and going. So each tells it in the table, and the kernel tells of those who could not: a process holds
its slot by a lock on the table's memory (``peers.record_locks``), which ends with the process, however it ends.

Invariants:

* Only its holder writes the words of a slot.
* A slot is claimed, and words of the head are changed, under the lock of the head. That lock, too, ends with its
  holder: what is changed under it is changed word by word, such that it may end after any of them.
* A slot whose holder has left is FREE, and keeps its counts: they go on counting under the next holder, so that sums
  over all slots stay true. A slot that is not FREE and not held is a dead process's. It stays so, for all to see, until
  ``REUSE_AFTER`` others have come after it: then it is claimed again, and its counts, too, go on.
* Each *peer* of a slot has a number of its own. Who remembers deaths remembers peers, not slots.
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
from .record_locks import RecordLocks, lockable_memory, reopen
from .shared_words import WORD, SharedWords

MAX_PEERS: Final = 4096
_SLOT_WORDS: Final = 16  # two cache lines

#: How many come before a dead process's slot is claimed again: until then everybody can be told of the death.
REUSE_AFTER: Final = 1024

#: Words of the head: how many slots were ever claimed, and how often one was; how often it was a dead process's. The
#: others are the user's.
_NUM_USED_SLOTS, _LAST_PEER_ID, _NUM_REPLACED_DEATHS = range(3)
#: Words of a slot: its holder's process id, 0 if it is FREE, with FAILED set if it has failed; the peer's number;
#: handles sent to other processes, and received; in which PID namespace the holder has its id, 0 if that is not known.
#: The others are the user's.
_HOLDER, _PEER_ID, _HANDLES_SENT, _HANDLES_RECEIVED, _PID_NAMESPACE = range(5)
_FAILED: Final = 1 << 62
#: The first words that the user may use, of the head and of a slot.
FIRST_HEADER_WORD, FIRST_SLOT_WORD = 3, 5

# Which byte's lock means what; slot n's is byte 1 + n.
_HEAD_LOCK: Final = 0
_FIRST_SLOT_LOCK: Final = 1


def _new_memory() -> tuple[int, int]:
    """New memory, and its notify_fd; -1 where the system has no eventfd."""
    fd = lockable_memory(WORD * _SLOT_WORDS * (1 + MAX_PEERS))
    try:
        notify_fd = descriptors.eventfd()
    except BaseException:
        os.close(fd)
        raise
    return fd, -1 if notify_fd is None else notify_fd


def _split_fds(fds: Sequence[int]) -> tuple[int, int]:
    return (fds[0], fds[1]) if len(fds) > 1 else (fds[0], -1)


def _pid_namespace() -> int:
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


class PeerTable:
    """One process's mapping of a table, with its slot. Safe to use from several threads.

    Args:
        fds: what ``handover`` gave in another process, which this object takes over, also if it fails; none to make a
            new table.
        reset_words: words of a slot that say how its holder is now, and do not count: 0 for each new holder.

    Raises ResourceError if descriptors or memory have run out, or slots.
    """

    def __init__(self, fds: Sequence[int] = (), reset_words: Sequence[int] = ()) -> None:
        fd, self.notify_fd = _split_fds(fds) if fds else _new_memory()
        try:
            self._memory = SharedWords(_SLOT_WORDS, MAX_PEERS, _SLOT_WORDS, fd)
        except BaseException:
            descriptors.close_fds([self.notify_fd])
            raise
        self._lock_fd = -1
        self._thread_lock = threading.RLock()
        self._depth = 0
        self.words = self._memory.words
        self.slot = -1
        try:
            try:
                self._lock_fd = reopen(fd)
            except OSError as error:
                raise descriptors.resource_error(error) from error
            self._locks = RecordLocks(self._lock_fd)
            closed_in_child(self)
            self.slot = self._claim(reset_words)
        except BaseException:
            self.leave()
            raise

    @property
    def fd(self) -> int:
        """The table's memory; -1 after ``leave``."""
        return self._memory.fd

    def handover(self) -> list[int]:
        """The descriptors for another process: one or two, as many in each process."""
        return [self.fd] if self.notify_fd < 0 else [self.fd, self.notify_fd]

    def notify_all(self) -> None:
        """Let all who wait look at the table."""
        with self._thread_lock:
            if self.notify_fd >= 0:
                os.write(self.notify_fd, (1).to_bytes(8, "little"))

    def _claim(self, reset_words: Sequence[int]) -> int:
        words = self.words
        with self.locked():
            slot = self._acquire_slot()
            if slot is None:
                raise ResourceError(
                    0, f"a channel or mutex cannot be open in more than {MAX_PEERS} processes at a time"
                )
            first = self.slot_offset(slot)
            for word in reset_words:
                words[first + word] = 0
            words[_NUM_REPLACED_DEATHS] += bool(words[first + _HOLDER])
            words[_NUM_USED_SLOTS] = max(int(words[_NUM_USED_SLOTS]), slot + 1)
            words[_LAST_PEER_ID] += 1
            words[first + _PEER_ID] = words[_LAST_PEER_ID]
            words[first + _PID_NAMESPACE] = _pid_namespace()
            words[first + _HOLDER] = os.getpid()
        self.notify_all()
        return slot

    def _acquire_slot(self) -> int | None:
        """Take the lock of a slot that is FREE; or that of the first who has died, if enough have come since."""
        claimed, came = int(self.words[_NUM_USED_SLOTS]), int(self.words[_LAST_PEER_ID])
        holders = self._memory.column(_HOLDER, claimed).tolist()
        for slot, holder in enumerate(holders):
            if not holder and self._locks.acquire(_FIRST_SLOT_LOCK + slot):
                return slot
        if claimed >= REUSE_AFTER:
            peer_ids = self._memory.column(_PEER_ID, claimed).tolist()
            for peer_id, slot in sorted(zip(peer_ids, range(claimed), strict=True)):
                if came - peer_id < REUSE_AFTER and claimed < MAX_PEERS:
                    break
                if holders[slot] and not self.is_alive(slot) and self._locks.acquire(_FIRST_SLOT_LOCK + slot):
                    return slot
        return claimed if claimed < MAX_PEERS and self._locks.acquire(_FIRST_SLOT_LOCK + claimed) else None

    # Locks

    def acquire_user_lock(self, *, wait: bool) -> bool:
        """Take a lock that is its user's, as a process: its threads must see to it that only one of them does."""
        return self._locks.acquire(_FIRST_SLOT_LOCK + MAX_PEERS, wait=wait)

    def release_user_lock(self) -> None:
        self._locks.release(_FIRST_SLOT_LOCK + MAX_PEERS)

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

    def slot_offset(self, slot: int) -> int:
        """Where the words of a slot begin."""
        return self._memory.slot_offset(slot)

    def used_slots(self) -> range:
        """Every slot that was ever claimed."""
        return range(int(self.words[_NUM_USED_SLOTS]))

    def pid(self, slot: int) -> int:
        """Who holds it; 0 if nobody does."""
        return int(self.words[self.slot_offset(slot) + _HOLDER]) & ~_FAILED

    def shares_pid_namespace(self, slot: int) -> bool:
        """Whether the process id of a slot's holder means that process here, too."""
        theirs = self.get_word(slot, _PID_NAMESPACE)
        return theirs != 0 and theirs == self.get_word(self.slot, _PID_NAMESPACE)

    def was_shared(self) -> bool:
        """Whether it was ever open in another process."""
        return int(self.words[_LAST_PEER_ID]) > 1

    def peer_id(self, slot: int) -> int:
        """The number of the present peer of a slot, or of the last one: no other of any slot has it."""
        return int(self.words[self.slot_offset(slot) + _PEER_ID])

    @property
    def num_deaths(self) -> int:
        """How many have died or failed. Only grows."""
        return int(self.words[_NUM_REPLACED_DEATHS]) + sum(not lives for _, lives in self.other_slots())

    def other_slots(self) -> Iterator[tuple[int, bool]]:
        """The slots of other processes that have it open, and those that died or failed: slot, and whether it lives."""
        return ((slot, lives) for slot, _, lives in self.other_peers())

    def other_peers(self) -> Iterator[tuple[int, int, bool]]:
        """The same, with the number of the peer in between."""
        for slot in self.used_slots():
            if slot == self.slot:
                continue
            while True:  # whoever claims it again has its lock before he changes the number
                peer_id = self.peer_id(slot)
                lives = self._is_peer_alive(slot)
                if peer_id == self.peer_id(slot):
                    break
            if lives is not None:
                yield slot, peer_id, lives

    def _is_peer_alive(self, slot: int) -> bool | None:
        """Whether its holder lives; None if it is free. One who leaves while this looks has not died."""
        at = self.slot_offset(slot) + _HOLDER
        while holder := self.words[at]:
            if self.is_alive(slot):
                return True
            # Whoever leaves says so before giving up the lock.
            if self.words[at] == holder and not self.is_alive(slot):
                return False
        return None

    def has_failed(self, slot: int) -> bool:
        """Whether a slot that does not live was left by a worker that ended with an error, and was not killed."""
        return bool(self.words[self.slot_offset(slot) + _HOLDER] & _FAILED)

    def is_alive(self, slot: int) -> bool:
        """Whether its holder lives and has it open."""
        if slot == self.slot:
            return True
        return not self.has_failed(slot) and self._locks.is_held(_FIRST_SLOT_LOCK + slot)

    # Counts

    def counter(self, word: int) -> Callable[[], None]:
        """What adds one to a word of this process's slot, which only this may change then. Any thread may call it.

        With the GIL it is one call of C code, in which no other thread can come between reading and writing; it is part
        of what each item costs. Without, it takes a lock.
        """
        at = self.slot_offset(self.slot) + word
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
                self.words[self.slot_offset(self.slot) + word] += number

    def set_word(self, word: int, value: int) -> None:
        """Let others see ``value`` in this process's slot, if it has not left."""
        with self.locked():
            if self.fd >= 0:
                self.words[self.slot_offset(self.slot) + word] = value

    def get_word(self, slot: int, word: int) -> int:
        return int(self.words[self.slot_offset(slot) + word])

    def sum(self, word: int) -> int:
        """Sum of a word over all slots."""
        return sum(self._memory.column(word, int(self.words[_NUM_USED_SLOTS])))

    # Handles under way to other processes

    def count_handles_sent(self, number: int) -> None:
        """So many more handles are about to leave for other processes; they have not left after all, if negative."""
        self.add(_HANDLES_SENT, number)

    def count_handle_received(self) -> None:
        """A handle has come to this process."""
        self.add(_HANDLES_RECEIVED, 1)

    def any_handle_sent(self) -> bool:
        """Whether a handle ever left for another process."""
        return self.sum(_HANDLES_SENT) > 0

    def any_handle_in_flight(self) -> bool:
        """Whether a handle is on its way to another process, or lost with its message."""
        return self.sum(_HANDLES_SENT) > self.sum(_HANDLES_RECEIVED)

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
                self.words[self.slot_offset(self.slot) + _HOLDER] = os.getpid() | _FAILED if failed else 0
                self.notify_all()
            if not keep_memory:
                self._memory.close()
            self._close()

    def abandon(self) -> None:
        """Give up the descriptors, and with them the locks, without a word."""
        self._thread_lock, self._depth = threading.RLock(), 0  # a thread that a fork has not copied may have it
        self._close()

    def _close(self) -> None:
        self._memory.abandon()
        fds, self._lock_fd, self.notify_fd = (self._lock_fd, self.notify_fd), -1, -1
        descriptors.close_fds(fds)
