"""The debug mode: reports callbacks that hold the reactor up.

A callback of the reactor must not take long, wait, or run users' code. One that does breaks nothing at once: some other
queue is late, now and then. With the environment variable ``TORCHWQ_DEBUG`` set, each such callback is reported: on
stderr, or at the end of a file if the variable is a path. The tests set it, and fail with what is reported.

Invariants:

* Off, it costs nothing: a decorated function is the function itself.
* A machine that is busy, or that stops, causes no report. The reactor thread's own processor time counts; and a
  callback waits if its thread has used none at many looks of the watching thread. A thread that waits for the GIL uses
  some: it wakes every 5 ms.
* Collecting garbage in the reactor's thread, and the users' finalizers that it runs, do not count.

Source: the debug mode of asyncio, https://docs.python.org/3/library/asyncio-dev.html#debug-mode
"""

from __future__ import annotations

import atexit
import contextlib
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
#: By how much the limits are multiplied on a machine that does other things, too.
SLOWDOWN_VARIABLE: Final = "TORCHWQ_DEBUG_PATIENCE"
_SLOWDOWN: Final = max(1.0, float(os.environ.get(SLOWDOWN_VARIABLE, "1")))
#: How much of its thread's processor time, in seconds, a callback may take.
MAX_CALLBACK_TIME: Final = 0.05 * _SLOWDOWN
#: How often, in seconds, the watching thread looks, and how often it must find a thread idle to report it.
_POLL_INTERVAL: Final = 0.01
_MAX_IDLE_POLLS: Final = int(20 * _SLOWDOWN)
#: How long, in seconds, the end of the process waits for the watching thread.
_STOP_TIMEOUT: Final = 1.0

F = TypeVar("F", bound=Callable[..., Any])

_numbers = itertools.count()


class _Running:
    """The callback that runs."""

    __slots__ = ("callback", "collecting", "collecting_since", "ident", "number")

    def __init__(self, callback: object) -> None:
        self.callback = callback
        self.number = next(_numbers)
        self.ident = threading.get_ident()
        #: Processor time, in seconds, that collecting garbage has taken.
        self.collecting = 0.0
        self.collecting_since: float | None = None


_running: _Running | None = None
#: The watching thread, also one that could not start, and what ends it.
_thread: threading.Thread | None = None
_ended = threading.Event()


@reset_in_child
def _forget() -> None:
    global _running, _thread, _ended
    _running, _thread, _ended = None, None, threading.Event()


def timed(call: F) -> F:
    """Decorates ``call``, which calls a callback in the reactor's thread: one that takes long is reported."""
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
        taken = time.thread_time() - begun - running.collecting
        if taken > MAX_CALLBACK_TIME:
            _report(f"{callback} took {taken * 1000:.0f} ms of processor time")

    return watched  # type: ignore[return-value]


def runs_user_code(function: F) -> F:
    """Decorates a function that may run users' code: a callback of the reactor that calls it is reported."""
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
        running.collecting += time.thread_time() - running.collecting_since
        running.collecting_since = None


if ON:
    gc.callbacks.append(_note_collection)


def _start_watching() -> None:
    global _thread
    if _thread is None:
        _thread = threading.Thread(target=_watch, name="torchwq-debug", daemon=True)
        # There may be too many threads, or the interpreter ends.
        with contextlib.suppress(RuntimeError):
            _thread.start()


def _stop_watching() -> None:
    """End the thread before the interpreter ends: one that wakes meanwhile, as this one does all the time, may use its
    thread state when that is freed (CPython 3.11, ``take_gil``)."""
    _ended.set()
    if _thread is not None and _thread.is_alive():
        _thread.join(_STOP_TIMEOUT)


if ON:
    atexit.register(_stop_watching)


def _watch() -> None:
    """Report a callback that waits."""
    seen: tuple[int, float] | None = None
    idle_polls = 0
    while not _ended.wait(_POLL_INTERVAL):
        before, seen = seen, _state()
        idle_polls = idle_polls + 1 if seen is not None and seen == before else 0
        if seen is not None and idle_polls == _MAX_IDLE_POLLS:
            running = _running
            if running is not None and running.number == seen[0]:
                _report(f"{running.callback} waits", sys._current_frames().get(running.ident))
            del running  # this thread keeps no callback, and no object to which it belongs


def _state() -> tuple[int, float] | None:
    """The number of the callback that runs, and the processor time of its thread by now."""
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
