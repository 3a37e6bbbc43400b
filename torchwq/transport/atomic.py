"""Note [Statements that nothing interrupts].

A signal handler, and a finalizer that the garbage collector runs, may execute any code in the middle of ours, in the
same thread: it may write to the very queue that this thread is just writing to. Whoever takes a lock there that the
thread holds already waits for itself; a reentrant lock lets it in while things are half done. So what such code may
call waits for no lock that is held while other code could run. It claims what it needs by statements in which nothing
can come:

* CPython runs signal handlers, and lets other threads go on, at calls and at backward jumps only; and it collects
  garbage there too, or, before 3.12, where a container is allocated. A test of plain attributes and the assignment that
  follows it, or ``x.n += 1`` on integers, have none of these.
* Appending to a deque, and taking from it, are one call each of C code that runs no other.

A build without the GIL promises neither across threads. There such a section is also ``serialized``, by a reentrant
lock.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from typing import Any, Final, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

#: Whether statements are atomic among threads, too.
HAS_GIL: Final[bool] = getattr(sys, "_is_gil_enabled", lambda: True)()


def serialized(guard: threading.RLock, function: F) -> F:
    """``function``, with ``guard`` held where there is no GIL; else ``function`` itself."""
    if HAS_GIL:
        return function

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with guard:
            return function(*args, **kwargs)

    return call  # type: ignore[return-value]
