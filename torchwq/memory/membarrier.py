"""A memory barrier in all threads of all processes, so that frequent operations need none of their own.

Two threads that each write a word and then read the other's must not both read an old one. That takes a fence between
write and read on both sides, which would cost a sender more than the rest of a message's book-keeping. With
membarrier(2) the rare side pays for both: when the call returns, every running thread has passed a fence, so its
earlier writes are visible, and its later reads see current values.
"""

from __future__ import annotations

import ctypes
import platform
import sys
import time
from typing import Any, Final

#: Numbers of the system call, and MEMBARRIER_CMD_GLOBAL.
_NUMBERS: Final = {"x86_64": 324, "aarch64": 283, "riscv64": 283, "ppc64le": 365, "s390x": 356}
_GLOBAL: Final = 1
#: Seconds, where there is no such call: longer than a write stays in a store buffer, or a thread in its time slice.
_FALLBACK_WAIT: Final = 0.02


def global_barrier() -> None:
    """Return when every running thread of every process has passed a memory barrier. Takes some milliseconds."""
    number = _NUMBERS.get(platform.machine()) if sys.platform == "linux" else None
    if number is not None:
        libc: Any = ctypes.CDLL(None)
        if libc.syscall(ctypes.c_long(number), ctypes.c_int(_GLOBAL), ctypes.c_uint(0), ctypes.c_int(0)) == 0:
            return
    time.sleep(_FALLBACK_WAIT)
