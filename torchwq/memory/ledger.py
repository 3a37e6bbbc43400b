"""The counters by which the processes of one tree know when a block of shared memory may be used again.

Why counters in shared memory and not messages: a reference to a block may be passed on by any process to any other,
sits in sockets meanwhile, and its holder may be killed at any instruction. A message "I am done" needs someone who
reads it and says nothing about what is still under way; a counter is there when it is looked at, whoever has died.

One ledger per tree, mapped by each of its processes. A *slot* is a process, a *row* is a block. For each of both the
ledger has two words, which only the process of that slot writes:

* ``sent``: how many references to the block the process has put into messages;
* ``got``: how many it has taken out of messages, and the flags ``HELD`` (it has tensors on the block now), ``PINNED``
  (someone outside of this accounting may use the block, for as long as it likes) and ``KEPT`` (it has the block's
  memory, and promises to have it still when it reads a message that was sent while the flag was set).

Both begin with the *generation* of the row that they speak of. The maker of a block sets the row's generation. A word
of another generation counts as zero, so that a row is given to another block by raising its generation, without asking
anybody. What happens to the old block's memory afterwards is between those who have mapped it: it is never used again.

Invariants:

* ``sent`` is raised *before* the message can be received, ``got`` after; ``HELD`` is set in the same store that raises
  ``got``. So between a reference's leaving and the drop of its tensor, ``sent`` is ahead of ``got`` or ``HELD`` is set.
* Both only grow, for as long as the generation lasts. A reference whose message was not sent after all is counted as
  got by its sender.
* A block may be used again if no process holds it, none has pinned it, and all that was sent was got
  (:meth:`Ledger.state`). ``got`` is read before ``sent``: if the sums are equal, nothing was under way in between, so
  nobody can have begun to hold it after being looked at. A process that came meanwhile makes the answer "no".
* A process that is killed leaves its counters, which are history and stay true, and its ``HELD`` flags, which are
  not believed any more: its *lock* on its slot's byte is gone, which the kernel releases after its memory.
* A process killed between receiving a message and counting it leaves ``sent`` ahead for ever, and so do messages
  that nobody will read. Such a block is not used again; its maker gives it up after a while (``recycling``).
* A sender counts first and looks for ``KEPT`` then; whoever withdraws ``KEPT`` does that first and looks then for what
  is under way. So at least one of the two sees the other: either the message brings a descriptor, or the memory is
  kept until the message is there (``recycling``).
* Rows belong to processes in chunks, by locks on the chunks' bytes: what a dead maker had can be taken over.

The locks are open file description locks: they belong to this process's own opening of the file, which a forked child
closes at once.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import struct
import threading
from collections import deque
from collections.abc import Sequence
from typing import Final

import numpy as np

from ..transport import descriptors, namespace
from ..transport.process import closed_in_child, reset_in_child

SLOTS: Final = 512
ROWS: Final = 32768
_CHUNK: Final = 64

#: What a message says of a block that is in no ledger.
UNTRACKED: Final = 2**64 - 1

FREE, IN_FLIGHT, IN_USE, GIVEN_AWAY = range(4)

HELD: Final = 1
PINNED: Final = 2
KEPT: Final = 4
_IN_USE: Final = HELD | PINNED
_FLAGS: Final = HELD | PINNED | KEPT
_ONE: Final = 8
_COUNT: Final = 0xFFFFFFFF - _FLAGS
_LOW: Final = 0xFFFFFFFF

# In words of 8 bytes: the head (how many slots were ever used, and where generations begin); for each row its
# generation and, in the upper half, the last one that was given back while messages may have referred to its block;
# then for each slot its words, two for each row.
_USED: Final = 0
_SALT: Final = 1
_GENERATIONS: Final = 512
_COLUMNS: Final = _GENERATIONS + ROWS
_STRIDE: Final = 2 * ROWS
_NBYTES: Final = 8 * (_COLUMNS + SLOTS * _STRIDE)
#: From so many processes on, numpy adds faster than a loop.
_MANY: Final = 24

# Which byte's lock means what.
_CHUNK_LOCKS: Final = SLOTS
_CLAIM_LOCK: Final = SLOTS + ROWS // _CHUNK
_FLOCK: Final = struct.Struct("@hhqqi4x")

_FILE: Final = "ledger"


class Ledger:
    """This process's mapping of the tree's ledger. Not safe by itself: used under ``recycling``'s lock."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._mapping = descriptors.mapped(fd, _NBYTES)
        self._words = memoryview(self._mapping).cast("Q")
        self._fence = threading.RLock()
        self._rows: deque[int] = deque()
        self._next_chunk = 0
        closed_in_child(self)
        self.slot = self._claim_slot()
        self._column = _COLUMNS + self.slot * _STRIDE
        # A row of this has the words of all slots for one row of the ledger.
        self._array = np.frombuffer(self._mapping, np.uint64, SLOTS * _STRIDE, 8 * _COLUMNS).reshape(SLOTS, ROWS, 2)

    # Locks

    def _lock(self, command: int, byte: int) -> bool:
        try:
            fcntl.fcntl(self._fd, command, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
        except BlockingIOError:
            return False
        return True

    def _unlock(self, byte: int) -> None:
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, byte, 1, 0))

    def is_alive(self, slot: int) -> bool:
        """Whether the process of ``slot`` is still there."""
        if slot == self.slot:
            return True
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, slot, 1, 0)
        answer = fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, asked)
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)

    def _claim_slot(self) -> int:
        """A slot of this process's own. What its last process held is held no more; its counters go on."""
        self._lock(fcntl.F_OFD_SETLKW, _CLAIM_LOCK)
        try:
            for slot in range(SLOTS):
                if self._lock(fcntl.F_OFD_SETLK, slot):
                    break
            else:
                raise OSError(f"more than {SLOTS} processes share memory in one tree")
            if slot < self._words[_USED]:
                self._clear_flags(slot)
            else:
                self._words[_USED] = slot + 1
            return slot
        finally:
            self._unlock(_CLAIM_LOCK)

    def _clear_flags(self, slot: int) -> None:
        words = self._words
        position = 8 * (_COLUMNS + slot * _STRIDE)
        end = position + 8 * _STRIDE
        while position < end:
            try:  # reading what was never written would take memory for it
                position = os.lseek(self._fd, position, os.SEEK_DATA)
            except OSError:
                return
            hole = min(os.lseek(self._fd, position, os.SEEK_HOLE), end)
            for index in range(position // 8 + 1, hole // 8, 2):
                if words[index] & (HELD | KEPT):
                    words[index] &= ~(HELD | KEPT)
            position = hole

    # Rows

    def new_row(self) -> int | None:
        """A row with a fresh generation, as one number: that of a block. None if there is none left."""
        if not self._rows and not self._claim_chunk():
            return None
        row = self._rows.popleft()
        return self._raise_generation(row, clean=True) << 32 | row

    def give_back(self, number: int, clean: bool) -> None:
        """The block is used no more under this number; whoever still has it keeps its memory.

        ``clean``: it was FREE, so that no message refers to it, and none ever will.
        """
        self._raise_generation(number & _LOW, clean)
        self._rows.append(number & _LOW)

    def _raise_generation(self, row: int, clean: bool) -> int:
        index = _GENERATIONS + row
        word = self._words[index]
        before, unclean = word & _LOW, word >> 32
        generation = (before or self._words[_SALT]) + 1 & _LOW or 1
        self._words[index] = (unclean if clean else before) << 32 | generation
        return int(generation)

    def _claim_chunk(self) -> bool:
        chunks = ROWS // _CHUNK
        while self._next_chunk < chunks:
            # Begin where other processes are not likely to be.
            chunk = (self._next_chunk + self.slot * 7) % chunks
            self._next_chunk += 1
            if self._lock(fcntl.F_OFD_SETLK, _CHUNK_LOCKS + chunk):
                for row in range(chunk * _CHUNK, (chunk + 1) * _CHUNK):
                    if self._words[_GENERATIONS + row]:
                        self._raise_generation(row, clean=False)  # its last owner is dead
                    self._rows.append(row)
                return True
        return False

    def is_current(self, number: int) -> bool:
        """Whether the number still stands for the block that it was given to."""
        return number != UNTRACKED and bool(self._words[_GENERATIONS + (number & _LOW)] & _LOW == number >> 32)

    def has_maker(self, number: int, lives: dict[int, bool]) -> bool:
        """Whether the block's maker is there, and has not given it up. Only of blocks that other processes have made.

        ``lives`` keeps, for a series of calls, what was found of each chunk of rows.
        """
        chunk = (number & _LOW) // _CHUNK
        if chunk not in lives:
            asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _CHUNK_LOCKS + chunk, 1, 0)
            answer = fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, asked)
            lives[chunk] = _FLOCK.unpack(answer)[0] != fcntl.F_UNLCK
        return lives[chunk] and self.is_current(number)

    def _was_clean(self, number: int) -> bool:
        """Whether a number that is not current was given back when no message referred to its block."""
        unclean = self._words[_GENERATIONS + (number & _LOW)] >> 32
        return bool(0 < (number >> 32) - unclean & _LOW < _LOW // 2)

    # Counting

    def count_sent(self, number: int) -> None:
        """A reference is about to leave in a message. Of a number that is not current nothing is counted."""
        words = self._words
        index = self._column + 2 * (number & _LOW)
        word = words[index]
        generation = number >> 32
        if word >> 32 == generation and word & _COUNT != _COUNT:
            words[index] = word + _ONE  # if it is not current, nobody believes the word
            return
        if self.is_current(number):
            count = word & _LOW if word >> 32 == generation else 0
            words[index] = generation << 32 | (count + _ONE & _LOW)

    def count_got(self, number: int, flags: int) -> None:
        """A reference was taken out of a message. ``flags``: what this process does with the block from now on."""
        words = self._words
        generation, row = number >> 32, number & _LOW
        index = self._column + 2 * row + 1
        word = words[index]
        if word >> 32 == generation and word & _COUNT != _COUNT:
            words[index] = word + _ONE | flags
            return
        if self.is_current(number):
            count = word & _LOW if word >> 32 == generation else 0
            words[index] = generation << 32 | (count + _ONE & _LOW) | flags

    def set_flag(self, number: int, flag: int) -> None:
        generation = number >> 32
        index = self._column + 2 * (number & _LOW) + 1
        word = self._words[index]
        if word >> 32 == generation:
            self._words[index] = word | flag
        elif self.is_current(number):
            self._words[index] = generation << 32 | flag

    def clear_flag(self, number: int, flag: int) -> bool:
        """Returns whether it was set."""
        index = self._column + 2 * (number & _LOW) + 1
        word = self._words[index]
        if word >> 32 != number >> 32 or not word & flag:
            return False
        self._words[index] = word & ~flag
        return True

    def are_kept(self, numbers: Sequence[int], slot: int) -> bool:
        """Whether the process of ``slot`` has promised to have all of these blocks. After ``count_sent``."""
        with self._fence:
            pass
        column = _COLUMNS + slot * _STRIDE + 1
        for number in numbers:
            if number == UNTRACKED:
                return False
            word = self._words[column + 2 * (number & _LOW)]
            if word >> 32 != number >> 32 or not word & KEPT:
                return False
        return True

    def is_under_way(self, number: int) -> bool:
        """Whether a reference to a block may be under way. After KEPT was withdrawn."""
        if not self.is_current(number):
            return not self._was_clean(number)
        with self._fence:
            pass
        words, used = self._words, self._words[_USED]
        generation = number >> 32
        first = _COLUMNS + 2 * (number & _LOW)
        end = first + used * _STRIDE
        got = sum(word & ~_FLAGS for word in words[first + 1 : end : _STRIDE] if word >> 32 == generation)
        with self._fence:
            pass
        sent = sum(word for word in words[first:end:_STRIDE] if word >> 32 == generation)
        return bool(sent - got & _LOW or words[_USED] != used or not self.is_current(number))

    def state(self, number: int) -> int:
        """FREE, IN_FLIGHT, IN_USE (held by a living process) or GIVEN_AWAY (pinned): what others do with the block."""
        words = self._words
        used = words[_USED]
        if used > _MANY:
            return self._state_of_many(number, used)
        generation = number >> 32
        first = _COLUMNS + 2 * (number & _LOW)
        end = first + used * _STRIDE
        got = sent = 0
        for slot, word in enumerate(words[first + 1 : end : _STRIDE]):
            if word >> 32 == generation:
                if word & _IN_USE:
                    if word & PINNED:
                        return GIVEN_AWAY
                    if self.is_alive(slot):
                        return IN_USE
                got += word & ~_FLAGS
        # The order of these loads and those is what the answer rests on.
        with self._fence:
            pass
        for word in words[first:end:_STRIDE]:
            if word >> 32 == generation:
                sent += word
        if sent - got & _LOW or words[_USED] != used:
            return IN_FLIGHT
        return FREE

    def _state_of_many(self, number: int, used: int) -> int:
        generation, row = number >> 32, number & _LOW
        got = self._array[:used, row, 1].copy()
        got = np.where(got >> np.uint64(32) == generation, got & np.uint64(_LOW), 0)
        for slot in np.flatnonzero(got & np.uint64(_IN_USE)):
            if int(got[slot]) & PINNED:
                return GIVEN_AWAY
            if self.is_alive(int(slot)):
                return IN_USE
        with self._fence:
            pass
        sent = self._array[:used, row, 0].copy()
        sent = np.where(sent >> np.uint64(32) == generation, sent & np.uint64(_LOW), 0)
        if int(sent.sum()) - int((got & ~np.uint64(_FLAGS)).sum()) & _LOW or self._words[_USED] != used:
            return IN_FLIGHT
        return FREE

    def abandon(self) -> None:
        del self._array
        self._words.release()
        self._mapping.close()
        os.close(self._fd)


_lock = threading.RLock()
_ledger: Ledger | None = None
_tried = False
#: In the process that has made the tree's namespace: the ledger's memory, which others open through this descriptor.
_made_fd = -1


@reset_in_child
def _forget() -> None:
    global _lock, _ledger, _tried, _made_fd
    _lock, _ledger, _tried = threading.RLock(), None, False
    if _made_fd >= 0:
        os.close(_made_fd)
        _made_fd = -1


def _found(path: str) -> None:
    """This process has made a namespace: a ledger belongs to it."""
    global _made_fd
    try:
        if _made_fd < 0:
            fd = descriptors.above(os.memfd_create("torchwq-ledger", os.MFD_CLOEXEC))
            os.ftruncate(fd, _NBYTES)
            os.pwrite(fd, struct.pack("=Q", secrets.randbits(31)), 8 * _SALT)
            _made_fd = fd
        os.symlink(f"/proc/{os.getpid()}/fd/{_made_fd}", f"{path}/{_FILE}")
    except (AttributeError, OSError):
        pass  # not on this system: tensors travel by descriptor alone


namespace.on_made(_found)


def current() -> Ledger | None:
    """The ledger of this process's tree; None if there is none that this process can use."""
    global _ledger, _tried
    if _ledger is None and not _tried:
        with _lock:
            if not _tried:
                _ledger = _open()
                _tried = True
    return _ledger


def _open() -> Ledger | None:
    if not hasattr(fcntl, "F_OFD_SETLK") or not hasattr(os, "SEEK_DATA"):
        return None
    try:
        fd = descriptors.open_file(f"{namespace.current().path}/{_FILE}", os.O_RDWR)
    except OSError:
        return None
    try:
        return Ledger(fd)
    except OSError:
        os.close(fd)
        return None
