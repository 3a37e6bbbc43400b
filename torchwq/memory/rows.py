"""Which rows of the reference table belong to this process, and how they come and go.

Rows belong to processes in *chunks*: whoever has the lock on a chunk's byte has its rows, and the kernel gives the
chunks of the dead back. A process that once had many blocks must not keep the table from all others, so a chunk whose
rows are all free is given back, too.

Invariants:

* A row is free here, or it is some block's of this process, or the process does not have its chunk.
* One chunk that is wholly free is kept, so that a block more and a block less do not take and give back a lock each.
* A row's generation was raised before the row is free. So whoever has its chunk next finds no number that still stands.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Final

CHUNK: Final = 64
#: Nobody tells when another process gives a chunk back. So after a look at all of them without finding any, the next
#: one is this many seconds later.
_RETRY_INTERVAL: Final = 1.0


class Rows:
    """The rows of this process. Not safe by itself.

    Args:
        chunks: how many the table has.
        first: at which of them to begin to look for one: where other processes are not likely to have any.
        lock: takes a chunk; returns whether nobody else had it.
        unlock: gives a chunk back.
        reclaim: is called for each row of a chunk that was taken, which may have had an owner that is dead.
    """

    def __init__(
        self,
        chunks: int,
        first: int,
        lock: Callable[[int], bool],
        unlock: Callable[[int], None],
        reclaim: Callable[[int], None],
    ) -> None:
        self._chunks = chunks
        self._next = first % chunks
        self._lock = lock
        self._unlock = unlock
        self._reclaim = reclaim
        self._owned: set[int] = set()
        #: By their chunks; none is empty.
        self._free: dict[int, deque[int]] = {}
        #: The chunk that is wholly free and kept.
        self._spare: int | None = None
        self._retry_at = 0.0

    def take(self) -> int | None:
        """A free row; None if all processes together have all of them."""
        if not self._free and not self._take_chunk():
            return None
        # From the spare chunk last of all: the others may become wholly free.
        chunk = next((each for each in self._free if each != self._spare), self._spare)
        assert chunk is not None
        if chunk == self._spare:
            self._spare = None
        rows = self._free[chunk]
        row = rows.popleft()
        if not rows:
            del self._free[chunk]
        return row

    def release(self, row: int) -> None:
        """The row is free again. After its generation was raised."""
        chunk = row // CHUNK
        rows = self._free.setdefault(chunk, deque())
        rows.append(row)
        if len(rows) < CHUNK:
            return
        if self._spare is None:
            self._spare = chunk
        else:
            del self._free[chunk]
            self._owned.remove(chunk)
            self._unlock(chunk)

    def _take_chunk(self) -> bool:
        if time.monotonic() < self._retry_at:
            return False
        for _ in range(self._chunks):
            chunk, self._next = self._next, (self._next + 1) % self._chunks
            # The lock would not keep this process itself out.
            if chunk not in self._owned and self._lock(chunk):
                rows = range(chunk * CHUNK, (chunk + 1) * CHUNK)
                for row in rows:
                    self._reclaim(row)
                self._owned.add(chunk)
                self._free[chunk] = deque(rows)
                self._spare = chunk
                return True
        self._retry_at = time.monotonic() + _RETRY_INTERVAL
        return False
