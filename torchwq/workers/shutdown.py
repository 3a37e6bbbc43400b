"""What happens when a process of ours ends by itself.

In this order, because each step needs the ones after it still to be there: finish what was promised (plain tasks and
pools, as ``concurrent.futures`` does; not after Ctrl-C), close queues, so that workers that read from them end by
themselves, end the workers that are left, tell of errors that nobody has asked for, give up the fork server and the
namespace.

A process that is killed does none of this; then the fork server does what is needed.
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

from ..memory import recycling
from ..transport import cleanup, directory, namespace
from ..transport.fork import reset_in_child
from . import client, worker

#: How long, in seconds, workers may take to end by themselves after their queues were closed, and after SIGTERM.
_GRACE: Final = 0.3

_finish: list[Callable[[], None]] = []
_close: list[Callable[[], None]] = []
_report: list[Callable[[], None]] = []
_done = False
#: Whether this process is a worker that ends with an error.
failed = False


@reset_in_child
def _forget() -> None:
    global _done
    _done = False


def at_finish(callback: Callable[[], None]) -> None:
    """Let ``callback()`` wait for what must be finished before exit."""
    _finish.append(callback)


def at_close(callback: Callable[[], None]) -> None:
    """Let ``callback()`` close what workers may be waiting for."""
    _close.append(callback)


def at_report(callback: Callable[[], None]) -> None:
    """Let ``callback()`` tell of errors that nobody has asked for, when no worker is left that could have some."""
    _report.append(callback)


def interrupted() -> bool:
    """Whether this process is ending because of Ctrl-C: an interactive one goes on after it, and ends otherwise."""
    return getattr(sys, "last_type", None) is KeyboardInterrupt and not hasattr(sys, "ps1")


def block_daemon_at_exit() -> None:
    """Called where a call that has waited is about to raise: keep a daemon of the user's there if the process ends.

    What it would be told is only that this process ends. A daemon that waits for something else is not told either.
    """
    if worker.owner_is_exiting:
        thread = threading.current_thread()
        if thread.daemon and not thread.name.startswith("torchwq-"):
            threading.Event().wait()


def run() -> None:
    """End everything of this process, once."""
    global _done
    if _done:
        return
    _done = True
    cleanup.finish()
    if not interrupted():
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C ends all that exit was waiting for
            _call_all(_finish)
    worker.owner_is_exiting = True
    _call_all(_close)
    end_workers(_GRACE)
    cleanup.finish()
    _call_all(_report)
    directory.close()
    client.close()
    namespace.remove()
    recycling.end()


def _call_all(callbacks: list[Callable[[], None]]) -> None:
    for callback in callbacks:
        try:
            callback()
        except Exception:  # the others must be called all the same
            traceback.print_exc()


def end_workers(grace: float) -> None:
    """End all workers of this process: wait, ask, force; threads can only be asked."""
    for number in (None, signal.SIGTERM, signal.SIGKILL):
        left = [each for each in worker.active_workers() if each.can_be_killed or number is not signal.SIGKILL]
        for each in left:
            if number is not None:
                each.terminate(number)
        until = time.monotonic() + (grace if number is not signal.SIGKILL else 2.0)
        for each in left:
            each.ended_event.wait(max(0.0, until - time.monotonic()))


# Before the interpreter waits for threads, where concurrent.futures does the same; atexit is the fallback.
getattr(threading, "_register_atexit", atexit.register)(run)
