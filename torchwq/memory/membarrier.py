"""A memory barrier in all threads of all processes, so that those who are in a hurry need none of their own.

Two parties that each write a word and then read the other's must not both read an old one. That takes a fence between
write and read on both sides, which for one who does it with every message costs more than the message's book-keeping.
``membarrier`` lets the other one, who does it once, pay for both: when it returns, every thread that runs has passed a
fence, so what it had written is to be seen, and what it reads from now on is new.
"""

from __future__ import annotations

import ctypes
import platform
import sys
import time
from typing import Any, Final

#: Number of the system call, and its command for a barrier in all threads of the system.
_NUMBERS: Final = {"x86_64": 324, "aarch64": 283, "riscv64": 283, "ppc64le": 365, "s390x": 356}
_GLOBAL: Final = 1
#: Where there is no such call: many times what a processor keeps a write for itself, and longer than a timer's tick.
_LONG_ENOUGH: Final = 0.02


def global_barrier() -> None:
    """Return when every running thread, of whatever process, has passed a memory barrier. Takes some milliseconds."""
    number = _NUMBERS.get(platform.machine()) if sys.platform == "linux" else None
    if number is not None:
        libc: Any = ctypes.CDLL(None)
        if libc.syscall(ctypes.c_long(number), ctypes.c_int(_GLOBAL), ctypes.c_uint(0), ctypes.c_int(0)) == 0:
            return
    time.sleep(_LONG_ENOUGH)
