"""The rows of the reference table that belong to this process.

Processes own rows in *chunks*: the process with the lock on a chunk's byte owns its rows. The kernel releases the locks
of dead processes (fcntl(2), open file description locks). A process that once had many blocks must not keep the rows
from all others, so it releases a chunk whose rows are all free.

Invariants:

* A row of a chunk that this process owns is free, or is a block's of this process.
* One chunk that is wholly free is kept, so that one block more and one less do not take and release a lock each time.
* A row's generation is raised before the row is free. So the chunk's next owner finds no current number.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Final

CHUNK: Final = 64
#: Seconds until the next search after one in vain: no event tells that another process has released a chunk.
_RETRY_INTERVAL: Final = 1.0


class Rows:
    """The rows of this process. Used under ``state_lock.lock``.

    Args:
        chunks: how many the table has.
        first: the chunk at which the search begins: one that other processes are not likely to own.
        lock: takes a chunk; returns whether no other process owns it.
        unlock: releases a chunk.
        reclaim: called for each row of a chunk that was taken; a dead process may have owned it.
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
        #: Free rows by their chunks; none is empty.
        self._free: dict[int, deque[int]] = {}
        #: A chunk that is wholly free.
        self._spare: int | None = None
        self._retry_at = 0.0

    def take(self) -> int | None:
        """A free row; None if the processes own all rows, and this one uses all of its own."""
        if not self._free and not self._take_chunk():
            return None
        # The spare chunk comes last, so that it stays wholly free.
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
        """Free a row, whose generation was raised before."""
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
            # The lock does not keep out this process itself.
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
