"""Whether a library has put green threads in the place of the operating system's.

gevent's and eventlet's monkey patching let ``threading`` start green threads, which share one thread of the system. The
threads of this library, which watch connections and wait for workers' answers, then run only when the rest of the
program waits by that library's means, and a wait for an answer keeps the answer from coming.
"""

from __future__ import annotations

import threading
import types
from typing import Any


def check(what: str) -> None:
    """Raise RuntimeError, which says what to do, if ``what`` would wait for ever."""
    start: Any = getattr(threading, "_start_joinable_thread", None) or getattr(threading, "_start_new_thread", None)
    if start is None or isinstance(start, types.BuiltinFunctionType):
        return
    library = str(getattr(start, "__module__", "another library")).partition(".")[0]
    raise RuntimeError(
        f"{what} cannot run where threads are green ones: {library} has patched the module threading in this process. "
        f"Use num_workers=0, or load batches in a process of their own that is not patched"
    )
