"""Reports the failure of a worker's function to the handles that the worker has open.

Note [failures before closing]. The invariants:

* A worker process has one ``FailureState``; a worker that is a thread has its own. The worker's handles listen to it.
  The thread whose function fails tells the listeners at once, before it closes what the function has opened.
* A handle that a ``with`` block closes because of an error is *in doubt* until the function ends: only then is it known
  whether the function fails. The handle then reports the failure, or that there was none.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass
from typing import Any, Final, Protocol

from ..transport.fork import reset_in_child
from . import info


@dataclass(frozen=True, slots=True, eq=False)
class Failure:
    """One failure of one worker.

    Attributes:
        number: unique among the failures of a process.
        mapid: the worker's number.
        error: the packed exception of a process, or the exception itself of a thread; None if it is not known.
        ends: whether the worker's process ends because of the failure.
    """

    number: int
    mapid: int | None
    error: Any
    ends: bool


class Listener(Protocol):
    """A handle that a worker has opened."""

    def worker_failed(self, failure: Failure) -> None:
        """The worker's function has failed."""

    def worker_succeeded(self) -> None:
        """The worker's function has ended without an error. Only handles in doubt are told."""


_numbers: Final = itertools.count(1)


class FailureState:
    """The listeners to the failures of one worker."""

    def __init__(self) -> None:
        self._listeners: weakref.WeakSet[Listener] = weakref.WeakSet()
        self._in_doubt: list[Listener] = []

    def add(self, listener: Listener) -> None:
        self._listeners.add(listener)

    def remove(self, listener: Listener) -> None:
        self._listeners.discard(listener)

    def mark_in_doubt(self, listener: Listener) -> bool:
        """Note that an error closed this handle; the function may fail with it. Returns False outside of a worker."""
        if info.worker_info() is None:
            return False
        self._in_doubt.append(listener)
        return True

    def fail(self, error: Any, *, ends: bool) -> None:
        """Tell the listeners that the function has failed."""
        worker = info.worker_info()
        failure = Failure(next(_numbers), None if worker is None else worker.mapid, error, ends)
        in_doubt, self._in_doubt = self._in_doubt, []
        for listener in {*self._listeners, *in_doubt}:
            listener.worker_failed(failure)

    def succeed(self) -> None:
        """Tell the handles in doubt that the function has ended without an error."""
        if not self._in_doubt:
            return
        in_doubt, self._in_doubt = self._in_doubt, []
        for listener in in_doubt:
            listener.worker_succeeded()


#: The state of this process, if it is a worker.
process_state = FailureState()


@reset_in_child
def _forget() -> None:
    global process_state
    process_state = FailureState()
