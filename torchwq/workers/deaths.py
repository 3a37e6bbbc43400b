"""Raises the deaths that a table of peers shows, and says whether another peer may still come."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ..errors import WorkerDied
from ..peers.failures import DeathFilter, SeenFailures, every_death
from ..peers.local_handles import LocalHandles
from ..peers.table import PeerTable
from ..transport import reactor
from . import info, worker

H = TypeVar("H")


def death_of(table: PeerTable, slot: int, what: str) -> WorkerDied:
    """Return the error for the death of the process that had ``slot`` of the table, and ``what`` open."""
    pid = table.pid(slot)
    if table.has_failed(slot):
        return WorkerDied(
            f"a worker (pid {pid}) that had {what} ended with an error: join() of its map raises it", pid=pid
        )
    process = worker.find(pid)
    if process is None:
        return worker.death_error(pid=pid, reason=f"its process ended without having closed {what}")
    if not reactor.get().is_in_current_thread:
        process.ended_event.wait(1.0)  # the kernel may report the death before the fork server does
    return process.death_error()


def raise_next_death(
    seen: SeenFailures,
    table: PeerTable,
    what: str,
    concerning: DeathFilter = every_death,
    *,
    unless: Callable[[], bool] = lambda: False,
    so: str = "",
) -> None:
    """Raise WorkerDied for the next death that ``seen`` does not have, if there is one, and add it there.

    Args:
        seen: the deaths that were raised already.
        table: the peers that have ``what`` open.
        concerning: see :meth:`SeenFailures.next_unseen_death`.
        unless: called after a death was found; True leaves it for later, for example because a message that the dead
            peer wrote comes first.
        so: the beginning of the error's message: what the death means for the caller.
    """
    found = seen.next_unseen_death(table, concerning)
    if found is not None and not unless():
        slot, peer_id = found
        seen.mark_seen(table, peer_id)
        death = death_of(table, slot, what)
        death.args = (f"{so}{death}",)
        raise death


def others_may_come(handles: LocalHandles[H], table: PeerTable | None, waits: Callable[[int], bool]) -> bool:
    """Return whether a peer elsewhere may still do what all handles of this process wait for.

    A handle in flight may arrive, within this process or in another. A message that no process will read keeps its
    handle in flight for ever; so a handle in flight to another process counts only while a worker lives.

    Args:
        handles: the handles of this process.
        table: the peers that have the object open; None if no other process can have it.
        waits: whether the process of a slot waits for the same.
    """
    if handles.pending:
        return True
    if table is None:
        return False
    if any(lives and not waits(slot) for slot, lives in table.other_slots()):
        return True
    return table.any_handle_in_flight() and bool(worker.active_workers() or info.worker_info() is not None)
