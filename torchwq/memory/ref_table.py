"""The counters by which the processes of one tree know when a block of shared memory may be used again.

Why counters in shared memory and not messages: a reference to a block may be passed on by any process to any other,
sits in sockets meanwhile, and its holder may be killed at any instruction. A message "I am done" needs someone who
reads it and says nothing about what is still under way; a counter is there when it is looked at, whoever has died.

There is one reference table per tree, which each of its processes maps. A *slot* is a process, a *row* is a block. For
each pair of both the table has two words, which only the process of that slot writes:

* ``sent``: how many references to the block the process has put into messages;
* ``got``: how many it has taken out of messages, and the flags ``IN_USE`` (it has tensors on the block now) and
  ``ESCAPED`` (someone outside of this accounting may use the block, for as long as it likes).

Both begin with the *generation* of the row that they speak of. The maker of a block sets the row's generation. A word
of another generation counts as zero, so that a row is given to another block by raising its generation, without asking
anybody. What happens to the old block's memory afterwards is between those who have mapped it: it is never used again.

Invariants:

* ``sent`` is raised *before* the message can be received, ``got`` after; ``IN_USE`` is set in the same store that
  raises ``got``. So between a reference's leaving and the drop of its tensor, ``sent`` is ahead of ``got`` or
  ``IN_USE`` is set.
* Both only grow, for as long as the generation lasts. A reference whose message was not sent after all is counted as
  got by its sender.
* A block may be used again if no process holds it, none has pinned it, and all that was sent was got
  (:meth:`RefTable.state`). ``got`` is read before ``sent``: if the sums are equal, nothing was under way in between, so
  nobody can have begun to hold it after being looked at. A process that came meanwhile makes the answer "no".
* A process that is killed leaves its counters, which are history and stay true, and its ``IN_USE`` flags, which are
  not believed any more: its *lock* on its slot's byte is gone, which the kernel releases after its memory.
* A process killed between receiving a message and counting it leaves ``sent`` ahead for ever, and so do messages
  that nobody will read. Such a block is not used again; its maker gives it up after a while (``recycling``).
* Rows belong to processes in chunks, by locks on the chunks' bytes: what a dead maker had, and what a living one has
  given back, can be taken over (``rows``).
* What is opened by another process's descriptor is looked at before a byte of it is changed: that process may have
  ended, or begun another program, and its id or its descriptor's number may stand for something else now.

The locks (``peers.record_locks``) belong to this process's own opening of the file; a forked child closes it at once.

Note [where the table lies]
~~~~~~~~~~~~~~~~~~~~~~~~~~~
Whoever first touches a page, be it for reading, takes memory for it, and the maker of a block reads the words that all
slots have for its row. So these should lie on few pages, side by side. But a tree of few processes may have many
blocks, and should not take a page for each. So the words for a row are side by side for ``TILE`` slots at a time. The
table is a row of such *tiles*, each with all rows. Measured, with one block for each process: 300 processes take 6 MiB,
and 23 µs a look; with the words of each slot side by side they took 150 MiB, and 42 µs. Two processes with 5,000 blocks
each take 10 MiB (0.4).

Note [order of loads]
~~~~~~~~~~~~~~~~~~~~~
``state`` rests on loads being done in their order, and on a store being seen before a later one of the same process.
x86-64 keeps both (Intel SDM, volume 3, "Memory Ordering"). It is not proven for other machines, nor without a GIL,
which keeps the threads of a process from changing its words at once: there is no table there, and memory is not used
again.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import platform
import secrets
import stat
import struct
import threading
import time
from typing import Final

import numpy as np

from ..errors import NamespaceError
from ..peers.record_locks import RecordLocks
from ..transport import descriptors, namespace
from ..transport.atomic import HAS_GIL
from ..transport.fork import closed_in_child, reset_in_child
from .rows import CHUNK, Rows

SLOTS: Final = 512
ROWS: Final = 32768

#: What a message says of a block that has no row.
UNTRACKED: Final = 2**64 - 1

#: What other processes do with a block. The second and the third are also the flags that say so.
FREE, IN_USE, ESCAPED, IN_FLIGHT = range(4)

_FLAGS: Final = IN_USE | ESCAPED
_REFERENCE: Final = 4
_COUNT: Final = 0xFFFFFFFF - _FLAGS
_LOW: Final = 0xFFFFFFFF

# In words of 8 bytes: the head (how many slots were ever used, and where generations begin, a random number); for each
# row its generation; then the tiles: for each row two words of each of the tile's slots.
_USED_SLOTS: Final = 0
_FIRST_GENERATION: Final = 1
_GENERATIONS: Final = 512
_TILES: Final = _GENERATIONS + ROWS
TILE: Final = 64
_STRIDE: Final = 2 * TILE
_WORDS_OF_TILE: Final = ROWS * _STRIDE
_NBYTES: Final = 8 * (_TILES + SLOTS // TILE * _WORDS_OF_TILE)
#: From so many processes on, numpy adds faster than a loop.
_NUMPY_FROM: Final = 24

# Which byte's lock means what.
_CHUNK_LOCKS: Final = SLOTS
_CLAIM_LOCK: Final = SLOTS + ROWS // CHUNK

_FILE: Final = "ref-table"
_MEMFD: Final = "torchwq-ref-table"
#: Seconds until what could not be opened is tried again: processes end, and then there are slots, and other folders.
_RETRY_INTERVAL: Final = 10.0


class RefTable:
    """This process's mapping of the tree's reference table. Not safe by itself: used under ``recycling``'s lock."""

    def __init__(self, fd: int) -> None:
        """Take over ``fd``. Raises NamespaceError if it is no table, or OSError; ``fd`` is the caller's again then."""
        _check_is_table(fd)
        self._fd = fd
        self._locks = RecordLocks(fd)
        self._mapping = descriptors.map_file(fd, _NBYTES)
        self._words = memoryview(self._mapping).cast("Q")
        tiles = np.frombuffer(self._mapping, np.uint64, offset=8 * _TILES)
        self._array = tiles.reshape(-1, ROWS, TILE, 2)
        closed_in_child(self)
        try:
            self.slot = self._claim_slot()
        except BaseException:
            self._fd = -1
            raise
        #: Where this process's words of row 0 are.
        self._first = _TILES + self.slot // TILE * _WORDS_OF_TILE + self.slot % TILE * 2
        self._rows = Rows(
            ROWS // CHUNK,
            self.slot * 7,
            lambda chunk: self._locks.acquire(_CHUNK_LOCKS + chunk),
            lambda chunk: self._locks.release(_CHUNK_LOCKS + chunk),
            self._reclaim_row,
        )

    def is_alive(self, slot: int) -> bool:
        """Whether the process of ``slot`` is still there."""
        return slot == self.slot or self._locks.is_held(slot)

    def _claim_slot(self) -> int:
        """A slot of this process's own. What its last process held is held no more; its counters go on."""
        self._locks.acquire(_CLAIM_LOCK, wait=True)
        try:
            for slot in range(SLOTS):
                if self._locks.acquire(slot):
                    break
            else:
                raise OSError(f"more than {SLOTS} processes share memory in one tree")
            if slot < self._words[_USED_SLOTS]:
                self._clear_flags(slot)
            else:
                self._words[_USED_SLOTS] = slot + 1
            return slot
        finally:
            self._locks.release(_CLAIM_LOCK)

    def _clear_flags(self, slot: int) -> None:
        words = self._words
        start = 8 * (_TILES + slot // TILE * _WORDS_OF_TILE)
        position, end = start, start + 8 * _WORDS_OF_TILE
        while position < end:
            try:  # reading what was never written would take memory for it
                position = os.lseek(self._fd, position, os.SEEK_DATA)
            except OSError:
                return
            hole = min(os.lseek(self._fd, position, os.SEEK_HOLE), end)
            rows = range((position - start) // (8 * _STRIDE), -(-(hole - start) // (8 * _STRIDE)))
            first = start // 8 + slot % TILE * 2 + 1
            for index in range(first + rows.start * _STRIDE, first + rows.stop * _STRIDE, _STRIDE):
                if words[index] & IN_USE:
                    words[index] &= ~IN_USE
            position = hole

    # Rows

    def take_row(self) -> int | None:
        """A row with a fresh generation, as one number: that of a block. None if there is none left."""
        row = self._rows.take()
        return None if row is None else self._raise_generation(row) << 32 | row

    def release_row(self, number: int) -> None:
        """The block is used no more under this number; whoever still has it keeps its memory."""
        self._raise_generation(number & _LOW)
        self._rows.release(number & _LOW)

    def _raise_generation(self, row: int) -> int:
        index = _GENERATIONS + row
        generation = (self._words[index] or self._words[_FIRST_GENERATION]) + 1 & _LOW or 1
        self._words[index] = generation
        return int(generation)

    def _reclaim_row(self, row: int) -> None:
        if self._words[_GENERATIONS + row]:
            self._raise_generation(row)  # its last owner may be dead

    def is_current(self, number: int) -> bool:
        """Whether the number still stands for the block that it was given to."""
        return number != UNTRACKED and bool(self._words[_GENERATIONS + (number & _LOW)] == number >> 32)

    def has_maker(self, number: int, alive: dict[int, bool]) -> bool:
        """Whether the block's maker is there, and has not given it up. Only of blocks that other processes have made.

        ``alive`` keeps, for a series of calls, what was found of each chunk of rows.
        """
        chunk = (number & _LOW) // CHUNK
        if chunk not in alive:
            alive[chunk] = self._locks.is_held(_CHUNK_LOCKS + chunk)
        return alive[chunk] and self.is_current(number)

    # Counting

    def count_sent(self, number: int) -> None:
        """A reference is about to leave in a message. Of a number that is not current nothing is counted."""
        words = self._words
        index = self._first + _STRIDE * (number & _LOW)
        word = words[index]
        generation = number >> 32
        if word >> 32 == generation and word & _COUNT != _COUNT:
            words[index] = word + _REFERENCE  # if it is not current, nobody believes the word
            return
        if self.is_current(number):
            count = word & _LOW if word >> 32 == generation else 0
            words[index] = generation << 32 | (count + _REFERENCE & _LOW)

    def count_received(self, number: int, flags: int) -> None:
        """A reference was taken out of a message. ``flags``: what this process does with the block from now on."""
        words = self._words
        generation, row = number >> 32, number & _LOW
        index = self._first + _STRIDE * row + 1
        word = words[index]
        if word >> 32 == generation and word & _COUNT != _COUNT:
            words[index] = word + _REFERENCE | flags
            return
        if self.is_current(number):
            count = word & _LOW if word >> 32 == generation else 0
            words[index] = generation << 32 | (count + _REFERENCE & _LOW) | flags

    def set_flag(self, number: int, flag: int) -> None:
        generation = number >> 32
        index = self._first + _STRIDE * (number & _LOW) + 1
        word = self._words[index]
        if word >> 32 == generation:
            self._words[index] = word | flag
        elif self.is_current(number):
            self._words[index] = generation << 32 | flag

    def clear_flag(self, number: int, flag: int) -> None:
        index = self._first + _STRIDE * (number & _LOW) + 1
        word = self._words[index]
        if word >> 32 == number >> 32:
            self._words[index] = word & ~flag

    def state(self, number: int) -> int:
        """FREE, IN_FLIGHT, IN_USE (held by a living process) or ESCAPED (pinned): what others do with the block."""
        words = self._words
        used = words[_USED_SLOTS]
        if used > _NUMPY_FROM:
            return self._state_of_many(number, used)
        generation = number >> 32
        first = _TILES + _STRIDE * (number & _LOW)
        end = first + 2 * used
        got = sent = 0
        for slot, word in enumerate(words[first + 1 : end : 2]):
            if word >> 32 == generation:
                if word & _FLAGS:
                    if word & ESCAPED:
                        return ESCAPED
                    if self.is_alive(slot):
                        return IN_USE
                got += word & ~_FLAGS
        for word in words[first:end:2]:  # see Note [order of loads]
            if word >> 32 == generation:
                sent += word
        if sent - got & _LOW or words[_USED_SLOTS] != used:
            return IN_FLIGHT
        return FREE

    def _state_of_many(self, number: int, used: int) -> int:
        generation, row = number >> 32, number & _LOW
        tiles = -(-used // TILE)
        got = self._array[:tiles, row, :, 1].reshape(-1)  # a copy
        got = np.where(got >> np.uint64(32) == generation, got & np.uint64(_LOW), 0)
        for slot in np.flatnonzero(got & np.uint64(_FLAGS)):
            if int(got[slot]) & ESCAPED:
                return ESCAPED
            if self.is_alive(int(slot)):
                return IN_USE
        sent = self._array[:tiles, row, :, 0].reshape(-1)  # see Note [order of loads]
        sent = np.where(sent >> np.uint64(32) == generation, sent & np.uint64(_LOW), 0)
        if int(sent.sum()) - int((got & ~np.uint64(_FLAGS)).sum()) & _LOW or self._words[_USED_SLOTS] != used:
            return IN_FLIGHT
        return FREE

    def abandon(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            del self._array
            self._words.release()
            self._mapping.close()
            os.close(fd)


def _check_is_table(fd: int) -> None:
    """Raise NamespaceError unless ``fd`` is a reference table that this user has made."""
    info = os.fstat(fd)
    name = os.readlink(f"/proc/self/fd/{fd}")
    try:
        sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _seals() == _seals()
    except OSError:  # it is of a kind that has none
        sealed = False
    expected = info.st_size == _NBYTES and info.st_uid == os.geteuid()
    if not (expected and sealed and name.startswith(f"/memfd:{_MEMFD}")):
        raise NamespaceError(errno.EINVAL, f"this is no reference table of torchwq: {name}, {info.st_size} bytes")


def _seals() -> int:
    """What makes sure that a mapping of it never ends before its last word."""
    return fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


_lock = threading.RLock()
_table: RefTable | None = None
_retry_at = 0.0
#: Whether a thread is about to open it: a finalizer that it runs meanwhile does without.
_is_opening = False
#: Why this process has no reference table although the system could have one; "" if there is nothing to be said.
failure_reason = ""
#: In the process that has made the tree's namespace: the table's memory, which others open through this descriptor.
_made_fd = -1


@reset_in_child
def _reset() -> None:
    global _lock, _table, _retry_at, _is_opening, failure_reason, _made_fd
    _lock, _table, _retry_at, _is_opening, failure_reason = threading.RLock(), None, 0.0, False, ""
    if _made_fd >= 0:
        os.close(_made_fd)
        _made_fd = -1


def _on_namespace_made(path: str) -> None:
    """This process has made a namespace: a reference table belongs to it."""
    global _made_fd, _retry_at
    try:
        if _made_fd < 0:
            _made_fd = _create()
        os.symlink(f"/proc/{os.getpid()}/fd/{_made_fd}", f"{path}/{_FILE}")
        _retry_at = 0.0
    except (AttributeError, OSError):
        pass  # not on this system: tensors travel by descriptor alone


def _create() -> int:
    fd = descriptors.above_stdio(os.memfd_create(_MEMFD, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    try:
        os.ftruncate(fd, _NBYTES)
        os.pwrite(fd, struct.pack("=Q", secrets.randbits(32)), 8 * _FIRST_GENERATION)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _seals())
    except BaseException:
        os.close(fd)
        raise
    return fd


namespace.on_made(_on_namespace_made)


def current() -> RefTable | None:
    """The reference table of this process's tree; None if there is none that this process can use."""
    global _table, _retry_at, _is_opening
    if _table is None and time.monotonic() >= _retry_at:
        with _lock:
            if not _is_opening and time.monotonic() >= _retry_at:  # else another thread was here meanwhile
                _is_opening = True
                try:
                    _table = _open()
                    _retry_at = time.monotonic() + _RETRY_INTERVAL
                finally:
                    _is_opening = False
    return _table


@functools.cache
def _is_supported() -> bool:
    if not HAS_GIL or platform.machine() not in ("x86_64", "AMD64"):  # see Note [order of loads]
        return False
    return all(hasattr(*each) for each in ((os, "SEEK_DATA"), (fcntl, "F_OFD_SETLK"), (fcntl, "F_GET_SEALS")))


def _open() -> RefTable | None:
    global failure_reason
    failure_reason = ""
    if not _is_supported():
        return None
    path = f"{namespace.current().path}/{_FILE}"
    try:
        place = os.readlink(path)
    except OSError:
        return None
    fd = -1
    try:
        # Opening has effects of its own on what is no file.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise NamespaceError(errno.EINVAL, "this is no reference table of torchwq, and no file")
        fd = descriptors.open_file(path, os.O_RDWR)
        return RefTable(fd)
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        failure_reason = (
            f"{place}, where the process that has made {path} had its reference table: {error}. If that process has "
            f"ended, or is in another PID namespace, unset {namespace.VARIABLE}, so that this one makes a folder"
        )
        return None
