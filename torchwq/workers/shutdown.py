"""What torchwq does when the interpreter exits.

The steps are in this order because each needs what later steps close: finish plain tasks and pools, as
``concurrent.futures`` does (not after Ctrl-C); close queues, so that workers that read from them end by themselves; end
the other workers; print errors that were never retrieved; close the fork server and the namespace.

A process that is killed does none of this. Then the fork server ends the workers and removes the namespace.
"""

from __future__ import annotations

import atexit
import contextlib
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Final

from ..memory import maintenance
from ..transport import cleanup, directory, namespace
from ..transport.fork import reset_in_child
from . import client, worker

#: How many seconds workers have to end after their queues were closed, and again after SIGTERM.
_GRACE_PERIOD: Final = 0.3

_finish: list[Callable[[], None]] = []
_close: list[Callable[[], None]] = []
_report: list[Callable[[], None]] = []
_done = False
#: Whether this process is a worker whose function has failed.
failed = False


@reset_in_child
def _forget() -> None:
    global _done
    _done = False


def at_finish(callback: Callable[[], None]) -> None:
    """Call ``callback()`` at exit, to wait for tasks that must be finished."""
    _finish.append(callback)


def at_close(callback: Callable[[], None]) -> None:
    """Call ``callback()`` at exit, to close queues and channels that workers may wait for."""
    _close.append(callback)


def at_report(callback: Callable[[], None]) -> None:
    """Call ``callback()`` at exit, when no worker is left, to print errors that were never retrieved."""
    _report.append(callback)


def interrupted() -> bool:
    """Whether this process exits because of Ctrl-C. An interactive interpreter goes on after Ctrl-C."""
    return getattr(sys, "last_type", None) is KeyboardInterrupt and not hasattr(sys, "ps1")


def block_daemon_at_exit() -> None:
    """While the process exits, never return in a daemon thread of the user's.

    A call that has waited calls this before it raises: the error would only say that the process exits, which Python
    does not tell daemon threads that wait for anything else either.
    """
    if worker.owner_is_exiting:
        thread = threading.current_thread()
        if thread.daemon and not thread.name.startswith("torchwq-"):
            threading.Event().wait()


def run() -> None:
    """Run all steps, once."""
    global _done
    if _done:
        return
    _done = True
    cleanup.finish()
    if not interrupted():
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C ends the waiting
            _call_all(_finish)
    worker.owner_is_exiting = True
    _call_all(_close)
    end_workers(_GRACE_PERIOD)
    cleanup.finish()
    _call_all(_report)
    directory.close()
    client.close()
    namespace.remove()
    maintenance.end()


def _call_all(callbacks: list[Callable[[], None]]) -> None:
    for callback in callbacks:
        try:
            callback()
        except Exception:  # the other callbacks must run nevertheless
            traceback.print_exc()


def end_workers(grace: float) -> None:
    """End all workers of this process: wait, then SIGTERM, then SIGKILL for processes."""
    for number in (None, signal.SIGTERM, signal.SIGKILL):
        left = [each for each in worker.active_workers() if each.can_be_killed or number is not signal.SIGKILL]
        for each in left:
            if number is not None:
                each.terminate(number)
        until = time.monotonic() + (grace if number is not signal.SIGKILL else 2.0)
        for each in left:
            each.ended_event.wait(max(0.0, until - time.monotonic()))


# As concurrent.futures does: before the interpreter waits for threads. atexit is the fallback.
getattr(threading, "_register_atexit", atexit.register)(run)
