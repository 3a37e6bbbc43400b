"""Whether descriptors 1 and 2 are the program's stdout and stderr, to which its workers may print.

A program may run with stdout or stderr closed. The next file that it opens gets that descriptor, and workers must not
print into that file. Python knows the streams that it started with, and those that the program uses instead.
"""

from __future__ import annotations

import os
import sys


def is_stream(name: str, fd: int) -> bool:
    """Whether ``fd`` is open and belongs to ``sys.<name>`` or to the stream that Python started with."""
    for stream in (getattr(sys, name, None), getattr(sys, f"__{name}__", None)):
        try:
            if stream is not None and not stream.closed and stream.fileno() == fd:
                os.fstat(fd)
                return True
        except (AttributeError, OSError, ValueError):  # no file, or closed
            continue
    return False
