"""The debug mode: tells of callbacks that hold the reactor up.

Everything that a process does not wait for itself is done by its one reactor, and a callback there must not take long,
wait, or run code of the user's. One that does so breaks nothing at once: some other queue is late, now and then. The
environment variable ``TORCHWQ_DEBUG`` has each such callback told of: on stderr, or at the end of a file if the
variable has a path. The tests set it, and fail with what it tells.

Invariants:

* Off, it costs nothing: what is decorated is the function itself.
* A machine that is busy, or that stops, accuses nobody. What is measured is the thread's own processor time; and a
  callback waits if its thread has used none while the one that watches has come by many times. A thread that waits for
  the GIL uses some: it wakes every 5 ms.
* Garbage may be collected in the reactor's thread as in any other, and then runs users' finalizers there: neither
  counts.

Source: the debug mode of asyncio, https://docs.python.org/3/library/asyncio-dev.html#debug-mode
"""

from __future__ import annotations

import functools
import gc
import itertools
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, Final, TypeVar

from .fork import reset_in_child

#: What turns it on: 1, or the path of a file.
VARIABLE: Final = "TORCHWQ_DEBUG"
ON: Final = os.environ.get(VARIABLE, "0") not in ("", "0")
#: By how much the limits are longer than they are on a machine that does nothing else.
SLOWDOWN_VARIABLE: Final = "TORCHWQ_DEBUG_PATIENCE"
_SLOWDOWN: Final = max(1.0, float(os.environ.get(SLOWDOWN_VARIABLE, "1")))
#: How much of its thread's processor time, in seconds, a callback may take.
MAX_CALLBACK_TIME: Final = 0.05 * _SLOWDOWN
#: How often, in seconds, the one that watches comes by, and how often it must find a thread asleep to say so.
_POLL_INTERVAL: Final = 0.01
_MAX_IDLE_POLLS: Final = int(20 * _SLOWDOWN)

F = TypeVar("F", bound=Callable[..., Any])


_numbers = itertools.count()


class _Running:
    """A callback that runs."""

    __slots__ = ("callback", "collecting_since", "excused", "ident", "number")

    def __init__(self, callback: object) -> None:
        self.callback = callback
        self.number = next(_numbers)
        self.ident = threading.get_ident()
        #: Processor time, in seconds, that collecting garbage has taken.
        self.excused = 0.0
        self.collecting_since: float | None = None


_running: _Running | None = None
_watches = False


@reset_in_child
def _forget() -> None:
    global _running, _watches
    _running, _watches = None, False


def timed(call: F) -> F:
    """``call``, which calls the callback that it is given in the reactor's thread; tells of one that takes long."""
    if not ON:
        return call

    @functools.wraps(call)
    def watched(callback: Any) -> None:
        global _running
        _start_watching()
        running = _running = _Running(callback)
        begun = time.thread_time()
        try:
            call(callback)
        finally:
            _running = None
        taken = time.thread_time() - begun - running.excused
        if taken > MAX_CALLBACK_TIME:
            _report(f"{callback} took {taken * 1000:.0f} ms of processor time")

    return watched  # type: ignore[return-value]


def runs_user_code(function: F) -> F:
    """``function``, which may run code of the user's; tells of a callback of the reactor that calls it."""
    if not ON:
        return function

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        running = _running
        if running is not None and running.ident == threading.get_ident() and running.collecting_since is None:
            _report(f"{running.callback} runs code of the user's", sys._getframe(1))
        return function(*args, **kwargs)

    return checked  # type: ignore[return-value]


def _note_collection(phase: str, _: Any) -> None:
    running = _running
    if running is None or running.ident != threading.get_ident():
        return
    if phase == "start":
        running.collecting_since = time.thread_time()
    elif running.collecting_since is not None:
        running.excused += time.thread_time() - running.collecting_since
        running.collecting_since = None


if ON:
    gc.callbacks.append(_note_collection)


def _start_watching() -> None:
    global _watches
    if not _watches:
        _watches = True
        try:
            threading.Thread(target=_watch, name="torchwq-debug", daemon=True).start()
        except RuntimeError:  # there are too many threads, or the interpreter ends
            pass


def _watch() -> None:
    """Look for a callback that waits."""
    seen: tuple[int, float] | None = None
    idle_polls = 0
    while True:
        time.sleep(_POLL_INTERVAL)
        before, seen = seen, _state()
        idle_polls = idle_polls + 1 if seen is not None and seen == before else 0
        if seen is not None and idle_polls == _MAX_IDLE_POLLS:
            running = _running
            if running is not None and running.number == seen[0]:
                _report(f"{running.callback} waits", sys._current_frames().get(running.ident))
            del running  # nothing here keeps a callback, and what it belongs to


def _state() -> tuple[int, float] | None:
    """Which callback runs, and how much processor time its thread has used by now."""
    running = _running
    if running is None:
        return None
    return running.number, time.clock_gettime(time.pthread_getcpuclockid(running.ident))


def _report(what: str, frame: Any = None) -> None:
    stack = "".join(traceback.format_stack(frame)) if frame is not None else ""
    said = f"torchwq: in the reactor of process {os.getpid()}, {what}\n{stack}"
    path = os.environ.get(VARIABLE, "")
    if os.sep in path:
        try:
            with open(path, "a") as file:
                file.write(said)
            return
        except OSError:  # no descriptor is free, perhaps
            pass
    print(said, end="", file=sys.stderr)
