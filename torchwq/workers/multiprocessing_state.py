"""The state that multiprocessing passes to each process that it starts, and torchwq to each worker.

The *key* authenticates processes to each other: without it, a manager refuses a worker. The *resource tracker* is the
process that removes named semaphores and shared memory when no process can use them any more. A tracker of a worker's
own would remove the owner's shared memory when the worker ends.

The tracker starts with the first worker, as with multiprocessing: a later one would not reach that worker. Where a
process keeps the tracker's descriptor is private to multiprocessing; ``adopt`` sets it as ``multiprocessing.spawn``
does in a new process, from Python 3.8 to 3.14.
"""

from __future__ import annotations

import contextlib
from multiprocessing import process, resource_tracker
from typing import Any

from ..errors import WorkerStartError
from ..memory.anonymous import Descriptor
from ..transport import descriptors
from . import executable

_tracker: Any = getattr(resource_tracker, "_resource_tracker", None)


def authkey() -> bytes:
    """Return the key of this process."""
    return bytes(process.current_process().authkey)


def tracker_descriptor() -> Descriptor | None:
    """Start the tracker if necessary, and return a duplicate of the descriptor that leads to it.

    Returns None if no tracker can be started. Raises ResourceError if no descriptor is left.
    """
    try:
        with executable.for_multiprocessing():
            descriptors.fill_stdio()
            fd = resource_tracker.getfd()
    except WorkerStartError:  # the fork server's start raises it
        return None
    except OSError as error:
        raise descriptors.resource_error(error) from error
    except Exception:  # a finalizer runs this while the tracker is being started
        fd = getattr(_tracker, "_fd", None)
    if fd is None:
        return None
    try:
        return Descriptor(descriptors.dup(fd))
    except OSError as error:
        raise descriptors.resource_error(error) from error


def start_tracker() -> None:
    """Start the tracker, if possible."""
    with contextlib.suppress(Exception), executable.for_multiprocessing():
        descriptors.fill_stdio()
        resource_tracker.ensure_running()


def adopt(authkey: bytes, tracker_fd: int | None) -> None:
    """In a worker: use the owner's key and tracker."""
    process.current_process().authkey = authkey
    if tracker_fd is not None and hasattr(_tracker, "_fd"):
        _tracker._fd = tracker_fd
