"""The counters by which the processes of one tree know when a block of shared memory may be used again.

Why counters in shared memory and not messages: any process may pass a reference to a block on to any other, the
reference waits in sockets meanwhile, and its holder may be killed at any instruction. A message "I am done" needs a
reader, and says nothing about references in flight. A counter can be read at any time, whoever has died.

There is one reference table per tree, which each of its processes maps. A *slot* is a process, a *row* is a block. For
each pair of both the table has two words, which only the process of that slot writes:

* ``sent``: how many references to the block the process has put into messages;
* ``received``: how many it has taken out of messages, and the flags ``IN_USE`` (it has tensors on the block now) and
  ``ESCAPED`` (a process that does not count may use the block, for as long as it likes).

Both begin with the *generation* of the row. The maker of a block sets the row's generation. A word of another
generation counts as zero, so the maker gives a row to another block by raising its generation, without asking anybody.
The old block's memory is never used again, and is freed when nobody maps it any more.

Note [reference counts]
~~~~~~~~~~~~~~~~~~~~~~~
* ``sent`` is raised *before* the message can be received, ``received`` after. The store that raises ``received`` also
  sets ``IN_USE``. So until the tensor of a reference is dropped, ``sent`` is ahead or ``IN_USE`` is set.
* Both only grow within a generation. The sender of a message that was not sent after all counts its references as
  received.
* A block may be used again if no process has it in use, it has not escaped, and as many references were received as
  sent (``Counts.state``). ``received`` is read before ``sent``: if the sums are equal, no reference was in flight
  in between, so no process can have begun to use the block after its word was read. If a process has joined meanwhile,
  the answer is no.
* A process that is killed leaves its counters, which stay true, and its ``IN_USE`` flags, which nobody believes any
  more: the kernel has released its lock on its slot's byte, after its memory.
* A process killed between receiving a message and counting it leaves ``sent`` ahead for ever, and so does a message
  that nobody reads. The block's maker retires such a block after a while (``recycling``).
* Processes own rows in chunks, by locks on the chunks' bytes. Another process can take over the chunks of a dead one,
  and those that a living one has released (``rows``).

The locks (``peers.record_locks``) belong to this process's own opening of the file; a forked child closes it at once.

Note [layout of the table]
~~~~~~~~~~~~~~~~~~~~~~~~~~
The first access to a page allocates it, even a read, and the maker of a block reads the words of all slots for its
row. So these words should lie on few pages. But a tree of few processes may have many blocks, and should not need a
page for each. So the words for a row lie side by side for ``TILE`` slots at a time. The table is a sequence of such
*tiles*, each with all rows. The page on memory in docs/internals has measurements.

Note [order of loads]
~~~~~~~~~~~~~~~~~~~~~
``Counts.state`` needs loads to be done in their order, and a store to be seen before a later one of the same process.
x86-64 keeps both (Intel SDM, volume 3, "Memory Ordering"). Other machines may not. Without a GIL, threads of one
process could change its words at once. In both cases there is no table, and memory is not used again.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import struct
from collections.abc import Callable
from typing import Final

from ..errors import NamespaceError
from ..peers.record_locks import RecordLocks
from ..transport import descriptors
from ..transport.fork import closed_in_child
from .counts import (
    FIRST_GENERATION,
    GENERATIONS,
    IN_USE,
    LENGTH,
    LOW,
    ROWS,
    SLOTS,
    STRIDE,
    TILE,
    USED_SLOTS,
    WORDS_OF_TILE,
    Counts,
    first_index,
)
from .rows import CHUNK, Rows

_NBYTES: Final = 8 * LENGTH

# Which byte's lock means what.
_CHUNK_LOCKS: Final = SLOTS
_CLAIM_LOCK: Final = SLOTS + ROWS // CHUNK

_MEMFD: Final = "torchwq-ref-table"


class RefTable:
    """This process's mapping of the tree's reference table. Used under ``state_lock.lock``."""

    def __init__(self, fd: int) -> None:
        """Take over ``fd``. Raises NamespaceError if it is no table, or OSError; ``fd`` is the caller's again then."""
        _check_is_table(fd)
        self._fd = fd
        self._locks = RecordLocks(fd)
        self._mapping = descriptors.map_file(fd, _NBYTES)
        self._words = memoryview(self._mapping).cast("Q")
        closed_in_child(self)
        try:
            self.slot = self._claim_slot()
            self.counts = counts = Counts(self._mapping, self.slot, self.is_alive)
        except BaseException:
            self._fd = -1
            raise
        # The methods of ``counts``, so that a call is one call.
        self.is_current: Callable[[int], bool] = counts.is_current
        self.count_sent: Callable[[int], None] = counts.count_sent
        self.count_received: Callable[[int, int], None] = counts.count_received
        self.set_flag: Callable[[int, int], None] = counts.set_flag
        self.clear_flag: Callable[[int, int], None] = counts.clear_flag
        self.state: Callable[[int], int] = counts.state
        self._rows = Rows(
            ROWS // CHUNK,
            self.slot * 7,
            lambda chunk: self._locks.acquire(_CHUNK_LOCKS + chunk),
            lambda chunk: self._locks.release(_CHUNK_LOCKS + chunk),
            self._reclaim_row,
        )

    def is_alive(self, slot: int) -> bool:
        """Whether the process of ``slot`` lives."""
        return slot == self.slot or self._locks.is_held(slot)

    def _claim_slot(self) -> int:
        """Take a free slot. Clears the IN_USE flags of its last process, whose counters go on."""
        self._locks.acquire(_CLAIM_LOCK, wait=True)
        try:
            for slot in range(SLOTS):
                if self._locks.acquire(slot):
                    break
            else:
                raise OSError(f"more than {SLOTS} processes share memory in one tree")
            if slot < self._words[USED_SLOTS]:
                self._clear_flags(slot)
            else:
                self._words[USED_SLOTS] = slot + 1
            return slot
        finally:
            self._locks.release(_CLAIM_LOCK)

    def _clear_flags(self, slot: int) -> None:
        words = self._words
        start = 8 * (first_index(slot) - slot % TILE * 2)
        position, end = start, start + 8 * WORDS_OF_TILE
        while position < end:
            try:  # reading a page that was never written would allocate it
                position = os.lseek(self._fd, position, os.SEEK_DATA)
            except OSError:
                return
            hole = min(os.lseek(self._fd, position, os.SEEK_HOLE), end)
            rows = range((position - start) // (8 * STRIDE), -(-(hole - start) // (8 * STRIDE)))
            first = start // 8 + slot % TILE * 2 + 1
            for index in range(first + rows.start * STRIDE, first + rows.stop * STRIDE, STRIDE):
                if words[index] & IN_USE:
                    words[index] &= ~IN_USE
            position = hole

    # Rows

    def take_row(self) -> int | None:
        """A row with a new generation, as one number: that of a block. None if no row is left."""
        row = self._rows.take()
        return None if row is None else self._raise_generation(row) << 32 | row

    def release_row(self, number: int) -> None:
        """End the block's number. Processes that still map the block keep its memory."""
        self._raise_generation(number & LOW)
        self._rows.release(number & LOW)

    def _raise_generation(self, row: int) -> int:
        index = GENERATIONS + row
        generation = (self._words[index] or self._words[FIRST_GENERATION]) + 1 & LOW or 1
        self._words[index] = generation
        return int(generation)

    def _reclaim_row(self, row: int) -> None:
        if self._words[GENERATIONS + row]:
            self._raise_generation(row)  # a dead owner has not done so

    def has_maker(self, number: int, alive: dict[int, bool]) -> bool:
        """Whether the maker of the block, another process, lives and has not retired it.

        Args:
            alive: a cache for a series of calls: whether the owner of a chunk of rows lives.
        """
        chunk = (number & LOW) // CHUNK
        if chunk not in alive:
            alive[chunk] = self._locks.is_held(_CHUNK_LOCKS + chunk)
        return alive[chunk] and self.is_current(number)

    def abandon(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self.counts.close()
            self._words.release()
            self._mapping.close()
            os.close(fd)


def create() -> int:
    """A descriptor of a new table. Raises AttributeError or OSError where the system does not support it."""
    fd = descriptors.above_stdio(os.memfd_create(_MEMFD, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    try:
        os.ftruncate(fd, _NBYTES)
        os.pwrite(fd, struct.pack("=Q", secrets.randbits(32)), 8 * FIRST_GENERATION)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _seals())
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_is_table(fd: int) -> None:
    """Raise NamespaceError unless this user has made ``fd`` as a reference table."""
    info = os.fstat(fd)
    name = os.readlink(f"/proc/self/fd/{fd}")
    try:
        sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _seals() == _seals()
    except OSError:  # files of other kinds have no seals
        sealed = False
    expected = info.st_size == _NBYTES and info.st_uid == os.geteuid()
    if not (expected and sealed and name.startswith(f"/memfd:{_MEMFD}")):
        raise NamespaceError(errno.EINVAL, f"this is no reference table of torchwq: {name}, {info.st_size} bytes")


def _seals() -> int:
    """With these, a mapping never ends before its last word (memfd_create(2))."""
    return fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
