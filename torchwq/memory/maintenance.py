"""The periodic maintenance of this process's shared memory, for as long as there is any.

Why a timer: no event tells that the last tensor on a block is gone (``use_poller``), nor that other processes have
dropped theirs (``ref_table``). Most blocks are found free when the next message comes. The timer finds the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from ..transport import reactor
from ..transport.fork import reset_in_child
from . import state_lock

#: Seconds.
PERIOD: Final = 2.0

_is_scheduled = _is_ended = False
_on_period: list[Callable[[float], None]] = []
_after_period: list[Callable[[], bool]] = []


@reset_in_child
def _reset() -> None:
    global _is_scheduled, _is_ended
    _is_scheduled = _is_ended = False


def on_period(callback: Callable[[float], None]) -> Callable[[float], None]:
    """Call ``callback(time)`` in each period, under the lock."""
    _on_period.append(callback)
    return callback


def after_period(callback: Callable[[], bool]) -> Callable[[], bool]:
    """Call ``callback()`` behind these, without the lock: it may send. It returns whether there is still work."""
    _after_period.append(callback)
    return callback


def schedule() -> None:
    """Let the reactor run the maintenance after a period, unless it will already."""
    global _is_scheduled
    if not _is_scheduled:
        _is_scheduled = True
        try:
            reactor.get().call_later(PERIOD, _run_scheduled)
        except BaseException:
            _is_scheduled = False  # no descriptor or thread is free now: the next call tries again
            raise


def _run_scheduled() -> None:
    global _is_scheduled
    _is_scheduled = False
    run()


def run() -> None:
    """Run the maintenance now. If it fails, it will be tried again."""
    has_work = True
    try:
        with state_lock.lock:
            if _is_ended:
                has_work = False
                return
            now = time.monotonic()
            for callback in _on_period:
                callback(now)
        answers = [callback() for callback in _after_period]
        has_work = any(answers)
    finally:
        if has_work:
            schedule()


def end() -> None:
    """Run no more maintenance: the interpreter is about to end.

    A thread that wants the GIL back from torch's C++ when the interpreter ends would end the process by
    ``std::terminate``. When this returns, the reactor's thread is not in ``run``, and will not be.
    """
    global _is_ended
    with state_lock.lock:
        _is_ended = True
