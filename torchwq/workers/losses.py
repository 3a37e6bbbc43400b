"""Says who it was that a table of peers has lost, and who may still come."""

from __future__ import annotations

from ..errors import WorkerDied
from ..peers.table import PeerTable
from ..transport import reactor
from . import deaths, info, worker


def death_of(table: PeerTable, slot: int, what: str) -> WorkerDied:
    """The error that tells of the end of the process that had ``slot``, and ``what`` open."""
    pid = table.pid(slot)
    if table.has_failed(slot):
        return WorkerDied(
            f"a worker (pid {pid}) that had {what} ended with an error: join() of its map raises it", pid=pid
        )
    process = worker.find(pid)
    if process is None:
        return deaths.died(pid=pid, reason=f"its process ended without having closed {what}")
    if not reactor.get().is_in_current_thread:
        process.ended_event.wait(1.0)  # the kernel may be faster than the fork server, of which the reactor hears
    return process.died()


def handle_may_come(table: PeerTable) -> bool:
    """Whether a handle that has left for another process may still come to somebody who would use it.

    One that is in a message which nobody will read is under way for ever: once no worker lives, none comes any more.
    """
    return table.any_under_way() and bool(worker.living() or info.worker_info() is not None)
