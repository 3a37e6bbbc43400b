"""Note [Statements that nothing interrupts].

A signal handler, or a finalizer that the garbage collector runs, may execute any code in the middle of ours, in the
same thread: it may write to the very queue to which this thread is writing. A lock does not help: code that waits for a
lock which its own thread holds waits for ever, and a reentrant lock lets it in while things are half done. So code that
a finalizer or a signal handler may call waits for no lock that is held while other code could run. It claims what it
needs by statements in which nothing can come between:

* CPython runs signal handlers, and switches threads, at calls and at backward jumps only. It collects garbage there
  too, or, before 3.12, where a container is allocated. A test of plain attributes and the assignment that follows it
  have none of these, nor has ``x.n += 1`` on integers.
* Appending to a deque, and taking from it, are one call each of C code that runs no other.

A build without the GIL promises neither across threads. There such methods are serialized by a reentrant lock.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any, Final

#: Whether statements are atomic among threads, too.
HAS_GIL: Final[bool] = getattr(sys, "_is_gil_enabled", lambda: True)()


def serialize(owner: object, *methods: str) -> None:
    """Without a GIL: let at most one thread at a time be in any of these methods of ``owner``."""
    if HAS_GIL:
        return
    guard = threading.RLock()
    for name in methods:
        setattr(owner, name, _guarded(guard, getattr(owner, name)))


def _guarded(guard: threading.RLock, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with guard:
            return method(*args, **kwargs)

    return call
