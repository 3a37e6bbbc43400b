"""The lock under which the state of this room changes, and what a fork does with it.

The state of every module of this room, and of every block, changes under ``lock`` only. No thread waits for anything
under it. No user's code is called under it; should a finalizer run nevertheless, it finds every block either in use or
not taken yet.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

from .. import _native
from ..transport.fork import reset_in_child
from ..transport.locks import new_lock

#: Reentrant: a user's finalizer may run at any allocation, and may write to a queue.
lock = new_lock()
_before_fork: list[Callable[[], None]] = []
_forking = threading.local()


def is_locked_by_this_thread() -> bool:
    """Whether this thread has the lock. If so, the caller has interrupted a holder, and must not wait for one."""
    owned: Any = getattr(lock, "_is_owned", lambda: False)
    return bool(owned())


def before_fork(callback: Callable[[], None]) -> Callable[[], None]:
    """Call ``callback()`` under the lock before every fork: the child will see the memory that tensors see now."""
    _before_fork.append(callback)
    return callback


@reset_in_child
def _reset() -> None:
    global lock
    lock = new_lock()
    if _native.core is not None:
        _native.core.set_lock(lock)


def _prepare_fork() -> None:
    # The wait ends: the thread that forks may be in a signal handler that has interrupted a holder of the lock.
    _forking.locked = lock.acquire(timeout=1.0)
    for callback in _before_fork:
        callback()


def _after_fork() -> None:
    if _forking.locked:
        _forking.locked = False
        lock.release()


os.register_at_fork(before=_prepare_fork, after_in_parent=_after_fork)
