"""Anonymous shared memory for payloads that are too large for a message.

Why memfd: it has no name that could be left behind, it does not count against the size of /dev/shm, and it can be
mapped copy-on-write, so that a reader owns what it got without copying it.

Invariants:

* The writer fills a block with ``write`` calls *before* its descriptor is sent and never changes it afterwards, so a
  private mapping of it is a private copy.
* Filling by ``write`` rather than through a mapping turns "no memory" into an error instead of a bus error.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from collections.abc import Sequence
from typing import Final

from ..errors import ResourceError

#: The kernel takes at most this many bytes in one call (MAX_RW_COUNT, rounded down).
_CALL: Final = 1 << 30


def create(nbytes: int = 0) -> int:
    """A descriptor of fresh anonymous shared memory of ``nbytes`` zero bytes.

    Raises ResourceError if descriptors or memory have run out.
    """
    try:
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("torchwq", os.MFD_CLOEXEC)
        else:
            fd, path = tempfile.mkstemp(prefix="torchwq-")
            os.unlink(path)
    except OSError as error:
        raise exhausted(error) from error
    try:
        os.ftruncate(fd, nbytes)
    except OSError as error:
        os.close(fd)
        raise exhausted(error) from error
    return fd


def reserve(fd: int, nbytes: int) -> None:
    """Have memory for ``nbytes`` bytes now, so that touching it cannot fail. Raises ResourceError if there is none."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, nbytes)
        else:
            os.ftruncate(fd, nbytes)
    except OSError as error:
        raise exhausted(error) from error


def exhausted(error: OSError) -> ResourceError:
    """Say which limit an OSError of a memory or descriptor call stands for."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        remedy = "too many open file descriptors (RLIMIT_NOFILE): raise the limit with `ulimit -n`"
    elif error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
        remedy = "no memory left for shared memory: look at the memory limit of the machine, container or cgroup"
    else:
        remedy = f"shared memory cannot be used ({os.strerror(error.errno or 0)})"
    return ResourceError(error.errno or 0, remedy)


def fill(buffers: Sequence[bytes | memoryview]) -> int:
    """Copy ``buffers``, one behind the other, into new memory. Returns its descriptor."""
    views = [memoryview(buffer).cast("B") for buffer in buffers]
    fd = create()
    try:
        offset = 0
        for view in views:
            offset = _write(fd, view, offset)
        os.ftruncate(fd, max(offset, 1))
    except OSError as error:
        os.close(fd)
        raise exhausted(error) from error
    except BaseException:
        os.close(fd)
        raise
    return fd


def _write(fd: int, view: memoryview, offset: int) -> int:
    done = 0
    while done < view.nbytes:
        done += os.pwrite(fd, view[done : done + _CALL], offset + done)
    return offset + done


def map_private(fd: int) -> memoryview:
    """All of the block, writable, copy-on-write: changes stay in this process. The caller closes ``fd``."""
    try:
        mapping = mmap.mmap(fd, os.fstat(fd).st_size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    except OSError as error:
        raise exhausted(error) from error
    return memoryview(mapping)


class Descriptor:
    """Owns one descriptor, of a block or of anything else that travels, until it is garbage."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def detach(self) -> int:
        """Give the descriptor away."""
        fd, self.fd = self.fd, -1
        return fd

    def close(self) -> None:
        fd = self.detach()
        if fd >= 0:
            os.close(fd)

    __del__ = close
