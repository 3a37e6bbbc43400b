"""What a worker knows about itself."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from ..transport.fork import reset_in_child


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker's place among the workers it was started with.

    Attributes:
        mapid: its number, from 0.
        num_workers: how many were started together.
        seed: what ``random``, ``numpy.random`` and ``torch`` were seeded with in this worker process; different in
            each, and the same again in a run in which the owner has called ``torch.manual_seed`` with the same value.
            Threads share these generators: there it is a seed for one of the worker's own.
    """

    mapid: int
    num_workers: int
    seed: int


_process_info: WorkerInfo | None = None
_thread_local = threading.local()


@reset_in_child
def _forget() -> None:
    """The thread that has forked may be a worker; the child is none."""
    global _thread_local
    _thread_local = threading.local()


def worker_info() -> WorkerInfo | None:
    """Tell which worker this is.

    Returns:
        A :class:`WorkerInfo` in a worker, be it a process or a thread; None anywhere else.

    Source: ``torch.utils.data.get_worker_info``.
    """
    info: WorkerInfo | None = getattr(_thread_local, "info", _process_info)
    return info


def set_thread_info(info: WorkerInfo) -> None:
    _thread_local.info = info


def set_process_info(info: WorkerInfo | None) -> None:
    global _process_info
    _process_info = info
