"""Starts workers, of either kind."""

from __future__ import annotations

import itertools
import operator
import signal
from typing import Any, Final

import torch

from ..errors import TorchwqError
from ..memory import anonymous
from .info import WorkerInfo
from .processes import ProcessWorker
from .threads import ThreadWorker
from .worker import OnEnd, OnMessage, Worker

#: What ``backend`` may be.
BACKENDS: Final[dict[str, type[ProcessWorker] | type[ThreadWorker]]] = {
    "process": ProcessWorker,
    "thread": ThreadWorker,
}

_started = itertools.count()


def check_backend(backend: str) -> None:
    """Raise ValueError unless ``backend`` names one that exists."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be 'process' or 'thread', not {backend!r}")


def check_number(n: Any, what: str) -> int:
    """``n`` as a number of workers. Raises TypeError if it is none, ValueError if it is less than 1.

    Args:
        n: what the user has given.
        what: how it is given properly.
    """
    try:
        number = operator.index(n)
    except TypeError:
        raise TypeError(f"the number of workers must be an integer, not {type(n).__name__}: {what}") from None
    if number < 1:
        raise ValueError(f"the number of workers must be at least 1, not {number}")
    return number


def start(
    n: int,
    entry: str,
    on_message: OnMessage,
    on_end: OnEnd,
    *,
    backend: str = "process",
    first_mapid: int = 0,
    of: int | None = None,
) -> list[Worker]:
    """Start ``n`` workers that run ``entry`` (``module:function``), numbered from ``first_mapid``, of ``of`` in all.

    Raises ResourceError if descriptors or threads have run out, WorkerStartError if no process can be started.
    """
    group = next(_started)
    seed = _base_seed(group)
    workers: list[Worker] = []
    make = BACKENDS[backend]
    try:
        for mapid in range(first_mapid, first_mapid + n):
            workers.append(make(WorkerInfo(mapid, of or n, (seed + mapid) % 2**63), entry, on_message, on_end, group))
    except BaseException as error:
        for worker in workers:
            worker.kill(signal.SIGKILL)
        if isinstance(error, OSError) and not isinstance(error, TorchwqError):
            raise anonymous.exhausted(error) from error
        raise
    return workers


def _base_seed(group: int) -> int:
    """Different for each start, and reproducible if the owner has seeded torch. Leaves torch's generator alone."""
    return (torch.initial_seed() * 6364136223846793005 + (group + 1) * 1442695040888963407) % 2**62
