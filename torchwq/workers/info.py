"""What a worker can ask about itself."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from ..transport.fork import reset_in_child


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker's place among the workers it was started with.

    Attributes:
        mapid: the worker's number, from 0.
        num_workers: how many workers were started together.
        seed: the seed of ``random``, ``numpy.random`` and ``torch`` in this worker process. It differs between workers,
            and repeats in a run whose owner calls ``torch.manual_seed`` with the same value. Threads share these
            generators: a thread can seed a generator of its own with it.
    """

    mapid: int
    num_workers: int
    seed: int


_process_info: WorkerInfo | None = None
_thread_local = threading.local()


@reset_in_child
def _forget() -> None:
    """The child of a fork is no worker, even if the thread that forked is one."""
    global _thread_local
    _thread_local = threading.local()


def worker_info() -> WorkerInfo | None:
    """Return which worker this is.

    Returns:
        A :class:`WorkerInfo` in a worker, process or thread; None anywhere else.

    Source: ``torch.utils.data.get_worker_info``.
    """
    info: WorkerInfo | None = getattr(_thread_local, "info", _process_info)
    return info


def set_thread_info(info: WorkerInfo) -> None:
    _thread_local.info = info


def set_process_info(info: WorkerInfo) -> None:
    global _process_info
    _process_info = info
