"""The table of peers: which processes have a thing open. It lies in memory that all of them share.

No process owns a channel or a mutex, so there is none to which the others could report. Instead each process claims a
slot of the table and counts there. It holds its slot by a record lock (``record_locks``), which the kernel releases
when the process ends, however it ends.

Note [Peers and slots]

* A *peer* is one process's use of the table, until it leaves or dies. Each peer has an id that no other ever gets,
  while its slot is used again. So deaths are remembered by peer id.
* Only the peer that holds a slot writes the slot's words.
* Claiming a slot and writing a word of the header need the header lock. That lock ends with its holder, too, so what
  is written under it is valid after each single word.
* A slot whose peer has left is FREE. It keeps its counts, and the next peer counts on: sums over all slots stay right.
* A slot that is neither FREE nor locked shows a dead peer, until ``REUSE_AFTER`` more peers have come. Then it is
  claimed again, and its counts go on, too.
* A peer that claims a slot, leaves, or changes a word that others wait for writes to ``notify_fd`` afterwards: an
  eventfd that all peers have and none reads. Each process that waits gets each notification by an edge-triggered epoll
  of its own (``monitor``). A killed process notifies nobody; its pidfd becomes readable.
* A handle counts in HANDLES_SENT before it leaves for another process, and in HANDLES_RECEIVED when it has arrived. The
  difference is the number of handles in flight. A handle whose message nobody reads is in flight for ever.
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

#: A dead peer's slot is claimed again after so many more peers: until then every process can learn of the death.
REUSE_AFTER: Final = 1024

#: Words of the header: how many slots were ever claimed; the last peer's id; how many dead peers' slots were claimed
#: again. The others are the user's.
_NUM_USED_SLOTS, _LAST_PEER_ID, _NUM_REPLACED_DEATHS = range(3)
#: Words of a slot: its holder's process id, with _FAILED added if it has failed, or 0 if the slot is FREE; the peer's
#: id; handles sent to other processes, and received; the holder's PID namespace, or 0 if that is not known. The others
#: are the user's.
_HOLDER, _PEER_ID, _HANDLES_SENT, _HANDLES_RECEIVED, _PID_NAMESPACE = range(5)
_FAILED: Final = 1 << 62
#: The first words that the user may use, of the header and of a slot.
FIRST_HEADER_WORD, FIRST_SLOT_WORD = 3, 5

# The bytes that are locked: the header's, each slot's, and one for the user.
_HEADER_LOCK: Final = 0
_FIRST_SLOT_LOCK: Final = 1


def _new_memory() -> tuple[int, int]:
    """New memory, and an eventfd; -1 where the system has none."""
    fd = lockable_memory(WORD * _SLOT_WORDS * (1 + MAX_PEERS))
    try:
        event = descriptors.eventfd()
    except BaseException:
        os.close(fd)
        raise
    return fd, -1 if event is None else event


def _pid_namespace() -> int:
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


class PeerTable:
    """One process's mapping of a table, with its slot. Safe to use from several threads.

    Args:
        fds: what ``handover`` gave in another process, which this object takes over even if it raises; none makes a
            new table.
        reset_words: words of a slot that are 0 for each new peer, because they describe its state and do not count.

    Raises ResourceError if descriptors, memory or slots have run out.
    """

    def __init__(self, fds: Sequence[int] = (), reset_words: Sequence[int] = ()) -> None:
        fd, self.notify_fd = (*fds, -1)[:2] if fds else _new_memory()  # one without a second has no eventfd
        try:
            self._memory = SharedWords(_SLOT_WORDS, MAX_PEERS, _SLOT_WORDS, fd)
        except BaseException:
            descriptors.close_fds([self.notify_fd])
            raise
        self._lock_fd = -1
        self._thread_lock = threading.RLock()
        self._depth = 0
        self.words, self.slot_offset = self._memory.words, self._memory.slot_offset
        self.native_word = self._memory.native_word
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
        """The descriptors for another process: one or two, the same number in each process."""
        return [self.fd] if self.notify_fd < 0 else [self.fd, self.notify_fd]

    def notify_all(self) -> None:
        """Wake the monitors of all peers."""
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
        """Lock a slot that is FREE; or that of the first dead peer, if enough peers have come since; or a new one."""
        used, last_peer_id = int(self.words[_NUM_USED_SLOTS]), int(self.words[_LAST_PEER_ID])
        holders = self._memory.column(_HOLDER, used).tolist()
        for slot, holder in enumerate(holders):
            if not holder and self._locks.acquire(_FIRST_SLOT_LOCK + slot):
                return slot
        if used >= REUSE_AFTER:
            peer_ids = self._memory.column(_PEER_ID, used).tolist()
            for peer_id, slot in sorted(zip(peer_ids, range(used), strict=True)):
                if last_peer_id - peer_id < REUSE_AFTER and used < MAX_PEERS:
                    break
                if holders[slot] and not self.is_alive(slot) and self._locks.acquire(_FIRST_SLOT_LOCK + slot):
                    return slot
        return used if used < MAX_PEERS and self._locks.acquire(_FIRST_SLOT_LOCK + used) else None

    # Locks

    def acquire_user_lock(self, *, wait: bool) -> bool:
        """Take a lock that the table leaves to its user. It excludes other processes, not threads of this one."""
        return self._locks.acquire(_FIRST_SLOT_LOCK + MAX_PEERS, wait=wait)

    def release_user_lock(self) -> None:
        self._locks.release(_FIRST_SLOT_LOCK + MAX_PEERS)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the header lock, for moments only. Reentrant."""
        with self._thread_lock:
            if not self._depth and self._lock_fd >= 0:
                self._locks.acquire(_HEADER_LOCK, wait=True)
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if not self._depth and self._lock_fd >= 0:
                    self._locks.release(_HEADER_LOCK)

    # Slots

    def used_slots(self) -> range:
        """Every slot that was ever claimed."""
        return range(int(self.words[_NUM_USED_SLOTS]))

    def pid(self, slot: int) -> int:
        """The process id of a slot's holder; 0 if the slot is FREE."""
        return int(self.words[self.slot_offset(slot) + _HOLDER]) & ~_FAILED

    def shares_pid_namespace(self, slot: int) -> bool:
        """Whether the process id of a slot's holder means the same process in this PID namespace."""
        theirs = self.get_word(slot, _PID_NAMESPACE)
        return theirs != 0 and theirs == self.get_word(self.slot, _PID_NAMESPACE)

    def was_shared(self) -> bool:
        """Whether another process ever had a slot."""
        return int(self.words[_LAST_PEER_ID]) > 1

    def peer_id(self, slot: int) -> int:
        """The id of the peer that holds a slot, or held it last."""
        return int(self.words[self.slot_offset(slot) + _PEER_ID])

    @property
    def num_deaths(self) -> int:
        """How many peers have died or failed. Only grows."""
        return int(self.words[_NUM_REPLACED_DEATHS]) + sum(not alive for _, alive in self.other_slots())

    def other_slots(self) -> Iterator[tuple[int, bool]]:
        """The slots of other peers that have not left, and whether the peer is alive: it may have died or failed."""
        return ((slot, alive) for slot, _, alive in self.other_peers())

    def other_peers(self) -> Iterator[tuple[int, int, bool]]:
        """The same, with the peer's id in between."""
        for slot in self.used_slots():
            if slot == self.slot:
                continue
            while True:  # a peer that claims the slot again takes its lock before it changes the id
                peer_id = self.peer_id(slot)
                alive = self._is_peer_alive(slot)
                if peer_id == self.peer_id(slot):
                    break
            if alive is not None:
                yield slot, peer_id, alive

    def _is_peer_alive(self, slot: int) -> bool | None:
        """Whether a slot's peer is alive; None if the slot is FREE. A peer that leaves meanwhile has not died."""
        at = self.slot_offset(slot) + _HOLDER
        while holder := self.words[at]:
            if self.is_alive(slot):
                return True
            # A peer that leaves writes 0 before it releases the lock.
            if self.words[at] == holder and not self.is_alive(slot):
                return False
        return None

    def has_failed(self, slot: int) -> bool:
        """Whether a slot's peer is a worker that ended with an error, and was not killed."""
        return bool(self.words[self.slot_offset(slot) + _HOLDER] & _FAILED)

    def is_alive(self, slot: int) -> bool:
        """Whether a slot's holder is alive and has not failed."""
        if slot == self.slot:
            return True
        return not self.has_failed(slot) and self._locks.is_held(_FIRST_SLOT_LOCK + slot)

    # Counts

    def counter(self, word: int) -> Callable[[], None]:
        """A function that adds one to a word of this process's slot, in any thread. Nothing else may change the word.

        Each item of a channel costs calls of it. With the GIL it is a single call of C code, which no other thread can
        interrupt between reading and writing. Without the GIL it takes a lock.
        """
        at = self.slot_offset(self.slot) + word
        native: Callable[[], None] | None = self.native_word(at)
        if native is not None:
            return native
        count = map(self.words.__setitem__, itertools.repeat(at), itertools.count(int(self.words[at]) + 1)).__next__
        if HAS_GIL:
            return count
        lock = threading.Lock()

        def count_locked() -> None:
            with lock:
                count()

        return count_locked

    def add(self, word: int, number: int) -> None:
        """Add to a word of this process's slot, unless it has left."""
        with self.locked():
            if self.fd >= 0:
                self.words[self.slot_offset(self.slot) + word] += number

    def set_word(self, word: int, value: int) -> None:
        """Write a word of this process's slot, unless it has left."""
        with self.locked():
            if self.fd >= 0:
                self.words[self.slot_offset(self.slot) + word] = value

    def get_word(self, slot: int, word: int) -> int:
        return int(self.words[self.slot_offset(slot) + word])

    def sum(self, word: int) -> int:
        """Sum of a word over all slots."""
        return sum(self._memory.column(word, int(self.words[_NUM_USED_SLOTS])))

    # Handles in flight to other processes

    def count_handles_sent(self, number: int) -> None:
        """``number`` more handles are about to leave for other processes; if negative, they were not sent after all."""
        self.add(_HANDLES_SENT, number)

    def count_handle_received(self) -> None:
        """A handle has arrived in this process."""
        self.add(_HANDLES_RECEIVED, 1)

    def any_handle_sent(self) -> bool:
        """Whether a handle ever left for another process."""
        return self.sum(_HANDLES_SENT) > 0

    def any_handle_in_flight(self) -> bool:
        """Whether a handle is on its way to another process, or lost with its message."""
        return self.sum(_HANDLES_SENT) > self.sum(_HANDLES_RECEIVED)

    # Leaving

    def leave(self, *, failed: bool = False, keep_memory: bool = False) -> None:
        """Give up the slot and the memory. May be called again.

        Args:
            failed: this process ends with an error, so it will not do what others wait for.
            keep_memory: the process ends, and other threads may still count.
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
        """Give up the descriptors, and with them the locks, without leaving."""
        self._thread_lock, self._depth = threading.RLock(), 0  # after a fork its holder may be a thread of the parent
        self._close()

    def _close(self) -> None:
        self._memory.abandon()
        fds, self._lock_fd, self.notify_fd = (self._lock_fd, self.notify_fd), -1, -1
        descriptors.close_fds(fds)
