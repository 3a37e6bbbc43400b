"""How the owner of a queue learns that a worker has failed or died, and what a read raises then.

The error itself is unpickled only when it is raised, in the thread that waits: that runs users' code.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import WorkerDied
from ..workers import worker
from ..workers.failures import Failure
from .protocol import FunctionFailed


@dataclass(slots=True)
class Failed:
    """A failure as the owner knows it, until it is told.

    ``process`` is the worker, if this process has started it.
    """

    process: worker.Worker | None
    pid: int | None
    in_hand: str
    failure: Failure

    def summary(self) -> str:
        """Without the error."""
        mapid = self.failure.mapid
        who = "a worker" if mapid is None else f"worker {mapid}"
        return f"{who} ended with an error" if self.pid is None else f"{who} (pid {self.pid}) ended with an error"

    def error(self) -> WorkerDied:
        """What the read raises. Runs users' code."""
        failure = self.failure
        cause = self._cause(failure)
        process = self.process
        if process is not None:
            process.error_was_retrieved = True
            if cause is None and process.ended_event.is_set():
                return process.death_error(self.in_hand)
        exitcode = process.exitcode if process is not None and failure.ends else None
        text = self.summary() + (f", with {self.in_hand} in hand" if self.in_hand else "")
        if cause is not None:
            text += f": {type(cause).__name__}: {_text(cause)}"
        death = WorkerDied(text, mapid=failure.mapid, pid=self.pid, exitcode=exitcode)
        death.__cause__ = cause
        return death

    def _cause(self, failure: Failure) -> BaseException | None:
        process = self.process
        known = None
        if process is not None and failure.ends:
            known = process.error()
        if known is None and isinstance(failure.error, BaseException):
            known = failure.error
        if known is None and failure.error is not None:
            known = FunctionFailed.error_in(failure.error)
        return known


@dataclass(slots=True)
class Lost:
    """A worker that was killed, or has ended without a goodbye. ``process`` is None if another has started it."""

    process: worker.Worker | None
    death: WorkerDied

    def summary(self) -> str:
        return str(self.death)

    def error(self) -> WorkerDied:
        """What the read raises. Nobody needs to be told of it again, unless he asks."""
        if self.process is not None:
            self.process.error_was_retrieved = True
        return self.death


@dataclass(slots=True)
class NeverCame:
    """A worker that has failed before it opened the queue, when no other was there that could have."""

    process: worker.Worker

    def summary(self) -> str:
        return str(self.process.death_error())

    def error(self) -> WorkerDied:
        """What the read raises. Runs users' code."""
        death, cause = self.process.death_error(), self.process.error()
        if cause is not None and not isinstance(cause, WorkerDied):
            self.process.error_was_retrieved = True
            death.__cause__ = cause
        death.args = (
            f"{death}. It had not opened this queue, and no other worker is there; join() of its map tells more",
        )
        return death


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return "(its text cannot be had)"
