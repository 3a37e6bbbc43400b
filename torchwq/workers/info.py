"""What a worker knows about itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker's place among the workers it was started with.

    Attributes:
        mapid: its number, from 0.
        num_workers: how many were started together.
        seed: what ``random``, ``numpy.random`` and ``torch`` were seeded with in this worker; different in each, and
            the same again in a run in which the owner has called ``torch.manual_seed`` with the same value.
    """

    mapid: int
    num_workers: int
    seed: int


_info: WorkerInfo | None = None


def worker_info() -> WorkerInfo | None:
    """Tell which worker this is.

    Returns:
        A :class:`WorkerInfo` in a worker process; None in any other process.

    Source: ``torch.utils.data.get_worker_info``.
    """
    return _info


def set_info(info: WorkerInfo | None) -> None:
    global _info
    _info = info
