"""Anonymous shared memory, and the descriptors that own it.

Why memfd_create(2): the memory has no name that could be left behind, it does not count against the size of /dev/shm,
and it can be mapped copy-on-write, so that a reader owns its data without copying them.

Invariants of ``fill``:

* It writes *before* the descriptor is sent, and nothing changes the memory afterwards. So a private mapping is a copy.
* It uses write(2), not a mapping: running out of memory is an error then, not a bus error.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from typing import Final

from ..transport import descriptors

#: The kernel takes at most this many bytes in one call (MAX_RW_COUNT, rounded down).
_MAX_BYTES_PER_CALL: Final = 1 << 30
#: Bytes written at a time where fallocate is not supported.
_CHUNK: Final = 1 << 20


def create(nbytes: int = 0) -> int:
    """A descriptor of new anonymous shared memory of ``nbytes`` zero bytes.

    Raises ResourceError if descriptors or memory have run out.
    """
    return descriptors.memory_file("torchwq", nbytes)


def reserve(fd: int, nbytes: int) -> None:
    """Allocate the first ``nbytes`` bytes now, so that accessing them cannot fail. May overwrite them.

    Raises ResourceError if there is no memory.
    """
    try:
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(fd, 0, nbytes)
                return
            except OSError as error:
                if error.errno not in descriptors.REFUSALS:
                    raise
        zeros = memoryview(bytes(min(nbytes, _CHUNK)))
        offset = 0
        while offset < nbytes:
            offset += os.pwrite(fd, zeros[: nbytes - offset], offset)
    except OSError as error:
        raise descriptors.resource_error(error, "fallocate and pwrite") from error


def fill(buffers: Sequence[bytes | memoryview]) -> int:
    """Copy ``buffers``, one after the other, into new memory; returns its descriptor. Raises ResourceError."""
    views = [memoryview(buffer).cast("B") for buffer in buffers]
    fd = create()
    try:
        start = 0
        for view in views:
            done = 0
            while done < view.nbytes:
                done += os.pwrite(fd, view[done : done + _MAX_BYTES_PER_CALL], start + done)
            start += done
        os.ftruncate(fd, max(start, 1))
    except OSError as error:
        os.close(fd)
        raise descriptors.resource_error(error, "pwrite") from error
    except BaseException:
        os.close(fd)
        raise
    return fd


def map_private(fd: int, nbytes: int | None = None) -> memoryview:
    """Map the first ``nbytes`` bytes, or all, copy-on-write: changes are private. The caller closes ``fd``."""
    return memoryview(descriptors.map_file(fd, os.fstat(fd).st_size if nbytes is None else nbytes, mmap.MAP_PRIVATE))


class Descriptor:
    """Owns a descriptor until it is garbage.

    Args:
        count_sent: called with 1 when a message with it is about to be sent, and with -1 if it was not sent.
    """

    __slots__ = ("__weakref__", "_closing", "count_sent", "fd")

    def __init__(self, fd: int, count_sent: Callable[[int], None] | None = None) -> None:
        self.fd = fd
        self.count_sent = count_sent
        self._closing = descriptors.close_with(self, fd)

    def detach(self) -> int:
        """The descriptor, which is the caller's from now on."""
        self._closing.detach()
        fd, self.fd = self.fd, -1
        return fd

    def close(self) -> None:
        self.fd = -1
        self._closing()


def duplicates(fds: Sequence[int], count_sent: Callable[[int], None] | None = None) -> list[Descriptor]:
    """A duplicate of each of ``fds``; the first one has ``count_sent``. Raises ResourceError."""
    try:
        copies = descriptors.dup_all(fds)
    except OSError as error:
        raise descriptors.resource_error(error) from error
    return [Descriptor(fd, count_sent if place == 0 else None) for place, fd in enumerate(copies)]
