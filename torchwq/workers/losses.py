"""Says who it was that a roster has lost."""

from __future__ import annotations

from ..errors import WorkerDied
from ..memory.roster import Roster
from ..transport import reactor
from . import deaths, worker


def lost(roster: Roster, seat: int, what: str) -> WorkerDied:
    """The error that tells of the end of the process that had ``seat``, and ``what`` open."""
    pid = roster.pid(seat)
    if roster.has_failed(seat):
        return WorkerDied(
            f"a worker (pid {pid}) that had {what} ended with an error: join() of its map raises it", pid=pid
        )
    process = worker.find(pid)
    if process is None:
        return deaths.died(pid=pid, reason=f"its process ended without having closed {what}")
    if not reactor.get().is_in_current_thread:
        process.ended_event.wait(1.0)  # the kernel may be faster than the fork server, of which the reactor hears
    return process.died()
