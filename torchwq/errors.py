"""Every error that torchwq raises on its own account.

Each derives from :class:`TorchwqError`, so that one ``except`` catches them all, *and* from the builtin that a caller
who has never read this page would expect. They live below all other layers because all of them raise them, and
they all survive pickling, because a worker that is itself an owner passes them on.
"""

from __future__ import annotations

import signal as _signal
from typing import Any

__all__ = [
    "ClosureError",
    "MarshalError",
    "MutexError",
    "NamespaceError",
    "QueueClosed",
    "RemoteError",
    "RemoteTraceback",
    "ResourceError",
    "TorchwqError",
    "WorkerDied",
    "WorkerStartError",
]


class TorchwqError(Exception):
    """Base class of all errors of this library."""


class MarshalError(TorchwqError, TypeError):
    """An object cannot travel to another process.

    The message names the place of the offending object inside what was written, e.g. ``args[0]['model'].hook``.
    Nothing has been sent when it is raised.
    """


class ClosureError(MarshalError):
    """A function or class would drag data along that the caller did not pass.

    The message names each captured variable with its type and size, and the two ways out: pass the data as an
    argument, or use ``writeup`` / ``upvalues=True``.
    """


class QueueClosed(TorchwqError, RuntimeError):
    """The queue was closed: by its owner, because its owner has ended, or this handle was closed in this process."""


class MutexError(TorchwqError, RuntimeError):
    """A mutex was released by a thread that does not hold it, taken again by one that does, or inherited by a fork."""


class NamespaceError(TorchwqError, OSError):
    """A named queue can be neither opened nor created: the namespace of this process tree cannot be used."""


class ResourceError(TorchwqError, OSError):
    """Memory or file descriptors ran out. The message names the limit and how to raise it."""


class WorkerStartError(TorchwqError, OSError):
    """Workers cannot be started: no Python interpreter was found for them, or it cannot be run. The message tells."""


class RemoteError(TorchwqError, RuntimeError):
    """A worker raised an exception which could not be carried over as an object.

    The message holds the type and the text of the original exception, and the worker's traceback.
    """


class RemoteTraceback(Exception):
    """The cause of an exception that came from a worker: its traceback there, as text."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"\n\n--- in the worker ---\n{self.text.rstrip()}\n---------------------"


class WorkerDied(TorchwqError, RuntimeError):
    """A worker ended without having finished, or no worker is left to answer.

    Attributes:
        mapid: number of the worker in its ``map``, or None where it is not known.
        pid: its process id, or None.
        signal: the signal that ended it (:class:`signal.Signals`), or None.
        exitcode: its exit status (0 to 255) if it ended by itself, ``-signal`` if a signal ended it, or None if
            that is not known.
    """

    def __init__(
        self,
        message: str = "a worker died",
        *,
        mapid: int | None = None,
        pid: int | None = None,
        signal: _signal.Signals | int | None = None,
        exitcode: int | None = None,
    ) -> None:
        super().__init__(message)
        self.mapid = mapid
        self.pid = pid
        self.signal = signal
        self.exitcode = exitcode

    def __reduce__(self) -> tuple[Any, ...]:
        fields = {"mapid": self.mapid, "pid": self.pid, "signal": self.signal, "exitcode": self.exitcode}
        return (_rebuild_worker_died, (str(self), fields))


class Interrupted(SystemExit):
    """Ends a worker that is a thread, in the middle of whatever it does. Not for users, who never see it."""


def _rebuild_worker_died(message: str, fields: dict[str, Any]) -> WorkerDied:
    return WorkerDied(message, **fields)
