"""The errors that torchwq raises.

Each derives from :class:`TorchwqError`, so that one ``except`` catches them all, *and* from the builtin that a caller
would expect. All can be pickled, because a worker that is itself an owner passes them on.
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
    """An object cannot be sent to another process.

    The message names the object's place in the argument, e.g. ``args[0]['model'].hook``. Nothing has been sent.
    """


class ClosureError(MarshalError):
    """A function or class captures data that the caller has not passed.

    The message names each captured variable with its type and size, and the two remedies: pass the data as an argument,
    or use ``writeup`` / ``upvalues=True``.
    """


class QueueClosed(TorchwqError, RuntimeError):
    """The owner has closed the queue or has ended, or this process has closed the handle."""


class MutexError(TorchwqError, RuntimeError):
    """A thread releases a mutex that it does not hold, acquires one that it holds, or uses one inherited by a fork."""


class NamespaceError(TorchwqError, OSError):
    """A named queue can be neither opened nor created, because the process tree's namespace cannot be used."""


class ResourceError(TorchwqError, OSError):
    """No memory or file descriptor is left. The message names the limit and how to raise it."""


class WorkerStartError(TorchwqError, OSError):
    """Workers cannot be started. The message says why, e.g. that no Python interpreter was found for them."""


class RemoteError(TorchwqError, RuntimeError):
    """A worker raised an exception that cannot be sent as an object.

    The message has the exception's type and text, and the worker's traceback.
    """


class RemoteTraceback(Exception):
    """The cause of an exception from a worker: the worker's traceback, as text."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"\n\n--- in the worker ---\n{self.text.rstrip()}\n---------------------"


class WorkerDied(TorchwqError, RuntimeError):
    """A worker ended before it had finished, or no worker is left to answer.

    Attributes:
        mapid: the worker's number in its ``map``, or None if it is not known.
        pid: the worker's process id, or None.
        signal: the signal that ended the worker (:class:`signal.Signals`), or None.
        exitcode: the worker's exit status (0 to 255), or ``-signal`` if a signal ended it; None if it is not known.
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
    """Ends a worker that is a thread, whatever it does. Internal: no call raises it to users."""


def _rebuild_worker_died(message: str, fields: dict[str, Any]) -> WorkerDied:
    return WorkerDied(message, **fields)
