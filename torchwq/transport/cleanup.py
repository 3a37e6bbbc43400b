"""Runs, in a thread of its own, what a finalizer or the reactor must not do itself.

Garbage is collected at any moment, in any thread, with any lock held; and the reactor must not wait, nor run users'
code, which pickling does. So neither takes a lock for long, waits for another process or marshals. Both leave that to
this thread, which lives while there is something to do.

Invariants:

* ``call_soon`` appends to a list and wakes the reactor, which starts the thread: it waits for nothing.
* The thread clears ``_is_running`` and looks at ``_pending`` once more afterwards; ``call_soon`` appends first, and
  looks at ``_is_running`` afterwards. So one of them sees the other.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable

from . import reactor
from .fork import reset_in_child
from .timing import CLEANUP_TIMEOUT, POLL_INTERVAL

_pending: deque[Callable[[], None]] = deque()
_is_running = False


@reset_in_child
def _forget() -> None:
    global _is_running
    _pending.clear()
    _is_running = False


def call_soon(callback: Callable[[], None]) -> None:
    """Have ``callback()`` called soon, in a thread of its own. Finalizers may call this."""
    if sys.is_finalizing():
        return
    _pending.append(callback)
    if not _is_running:
        try:
            reactor.get().call_later(0, _start)
        except RuntimeError:
            pass  # no thread can be started now: the next call or the end of the process does it


def _start() -> None:
    global _is_running
    if _is_running or not _pending:
        return
    _is_running = True
    try:
        threading.Thread(target=_run, name="torchwq-cleanup", daemon=True).start()
    except RuntimeError:  # the interpreter ends, which closes everything; or too many threads, see ``call_soon``
        _is_running = False


def finish() -> None:
    """At the end of the process: run what is pending, and give the thread CLEANUP_TIMEOUT to end its callback."""
    until = time.monotonic() + CLEANUP_TIMEOUT
    _run_pending()
    while _is_running and time.monotonic() < until:
        time.sleep(POLL_INTERVAL)


def _run_pending() -> None:
    while True:
        try:
            callback = _pending.popleft()
        except IndexError:
            return
        try:
            callback()
        except Exception:
            print("torchwq: internal error while cleaning up", file=sys.stderr)
            traceback.print_exc()


def _run() -> None:
    global _is_running
    while True:
        _run_pending()
        _is_running = False
        if not _pending or _is_running:
            return
        _is_running = True
