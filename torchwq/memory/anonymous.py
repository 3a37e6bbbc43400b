"""Anonymous shared memory for payloads that are too large for a message.

Why memfd: it has no name that could be left behind, it does not count against the size of /dev/shm, and it can be
mapped copy-on-write, so that a reader owns what it got without copying it.

Invariants:

* The writer fills a block with ``write`` calls *before* its descriptor is sent and never changes it afterwards, so a
  private mapping of it is a private copy.
* Filling by ``write`` rather than through a mapping turns "no memory" into an error instead of a bus error.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from typing import Final

from ..transport import descriptors

#: The kernel takes at most this many bytes in one call (MAX_RW_COUNT, rounded down).
_CALL: Final = 1 << 30
#: How much is written at a time where memory cannot be reserved in another way.
_PIECE: Final = 1 << 20

#: Says which limit an OSError of a memory or descriptor call stands for.
resource_error = descriptors.resource_error


def create(nbytes: int = 0) -> int:
    """A descriptor of fresh anonymous shared memory of ``nbytes`` zero bytes.

    Raises ResourceError if descriptors or memory have run out.
    """
    return descriptors.memory_file("torchwq", nbytes)


def reserve(fd: int, nbytes: int) -> None:
    """Have memory for ``nbytes`` bytes now, so that touching it cannot fail. Raises ResourceError if there is none.

    What was in them may be lost.
    """
    try:
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(fd, 0, nbytes)
                return
            except OSError as error:
                if error.errno not in descriptors.REFUSALS:
                    raise
        zeros = memoryview(bytes(min(nbytes, _PIECE)))
        offset = 0
        while offset < nbytes:
            offset += os.pwrite(fd, zeros[: nbytes - offset], offset)
    except OSError as error:
        raise resource_error(error, "fallocate and pwrite") from error


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
        raise resource_error(error, "pwrite") from error
    except BaseException:
        os.close(fd)
        raise
    return fd


def _write(fd: int, view: memoryview, offset: int) -> int:
    done = 0
    while done < view.nbytes:
        done += os.pwrite(fd, view[done : done + _CALL], offset + done)
    return offset + done


def map_private(fd: int, nbytes: int | None = None) -> memoryview:
    """The first ``nbytes`` of the block, or all of it, copy-on-write: changes stay here. The caller closes ``fd``."""
    return memoryview(descriptors.map_file(fd, os.fstat(fd).st_size if nbytes is None else nbytes, mmap.MAP_PRIVATE))


class Descriptor:
    """Owns one descriptor, of a block or of anything else that travels, until it is garbage.

    Args:
        count_sent: called with 1 when a message leaves with it, and with -1 if that was not sent after all.
    """

    __slots__ = ("__weakref__", "_closing", "count_sent", "fd")

    def __init__(self, fd: int, count_sent: Callable[[int], None] | None = None) -> None:
        self.fd = fd
        self.count_sent = count_sent
        self._closing = descriptors.close_with(self, fd)

    def detach(self) -> int:
        """Give the descriptor away."""
        self._closing.detach()
        fd, self.fd = self.fd, -1
        return fd

    def close(self) -> None:
        self.fd = -1
        self._closing()


def duplicates(fds: Sequence[int], count_sent: Callable[[int], None] | None = None) -> list[Descriptor]:
    """Another descriptor for each of ``fds``; ``count_sent`` is the first one's. Raises ResourceError."""
    try:
        copies = descriptors.dup_all(fds)
    except OSError as error:
        raise resource_error(error) from error
    return [Descriptor(fd, count_sent if place == 0 else None) for place, fd in enumerate(copies)]
