"""Detects green threads in the place of the operating system's.

The monkey patches of gevent and eventlet make ``threading`` start green threads, which share one thread of the system.
The threads of torchwq, which watch connections and receive answers, then run only while the program waits through
gevent or eventlet. A plain wait for an answer blocks the thread that would receive it.
"""

from __future__ import annotations

import threading
import types
from typing import Any


def check(what: str) -> None:
    """Raise RuntimeError with the remedy if threads are green: ``what`` would wait for ever."""
    start: Any = getattr(threading, "_start_joinable_thread", None) or getattr(threading, "_start_new_thread", None)
    if start is None or isinstance(start, types.BuiltinFunctionType):
        return
    library = str(getattr(start, "__module__", "another library")).partition(".")[0]
    raise RuntimeError(
        f"{what} cannot run where threads are green ones: {library} has patched the module threading in this process. "
        f"Use num_workers=0, or load batches in a process of their own that is not patched"
    )
