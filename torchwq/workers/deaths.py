"""Says who it was that a table of peers has lost, and who may still come."""

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
    """The error that tells of the end of the process that had ``slot``, and ``what`` open."""
    pid = table.pid(slot)
    if table.has_failed(slot):
        return WorkerDied(
            f"a worker (pid {pid}) that had {what} ended with an error: join() of its map raises it", pid=pid
        )
    process = worker.find(pid)
    if process is None:
        return worker.death_error(pid=pid, reason=f"its process ended without having closed {what}")
    if not reactor.get().is_in_current_thread:
        process.ended_event.wait(1.0)  # the kernel may be faster than the fork server, of which the reactor hears
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
    """Raise WorkerDied for a death that is still to be told, if there is one, and note that it was told.

    Args:
        seen: what was told already.
        table: of those who have ``what`` open.
        concerning: see :meth:`SeenFailures.next_unseen_death`.
        unless: whether something comes first, such as what the dead one wrote; asked when the death was seen.
        so: what the death means for the one who is told, to begin the error with.
    """
    found = seen.next_unseen_death(table, concerning)
    if found is not None and not unless():
        slot, peer_id = found
        seen.mark_seen(table, peer_id)
        death = death_of(table, slot, what)
        death.args = (f"{so}{death}",)
        raise death


def others_may_come(handles: LocalHandles[H], table: PeerTable | None, waits: Callable[[int], bool]) -> bool:
    """Whether somebody in another place may still do what all handles of this process wait for.

    A handle under way may come: one within this process; and one that has left for another process, but in a message
    that nobody will read it is under way for ever, so once no worker lives, none comes any more.

    Args:
        handles: those of this process.
        table: of those who have the thing open; None if no other process can have it.
        waits: whether the process of a slot waits for the same.
    """
    if handles.pending:
        return True
    if table is None:
        return False
    if any(lives and not waits(slot) for slot, lives in table.other_slots()):
        return True
    return table.any_handle_in_flight() and bool(worker.active_workers() or info.worker_info() is not None)
