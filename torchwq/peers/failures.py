"""Which ends of peers has a handle been told of? Each end is told once to each handle.

Invariants:

* What is remembered of a death is its peer_id, never the slot, which another process may claim.
* A peer_id that the table does not show any more is forgotten when the next one is told: so the set stays small.
* Workers that are threads have no slot. How many of them had failed is a number that only grows, and what is remembered
  is how far this handle has been told.
* A new handle begins with what there is to tell at the moment in which it is sent: that was told to others, or is none
  of its business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .table import PeerTable

#: Given the slots of those whose death is untold, and of the living: the dead that matter to whoever asks.
DeathFilter = Callable[[Sequence[int], Sequence[int]], Sequence[int]]


def every_death(dead: Sequence[int], living: Sequence[int]) -> Sequence[int]:
    """Every death matters."""
    return dead


def dead_peer_ids(table: PeerTable) -> set[int]:
    """The deaths that a table shows now."""
    return {peer_id for _, peer_id, lives in table.other_peers() if not lives}


@dataclass(slots=True)
class SeenFailures:
    """What a handle, or a thread with one, has been told of."""

    deaths: set[int] = field(default_factory=set)
    thread_failures: int = 0

    def copy(self) -> SeenFailures:
        """The same for another handle, which is told of its own from now on."""
        return SeenFailures(set(self.deaths), self.thread_failures)

    def next_unseen_death(self, table: PeerTable, relevant: DeathFilter = every_death) -> tuple[int, int] | None:
        """Slot and peer id of a death that is still to be told; None if there is none."""
        untold: dict[int, int] = {}
        living: list[int] = []
        for slot, peer_id, lives in table.other_peers():
            if lives:
                living.append(slot)
            elif peer_id not in self.deaths:
                untold[slot] = peer_id
        chosen = relevant(list(untold), living) if untold else ()
        return next(((slot, untold[slot]) for slot in chosen), None)

    def mark_seen(self, table: PeerTable, peer_id: int) -> None:
        """A death is told now."""
        self.deaths &= dead_peer_ids(table)
        self.deaths.add(peer_id)
