"""Remembers which deaths of peers a handle has been told of: each handle is told of each death once.

Invariants:

* A death is remembered by the peer's id, never by its slot, which another process may claim.
* ``mark_seen`` forgets the ids that the table does not show any more, so the set stays small.
* A worker that is a thread has no slot. The number of failed threads only grows, so a handle remembers a number.
* A new handle starts with the deaths that the table shows when the handle is sent: other handles were told of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .table import PeerTable

#: Given the slots of unseen deaths, and those of living peers, returns the deaths that matter to the caller.
DeathFilter = Callable[[Sequence[int], Sequence[int]], Sequence[int]]


def every_death(dead: Sequence[int], living: Sequence[int]) -> Sequence[int]:
    """Every death matters."""
    return dead


def dead_peer_ids(table: PeerTable) -> set[int]:
    """The dead peers that a table shows now."""
    return {peer_id for _, peer_id, alive in table.other_peers() if not alive}


@dataclass(slots=True)
class SeenFailures:
    """The failures that a handle, or one thread with it, has been told of."""

    deaths: set[int] = field(default_factory=set)
    thread_failures: int = 0

    def copy(self) -> SeenFailures:
        """The same for another handle, which goes its own way from now on."""
        return SeenFailures(set(self.deaths), self.thread_failures)

    def next_unseen_death(self, table: PeerTable, relevant: DeathFilter = every_death) -> tuple[int, int] | None:
        """Slot and peer id of a death that this handle must still be told of; None if there is none."""
        unseen: dict[int, int] = {}
        living: list[int] = []
        for slot, peer_id, alive in table.other_peers():
            if alive:
                living.append(slot)
            elif peer_id not in self.deaths:
                unseen[slot] = peer_id
        chosen = relevant(list(unseen), living) if unseen else ()
        return next(((slot, unseen[slot]) for slot in chosen), None)

    def mark_seen(self, table: PeerTable, peer_id: int) -> None:
        """The handle is told of this death now."""
        self.deaths &= dead_peer_ids(table)
        self.deaths.add(peer_id)
