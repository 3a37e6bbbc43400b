"""What multiprocessing hands on to each process that it starts, and torchwq to each worker.

The *key* by which its processes know each other: without it, a manager refuses a worker. And the *resource tracker*:
the process that removes named semaphores and shared memory when all are gone who could use them. A worker with a
tracker of its own would have the owner's shared memory removed when the worker ends.

The tracker is started with the first worker, as multiprocessing does it: a worker that came before it could not get it
any more. Private to multiprocessing is where a process has the tracker's descriptor; this is what
``multiprocessing.spawn`` itself does in a new process, from Python 3.8 to 3.14.
"""

from __future__ import annotations

import contextlib
from multiprocessing import process, resource_tracker
from typing import Any

from ..errors import WorkerStartError
from ..memory.anonymous import Descriptor, resource_error
from ..transport import descriptors
from . import executable

_tracker: Any = getattr(resource_tracker, "_resource_tracker", None)


def authkey() -> bytes:
    """The owner's."""
    return bytes(process.current_process().authkey)


def tracker_descriptor() -> Descriptor | None:
    """A duplicate of the descriptor by which this process talks to the tracker, which runs from now on.

    None where there is none to be had. Raises ResourceError if descriptors have run out.
    """
    try:
        with executable.for_multiprocessing():
            descriptors.fill_stdio()
            fd = resource_tracker.getfd()
    except WorkerStartError:  # whoever starts the worker is told
        return None
    except OSError as error:
        raise resource_error(error) from error
    except Exception:  # a finalizer in the middle of starting it
        fd = getattr(_tracker, "_fd", None)
    if fd is None:
        return None
    try:
        return Descriptor(descriptors.dup(fd))
    except OSError as error:
        raise resource_error(error) from error


def start_tracker() -> None:
    """Start the tracker now, if that is possible."""
    with contextlib.suppress(Exception), executable.for_multiprocessing():
        descriptors.fill_stdio()
        resource_tracker.ensure_running()


def adopt(authkey: bytes, tracker_fd: int | None) -> None:
    """At the worker: have the owner's."""
    process.current_process().authkey = authkey
    if tracker_fd is not None and hasattr(_tracker, "_fd"):
        _tracker._fd = tracker_fd
