"""The words of a mutex in its table of peers.

Invariants:

* Only the process that holds the record lock writes HOLDER. It is 0 whenever the lock was released. So a thread that
  gets the lock and finds another value succeeds a holder that died, or whose thread ended.
* All other words change under the header lock.
"""

from __future__ import annotations

from typing import Final

from ..peers.table import FIRST_HEADER_WORD, FIRST_SLOT_WORD

#: Words of the header: the process that holds the lock; the barrier's generation, how many threads have arrived in it,
#: and how many it needs; how many workers that are threads have failed; how many handles were closed.
HOLDER, GENERATION, NUM_ARRIVED, PARTIES, THREAD_FAILURES, HANDLES_CLOSED = range(
    FIRST_HEADER_WORD, FIRST_HEADER_WORD + 6
)
#: For the last even and the last odd generation: its number plus one if it was broken; how many threads have gone on
#: after it. And how many failures there were when the first thread of this generation arrived.
BROKEN, NUM_RELEASED, KNOWN_FAILURES = FIRST_HEADER_WORD + 6, FIRST_HEADER_WORD + 8, FIRST_HEADER_WORD + 10
#: Word of a slot: how many threads of its process wait at the barrier.
NUM_WAITING: Final = FIRST_SLOT_WORD
