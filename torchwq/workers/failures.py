"""Tells those whose queues a worker has open that its function has failed.

Invariants:

* A worker's state is its process's, or, if it is a thread, its own. What listens to it was opened by that worker, and
  is told at once, in the thread in which the function has failed: before what the function has opened is closed.
* What a ``with`` block has closed because an error left it is *in doubt* until the function ends: only then it is known
  whether the function has failed. It is told then, of a failure or of none.
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
        number: different for each failure in a process.
        mapid: the worker's.
        error: the packed exception, or, of a worker that is a thread, the exception itself; None if it is not known.
        ends: whether the worker's process ends because of it.
    """

    number: int
    mapid: int | None
    error: Any
    ends: bool


class Listener(Protocol):
    """Something that a worker has opened."""

    def worker_failed(self, failure: Failure) -> None:
        """Its worker's function has failed."""

    def worker_succeeded(self) -> None:
        """Its worker's function has ended, and not failed. Only what is in doubt is told."""


_numbers: Final = itertools.count(1)


class FailureState:
    """Whether one worker's function has failed, and who is to be told."""

    def __init__(self) -> None:
        self._listeners: weakref.WeakSet[Listener] = weakref.WeakSet()
        self._in_doubt: list[Listener] = []

    def add(self, listener: Listener) -> None:
        self._listeners.add(listener)

    def remove(self, listener: Listener) -> None:
        self._listeners.discard(listener)

    def mark_in_doubt(self, listener: Listener) -> bool:
        """It was closed by an error that may be that of the function. Returns whether it will be told which."""
        if info.worker_info() is None:
            return False
        self._in_doubt.append(listener)
        return True

    def fail(self, error: Any, *, ends: bool) -> None:
        """The function has failed."""
        known = info.worker_info()
        failure = Failure(next(_numbers), None if known is None else known.mapid, error, ends)
        in_doubt, self._in_doubt = self._in_doubt, []
        for listener in {*self._listeners, *in_doubt}:
            listener.worker_failed(failure)

    def succeed(self) -> None:
        """The function has ended, and what it had opened may be used by the worker's next one."""
        in_doubt, self._in_doubt = self._in_doubt, []
        for listener in in_doubt:
            listener.worker_succeeded()


#: Of this process, if it is a worker.
process_state = FailureState()


@reset_in_child
def _forget() -> None:
    global process_state
    process_state = FailureState()
