"""Locks on single bytes of a shared file: the kernel releases them when their holder ends, however it ends.

So a lock on a byte says that a process is there, and nothing has to be repaired when it is killed. See fcntl(2), "Open
file description locks" (``F_OFD_SETLK``), and lockf(3).

Invariants:

* A lock belongs to an *open file description* in which no other process has a part: not one that was sent a descriptor,
  nor, but for a moment, one that was forked. POSIX's older locks belong to the process, and closing *any* descriptor of
  the file gives them up; a process that is sent a file twice closes one. They serve only where the system has no
  others, and are taken again there.
* Among the threads of one process a lock keeps nobody out: who needs that takes a lock of the process first.
* Only the holder's process takes part in a lock: ``is_held`` tells of others, and of itself a process knows.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import sys
import tempfile
import threading
from typing import Final

from ..errors import ResourceError
from ..transport import descriptors, namespace

#: Whether the system has locks of open file descriptions.
HAS_OFD_LOCKS: Final = sys.platform == "linux" and hasattr(fcntl, "F_OFD_SETLK") and sys.maxsize > 1 << 32
_FLOCK: Final = struct.Struct("@hhqqi4x")
_OPEN_FILES: Final = "/proc/self/fd"


class RecordLocks:
    """The locks of one open file description. Safe to use from several threads.

    Args:
        fd: the file, opened by this process itself; the caller closes it, and with it all locks end.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._trying = threading.RLock()

    def acquire(self, byte: int, *, wait: bool = False) -> bool:
        """Take the lock on a byte. Returns whether nobody else had it, which is sure after a ``wait``."""
        try:
            if HAS_OFD_LOCKS:
                command = fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK
                fcntl.fcntl(self._fd, command, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
            else:
                fcntl.lockf(self._fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, byte)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        return True

    def release(self, byte: int) -> None:
        """Give the lock on a byte back."""
        if HAS_OFD_LOCKS:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, byte, 1, 0))
        else:
            fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, byte)

    def is_held(self, byte: int) -> bool:
        """Whether another open file description, and so another process, has the lock on a byte."""
        if HAS_OFD_LOCKS:
            asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
            return bool(_FLOCK.unpack(fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, asked))[0] != fcntl.F_UNLCK)
        with self._trying:
            if self.acquire(byte):
                self.release(byte)
                return False
        return True


def lockable_memory(nbytes: int) -> int:
    """New memory that its receivers can open once more: where there is no /proc, by a name in the tree's folder, as
    long as that is there. Raises ResourceError."""
    if not HAS_OFD_LOCKS or os.path.exists(_OPEN_FILES):
        return descriptors.memory_file("torchwq", nbytes)
    try:
        fd, path = tempfile.mkstemp(prefix="peers-", dir=namespace.current().path)
        fd = descriptors.above_stdio(fd)
        os.ftruncate(fd, nbytes)
        os.rename(path, _path_of(fd))
    except OSError as error:
        raise descriptors.resource_error(error) from error
    return fd


def _path_of(fd: int) -> str:
    return f"{namespace.current().path}/r-{os.fstat(fd).st_ino}"


def reopen(fd: int) -> int:
    """An open file description of this process's own of such memory. Raises ResourceError."""
    if not HAS_OFD_LOCKS:
        return descriptors.dup(fd)
    for path in (f"{_OPEN_FILES}/{fd}", _path_of(fd)):
        try:
            again = descriptors.open_file(path, os.O_RDWR)
        except ResourceError:
            raise
        except OSError:
            continue
        if os.path.sameopenfile(again, fd):
            return again
        os.close(again)
    raise ResourceError(
        errno.ENOENT,
        "a channel or mutex was made by a process that has /proc, and this one has none, and so cannot lock its "
        "slot: mount /proc in this sandbox or container",
    )
