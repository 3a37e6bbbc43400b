"""Does what is left to be done when something is garbage, or when the reactor learns of an end.

Garbage is collected at any moment, in any thread, with any lock held; and the reactor must not wait, nor run code of
the user's, which pickling does. So neither closes anything that takes a lock for long, waits for another process or
marshals. Both leave it here, and a thread that lives as long as there is something to do does it.

Invariants:

* ``later`` appends to a list and wakes the reactor, which starts the thread: it waits for nothing.
* The thread says that it ends and looks for the last time afterwards; who leaves something looks afterwards whether
  there is a thread. So one of them sees the other.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Final

from . import reactor
from .fork import reset_in_child

#: How long, in seconds, the end of the process waits for what the thread is just at.
_MOMENT: Final = 1.0

_due: deque[Callable[[], None]] = deque()
_runs = False


@reset_in_child
def _forget() -> None:
    global _runs
    _due.clear()
    _runs = False


def later(callback: Callable[[], None]) -> None:
    """Have ``callback()`` called soon, in a thread of its own. Finalizers may call this."""
    if sys.is_finalizing():
        return
    _due.append(callback)
    if not _runs:
        try:
            reactor.get().call_later(0, _start)
        except RuntimeError:
            pass  # there are too many threads: the next one who leaves something, or the end of the process


def _start() -> None:
    global _runs
    if _runs or not _due:
        return
    _runs = True
    try:
        threading.Thread(target=_run, name="torchwq-cleanup", daemon=True).start()
    except RuntimeError:  # the interpreter ends, which closes everything; or there are too many threads: the next one
        _runs = False


def finish() -> None:
    """At the end of the process: do what is left. What the thread is just at is waited for, for a moment."""
    until = time.monotonic() + _MOMENT
    _work_off()
    while _runs and time.monotonic() < until:
        time.sleep(0.001)


def _work_off() -> None:
    while True:
        try:
            callback = _due.popleft()
        except IndexError:
            return
        try:
            callback()
        except Exception:
            print("torchwq: internal error while cleaning up", file=sys.stderr)
            traceback.print_exc()


def _run() -> None:
    global _runs
    while True:
        _work_off()
        _runs = False
        if not _due or _runs:
            return
        _runs = True
