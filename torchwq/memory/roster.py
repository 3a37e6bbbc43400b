"""Who has something open, in memory shared by all who do: a seat for each process, and a few words of it to count in.

For what belongs to no process in particular, as channels and locks do not: nobody is there whom the others could tell
of their coming and going. So each tells it in the roster, and the kernel tells of those who could not: a seat is held
by a lock on the roster's memory, which ends with the process that has it, however it ends.

Invariants:

* A seat's words are written by its holder only. Words are 8 bytes and aligned, so a reader sees an old or a new one.
* A seat is taken, and words of the head are changed, under the lock of the head. That lock, too, ends with its holder:
  what is changed under it is changed word by word, such that it may end after any of them.
* A seat that is left is FREE, and keeps its counts: they go on counting under the next holder, so that sums over all
  seats stay true. A seat that is not FREE and not held is a dead process's. It stays so, for all to see, until
  ``KEPT`` others have come after it: then it is taken again, and its counts, too, go on.
* Each *tenancy* of a seat has a number of its own. Who remembers deaths remembers tenancies, not seats.
* Locks belong to an *open file description* of their own, in which no other process has a part: not one that was sent a
  descriptor, nor, but for a moment, one that was forked. Where the system has no such locks they belong to the
  process, and closing any descriptor of the memory gives them up; there they are taken again. A process that could
  only have a part in another one's description gets no seat.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import struct
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from ..errors import ResourceError
from ..transport import descriptors, namespace
from ..transport.process import closed_in_child
from . import anonymous

SEATS: Final = 4096
_WORDS: Final = 16  # per seat: two cache lines
_NBYTES: Final = (SEATS + 1) * _WORDS * 8

#: How many come before a dead process's seat is taken again: until then everybody can be told of the death.
KEPT: Final = 1024

#: Words of the head: how many seats were ever taken, and how often one was; how often it was a dead process's. The
#: others are the user's.
_TAKEN, _CAME, _SUCCEEDED = range(3)
#: Words of a seat: its holder's process id, 0 if it is FREE, with FAILED set if it has failed; the tenancy's number.
#: The others are the user's.
_HOLDER, _TENANCY = range(2)
_FAILED: Final = 1 << 62
#: The first words that the user may use, of the head and of a seat.
FIRST_OF_HEAD, FIRST_OF_SEAT = 3, 2

_OWN_FILE: Final = sys.platform == "linux" and hasattr(fcntl, "F_OFD_SETLK") and sys.maxsize > 1 << 32
_OPEN_FILES: Final = "/proc/self/fd"
_FLOCK: Final = struct.Struct("@hhqqi0q")
_HAS_GIL: Final = getattr(sys, "_is_gil_enabled", lambda: True)()


def _new_memory() -> int:
    """Memory for a roster, which can be opened once more: without /proc by a name in the tree's folder, as long as that
    is there."""
    if not _OWN_FILE or os.path.exists(_OPEN_FILES):
        return anonymous.create(_NBYTES)
    try:
        fd, path = tempfile.mkstemp(prefix="roster-", dir=namespace.current().path)
        fd = descriptors.above(fd)
        os.ftruncate(fd, _NBYTES)
        os.rename(path, _path_of(fd))
    except OSError as error:
        raise anonymous.exhausted(error) from error
    return fd


def _path_of(fd: int) -> str:
    return f"{namespace.current().path}/r-{os.fstat(fd).st_ino}"


class Roster:
    """One process's mapping of a roster, with its seat. Takes over ``fd``. Safe to use from several threads.

    Args:
        states: words of a seat that say how its holder is now, and do not count: 0 for each new one.

    Raises ResourceError if descriptors or memory have run out, or seats.
    """

    def __init__(self, fd: int | None = None, states: Sequence[int] = ()) -> None:
        self.fd = _new_memory() if fd is None else fd
        self._lock_fd = -1
        try:
            self._mapping = descriptors.mapped(self.fd, _NBYTES)
            self._lock_fd = self._open_locks()
        except OSError as error:
            os.close(self.fd)
            raise anonymous.exhausted(error) from error
        self._thread_lock = threading.RLock()
        self._depth = 0
        self.words = memoryview(self._mapping).cast("Q")
        self.seat = -1
        closed_in_child(self)
        try:
            self.seat = self._sit_down(states)
        except BaseException:
            self.leave()
            raise

    def _open_locks(self) -> int:
        if not _OWN_FILE:
            return descriptors.dup(self.fd)
        for path in (f"{_OPEN_FILES}/{self.fd}", _path_of(self.fd)):
            try:
                fd = descriptors.open_file(path, os.O_RDWR)
            except ResourceError:
                raise
            except OSError:
                continue
            if os.path.sameopenfile(fd, self.fd):
                return fd
            os.close(fd)
        raise ResourceError(
            errno.ENOENT,
            "a channel or mutex was made by a process that has /proc, and this one has none, and so cannot lock its "
            "seat: mount /proc in this sandbox or container",
        )

    def _sit_down(self, states: Sequence[int]) -> int:
        words = self.words
        with self.locked():
            seat = self._lock_one()
            if seat is None:
                raise ResourceError(0, f"a channel or mutex cannot be open in more than {SEATS} processes at a time")
            first = self.index(seat)
            for word in states:
                words[first + word] = 0
            words[_SUCCEEDED] += bool(words[first + _HOLDER])
            words[_TAKEN] = max(int(words[_TAKEN]), seat + 1)
            words[_CAME] += 1
            words[first + _TENANCY] = words[_CAME]
            words[first + _HOLDER] = os.getpid()
        return seat

    def _lock_one(self) -> int | None:
        """Take the lock of a seat that is FREE; or that of the first who has died, if enough have come since."""
        taken, came = int(self.words[_TAKEN]), int(self.words[_CAME])
        first, end = self.index(0), self.index(taken)
        holders = self.words[first + _HOLDER : end : _WORDS].tolist()
        for seat, holder in enumerate(holders):
            if not holder and self._lock(seat, wait=False):
                return seat
        if taken >= KEPT:
            tenancies = self.words[first + _TENANCY : end : _WORDS].tolist()
            for tenancy, seat in sorted(zip(tenancies, range(taken), strict=True)):
                if came - tenancy < KEPT and taken < SEATS:
                    break
                if holders[seat] and not self.lives(seat) and self._lock(seat, wait=False):
                    return seat
        return taken if taken < SEATS and self._lock(taken, wait=False) else None

    # Locks. Byte 0 is the head's, byte 1 + n seat n's, and the one after the last seat's is the user's.

    def _call(self, command: int, kind: int, byte: int) -> tuple[int, ...]:
        packed = fcntl.fcntl(self._lock_fd, command, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))
        return _FLOCK.unpack(packed)

    def _lock(self, seat: int, *, wait: bool) -> bool:
        try:
            if _OWN_FILE:
                self._call(fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, fcntl.F_WRLCK, seat + 1)
            else:
                fcntl.lockf(self._lock_fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, seat + 1)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        return True

    def _unlock(self, seat: int) -> None:
        if _OWN_FILE:
            self._call(fcntl.F_OFD_SETLK, fcntl.F_UNLCK, seat + 1)
        else:
            fcntl.lockf(self._lock_fd, fcntl.LOCK_UN, 1, seat + 1)

    def lock_extra(self, *, wait: bool) -> bool:
        """Take a lock that is its user's, as a process: its threads must see to it that only one of them does."""
        return self._lock(SEATS, wait=wait)

    def unlock_extra(self) -> None:
        self._unlock(SEATS)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the head, which is for moments only. Reentrant."""
        with self._thread_lock:
            if not self._depth and self._lock_fd >= 0:
                self._lock(-1, wait=True)
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if not self._depth and self._lock_fd >= 0:
                    self._unlock(-1)

    # Seats

    @staticmethod
    def index(seat: int) -> int:
        """Where the words of a seat begin; the head's are those of seat -1."""
        return (seat + 1) * _WORDS

    def taken(self) -> range:
        """Every seat that was ever taken."""
        return range(int(self.words[_TAKEN]))

    def pid(self, seat: int) -> int:
        """Who has it; 0 if nobody has."""
        return int(self.words[self.index(seat) + _HOLDER]) & ~_FAILED

    def others_came(self) -> bool:
        """Whether it was ever open in another process."""
        return int(self.words[_CAME]) > 1

    def tenancy(self, seat: int) -> int:
        """The number of the present tenancy of a seat, or of the last one: no other of any seat has it."""
        return int(self.words[self.index(seat) + _TENANCY])

    @property
    def losses(self) -> int:
        """How many have died or failed. Only grows."""
        return int(self.words[_SUCCEEDED]) + sum(not lives for _, lives in self.others())

    def others(self) -> Iterator[tuple[int, bool]]:
        """The seats of other processes that have it open, and those that died or failed: seat, and whether it lives."""
        return ((seat, lives) for seat, _, lives in self.tenancies())

    def tenancies(self) -> Iterator[tuple[int, int, bool]]:
        """The same, with the number of the tenancy in between."""
        for seat in self.taken():
            if seat == self.seat:
                continue
            while True:  # whoever takes it again has its lock before he changes the number
                tenancy = self.tenancy(seat)
                lives = self._is_held(seat)
                if tenancy == self.tenancy(seat):
                    break
            if lives is not None:
                yield seat, tenancy, lives

    def _is_held(self, seat: int) -> bool | None:
        """Whether its holder lives; None if it is free. One who leaves while this looks has not died."""
        at = self.index(seat) + _HOLDER
        while holder := self.words[at]:
            if self.lives(seat):
                return True
            # Whoever leaves says so before giving up the lock.
            if self.words[at] == holder and not self.lives(seat):
                return False
        return None

    def has_failed(self, seat: int) -> bool:
        """Whether a seat that does not live was left by a worker that ended with an error, and was not killed."""
        return bool(self.words[self.index(seat) + _HOLDER] & _FAILED)

    def lives(self, seat: int) -> bool:
        """Whether its holder lives and has it open."""
        if seat == self.seat:
            return True
        if self.has_failed(seat):
            return False
        if _OWN_FILE:
            kind = self._call(fcntl.F_OFD_GETLK, fcntl.F_WRLCK, seat + 1)[0]
            return kind != fcntl.F_UNLCK
        with self._thread_lock:
            if self._lock(seat, wait=False):
                self._unlock(seat)
                return False
        return True

    def counter(self, word: int) -> Callable[[], None]:
        """What adds one to a word of this process's seat, which only this may change then. Any thread may call it.

        With the GIL it is one call of C code, in which no other thread can come between reading and writing; it is part
        of what each item costs. Without, it takes a lock.
        """
        at = self.index(self.seat) + word
        count = map(self.words.__setitem__, itertools.repeat(at), itertools.count(int(self.words[at]) + 1)).__next__
        if _HAS_GIL:
            return count
        lock = threading.Lock()

        def count_locked() -> None:
            with lock:
                count()

        return count_locked

    def sum(self, word: int) -> int:
        """Sum of a word over all seats."""
        taken = int(self.words[_TAKEN])
        first = _WORDS + word
        return sum(self.words[first : first + taken * _WORDS : _WORDS]) if taken else 0

    def leave(self, *, failed: bool = False, keep_memory: bool = False) -> None:
        """Give up the seat and the memory. ``failed``: as one who cannot do what others wait for. May be called again.

        ``keep_memory``: other threads may still count in it; the process ends.

        A seat that was not given up is a dead process's.
        """
        with self._thread_lock:
            if self.fd < 0:
                return
            if self.seat >= 0:
                self.words[self.index(self.seat) + _HOLDER] = os.getpid() | _FAILED if failed else 0
            if not keep_memory:
                self.words.release()
            self._close()

    def _close(self) -> None:
        fds, self.fd, self._lock_fd = (self.fd, self._lock_fd), -1, -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)

    def abandon(self) -> None:
        self._close()
