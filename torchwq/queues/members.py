"""A queue's workers as its owner knows them, and those that may still become some."""

from __future__ import annotations

import time
from collections.abc import Container
from dataclasses import dataclass
from typing import Final, Protocol

from ..transport.link import Link
from ..workers import worker
from .counters import Slot

#: How long after their start, in seconds, workers may be on their way to a queue that all others have left: those that
#: were started together with one that came, and any others.
_WITH_ANOTHER: Final = 30.0
_JUST_STARTED: Final = 3.0


class Notes:
    """What the owner knows of a side in a thread of its process: as ``counters.Slot``."""

    __slots__ = ("busy_threads", "number", "taken")

    def __init__(self) -> None:
        self.number = 0
        self.taken = 0
        self.busy_threads: set[int] = set()

    @property
    def busy(self) -> int:
        return len(self.busy_threads)


class Side(Protocol):
    """Such a side (see ``thread``), as the owner knows it."""

    def rewatch(self) -> None:
        """Questions come from elsewhere now."""


@dataclass(slots=True, eq=False)
class Member:
    """One open handle. ``pid`` is None as long as the handle is pending, and for a thread of
    the owner's process, which has no link either."""

    number: int
    slot: Slot | Notes
    link: Link | None
    pid: int | None = None
    leaving: bool = False
    in_hand: str = ""
    #: As which it may make promises: see Note [in-band promises].
    sender: int = 0


def time_to_come(came: Container[object], groups: Container[int]) -> float:
    """For how many more seconds a worker of this process may be on its way to a queue; at most 0 if none is.

    Args:
        came: the identities of the workers that have opened the queue already.
        groups: the groups of workers they were started in.
    """
    now = time.monotonic()
    return max(
        (
            (_WITH_ANOTHER if process.group in groups else _JUST_STARTED) - (now - process.requested_at)
            for process in worker.active_workers()
            if process.identity not in came
        ),
        default=0.0,
    )
