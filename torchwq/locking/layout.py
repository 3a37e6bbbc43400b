"""What stands in the table of a mutex.

Invariants:

* Whoever holds the record lock, or has just got it, and nobody else, writes HOLDER. It is 0 whenever the lock was
  released; so one who gets the lock and finds another value succeeds a holder that died, or whose thread ended.
* All other words are changed under the table's lock.
"""

from __future__ import annotations

from typing import Final

from ..peers.table import FIRST_HEADER_WORD, FIRST_SLOT_WORD

#: Words of the table's head: who holds the lock; the barrier's round, how many have arrived in it, how many it needs;
#: how many workers that are threads have failed; how many handles were given up. And, for the last round of either
#: parity: its number plus one if it was broken; how many have gone on after it. How many losses there had been when
#: the first one arrived: of these all who wait have been told.
HOLDER, GENERATION, NUM_ARRIVED, PARTIES, THREAD_FAILURES, HANDLES_CLOSED = range(
    FIRST_HEADER_WORD, FIRST_HEADER_WORD + 6
)
BROKEN, NUM_RELEASED, KNOWN_FAILURES = FIRST_HEADER_WORD + 6, FIRST_HEADER_WORD + 8, FIRST_HEADER_WORD + 10
#: Word of a slot: how many threads wait at the barrier.
NUM_WAITING: Final = FIRST_SLOT_WORD
