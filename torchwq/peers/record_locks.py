"""Locks on single bytes of a shared file. The kernel releases them when their process ends, however it ends.

So a lock on a byte says that a process is alive, and a killed process leaves nothing to repair. See fcntl(2), "Open
file description locks" (``F_OFD_SETLK``), and lockf(3).

Invariants:

* A lock belongs to an *open file description* that this process shares with no other: neither with one that it has sent
  a descriptor, nor, except for a moment, with a forked child. POSIX's older locks belong to the process, and closing
  *any* descriptor of the file releases them: a process that receives a file twice closes one of the two. They are used
  only where the system has no others.
* A lock does not exclude other threads of its process: they take a lock of the process first.
* ``is_held`` tells of other processes only. A process knows itself which locks it holds.
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

HAS_OFD_LOCKS: Final = sys.platform == "linux" and hasattr(fcntl, "F_OFD_SETLK") and sys.maxsize > 1 << 32
_FLOCK: Final = struct.Struct("@hhqqi4x")
_FD_FOLDER: Final = "/proc/self/fd"


class RecordLocks:
    """The locks of one open file description. Safe to use from several threads.

    Args:
        fd: the file, opened by this process itself. The caller closes it, which releases all locks.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._probe_lock = threading.RLock()

    def acquire(self, byte: int, *, wait: bool = False) -> bool:
        """Take the lock on a byte. Returns whether this process has it now; with ``wait``, always True."""
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
        """Release the lock on a byte."""
        if HAS_OFD_LOCKS:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, byte, 1, 0))
        else:
            fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, byte)

    def is_held(self, byte: int) -> bool:
        """Whether another open file description, and so another process, has the lock on a byte."""
        if HAS_OFD_LOCKS:
            wanted = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
            return bool(_FLOCK.unpack(fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, wanted))[0] != fcntl.F_UNLCK)
        with self._probe_lock:
            if self.acquire(byte):
                self.release(byte)
                return False
        return True


def lockable_memory(nbytes: int) -> int:
    """New memory that a receiver of its descriptor can open again. Raises ResourceError.

    Where there is no /proc, it has a name in the process tree's folder, as long as that exists.
    """
    if not HAS_OFD_LOCKS or os.path.exists(_FD_FOLDER):
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
    """Open such memory again, for an open file description of this process's own. Raises ResourceError."""
    if not HAS_OFD_LOCKS:
        return descriptors.dup(fd)
    for path in (f"{_FD_FOLDER}/{fd}", _path_of(fd)):
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
