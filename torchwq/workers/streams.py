"""Whether descriptors 1 and 2 are the program's streams, which its workers write to as it does.

A program may run with its stdout or stderr closed. What it opens next gets the descriptor, and is no place for what
workers print. Python knows which streams there were when it started, and which the program has put in their place.
"""

from __future__ import annotations

import os
import sys


def is_stream(name: str, fd: int) -> bool:
    """Whether ``fd`` is open, and is what ``sys.<name>``, or the stream that Python started with, writes to."""
    for stream in (getattr(sys, name, None), getattr(sys, f"__{name}__", None)):
        try:
            if stream is not None and not stream.closed and stream.fileno() == fd:
                os.fstat(fd)
                return True
        except (AttributeError, OSError, ValueError):  # it is no file, or is closed
            continue
    return False
