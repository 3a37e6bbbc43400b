"""Starts workers of any backend, and registers the backends."""

from __future__ import annotations

import itertools
import operator
import signal
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import TorchwqError
from ..transport import descriptors
from .backend import Backend, find, register, register_module
from .info import WorkerInfo
from .processes import Processes
from .threads import Threads
from .worker import OnEnd, OnMessage, Worker

register(Processes())
register(Threads())
register_module("ray", "torchwq.ray")

_started = itertools.count()


def warm_up(wait: bool = True) -> None:
    """Start the fork server now, so that the first workers start as fast as later ones.

    Otherwise the first worker starts the server, which takes as long as importing torch does. Workers share the server
    of the process that started them, so this does nothing in a worker.

    Args:
        wait: return when the server is ready; False returns at once, and the server gets ready in the background.

    Raises:
        WorkerStartError: no Python interpreter was found for the server, or the server failed to get ready.
        ResourceError: the system's limits do not allow another process.

    Source: what ``multiprocessing.set_forkserver_preload`` is for.
    """
    find("process").warm_up(wait)


def name_of(f: Any) -> str:
    """What a function, or another object that can be called or iterated over, is called where people read it."""
    name: str = getattr(f, "__qualname__", None) or type(f).__qualname__
    return name


def check_number(n: Any, what: str) -> int:
    """Return ``n`` as a number of workers. Raises TypeError if it is no integer, ValueError if it is less than 1.

    Args:
        n: the user's argument.
        what: the call with a proper argument, for the error.
    """
    try:
        number = operator.index(n)
    except TypeError:
        raise TypeError(f"the number of workers must be an integer, not {type(n).__name__}: {what}") from None
    if number < 1:
        raise ValueError(f"the number of workers must be at least 1, not {number}")
    return number


def start(
    entry: str,
    messages: Sequence[Sequence[Any]],
    on_message: OnMessage,
    on_end: OnEnd,
    *,
    backend: Backend,
    keep_alive: object = None,
    first_mapid: int = 0,
    of: int | None = None,
) -> list[Worker]:
    """Start workers, and send each its first messages. If one cannot be started or sent to, kill all.

    Args:
        entry: the function that the workers run, ``module:function``.
        messages: the first messages of each worker.
        keep_alive: objects that must live as long as the workers.
        first_mapid: the number of the first worker.
        of: how many workers there are in all; by default as many as this call starts.

    Raises ResourceError if no descriptor or thread is left, or a message cannot be sent; WorkerStartError if no process
    can be started.
    """
    group = next(_started)
    seed = _base_seed(group)
    workers: list[Worker] = []
    try:
        for mapid in range(first_mapid, first_mapid + len(messages)):
            info = WorkerInfo(mapid, of or len(messages), (seed + mapid) % 2**63)
            workers.append(backend.start(info, entry, on_message, on_end, group))
        for worker, first in zip(workers, messages, strict=True):
            worker.keep_alive = keep_alive
            for message in first:
                worker.send(message)
    except BaseException as error:
        for worker in workers:
            worker.terminate(signal.SIGKILL)
            if not worker.can_be_killed:
                worker.send(None)  # wakes the thread, which waits for its first message, to be interrupted
        if isinstance(error, OSError) and not isinstance(error, TorchwqError):
            raise descriptors.resource_error(error) from error
        raise
    return workers


def _base_seed(group: int) -> int:
    """Return a seed that differs for each start and follows from torch's. Does not draw from torch's generator."""
    return (torch.initial_seed() * 6364136223846793005 + (group + 1) * 1442695040888963407) % 2**62
