"""Warnings that point at the line of the user's by which they came about, however deep below it they are found."""

from __future__ import annotations

import sys
import warnings
from typing import Final

#: Modules between the user's line and the warning: this library's, and those through which it is called.
_INTERNAL: Final = ("torchwq", "torch.utils.data", "contextlib", "threading", "concurrent.futures", "weakref")


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """``warnings.warn`` with the first line outside of this library as its place; without one, that of the caller."""
    level, frame = 2, sys._getframe(1)
    found = 2
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if not any(name == each or name.startswith(f"{each}.") for each in _INTERNAL):
            found = level
            break
        if frame.f_back is None:
            break
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=found)
