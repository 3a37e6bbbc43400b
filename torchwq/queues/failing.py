"""How the owner of a queue learns that a worker's function has failed: what travels, and what a read raises then.

The error itself is unpickled only when it is raised, in the thread that waits: that runs users' code.
"""

from __future__ import annotations

import pickle
import struct
from dataclasses import dataclass
from typing import Final

from ..errors import WorkerDied
from ..marshalling import exceptions
from ..workers import worker
from ..workers.failures import Failure
from .protocol import FAILED

#: Longest message, in bytes; and how much of its text an error that is longer keeps, in characters.
_LIMIT: Final = 16 * 1024
_LONGEST_TEXT: Final = 4 * 1024
#: ``FAILED``, the failure's number, the worker's mapid or -1, whether its process ends; the error follows, pickled.
_HEAD: Final = struct.Struct("=cQq?")


def encode(failure: Failure) -> bytes:
    """What a worker in another process says."""
    error = failure.error
    if isinstance(error, BaseException):  # of a thread
        error = exceptions.pack(error)
    if error is not None:
        error = error._replace(whole=None)
    data = _dumps(failure, error)
    if len(data) > _LIMIT:
        short = exceptions.PackedException(
            None, None, None, error.kind, error.summary[:_LONGEST_TEXT], error.text[-_LONGEST_TEXT:]
        )
        data = _dumps(failure, short)
    return data


def _dumps(failure: Failure, error: exceptions.PackedException | None) -> bytes:
    mapid = -1 if failure.mapid is None else failure.mapid
    head = _HEAD.pack(FAILED, failure.number, mapid, failure.ends)
    return head + pickle.dumps(None if error is None else tuple(error))


def received(data: bytes) -> Failure:
    """What a worker in another process has said. Its error is still packed, and pickled."""
    _, number, mapid, ends = _HEAD.unpack_from(data)
    return Failure(number, None if mapid < 0 else mapid, data[_HEAD.size :], ends)


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
            process.error_was_told = True
            if cause is None and process.ended_event.is_set():
                return process.died(self.in_hand)
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
            fields = pickle.loads(failure.error)
            known = None if fields is None else exceptions.unpack(exceptions.PackedException(*fields))
        return known


@dataclass(slots=True)
class NeverCame:
    """A worker that has failed before it opened the queue, when no other was there that could have."""

    process: worker.Worker

    def summary(self) -> str:
        return str(self.process.died())

    def error(self) -> WorkerDied:
        """What the read raises. Runs users' code."""
        death, cause = self.process.died(), self.process.error()
        if cause is not None and not isinstance(cause, WorkerDied):
            self.process.error_was_told = True
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
