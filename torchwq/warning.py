"""Warnings that point at the user's line of code, however deep in this library they arise."""

from __future__ import annotations

import sys
import warnings
from typing import Final

#: Modules that may stand between the user's line and the warning: this library's, and those that call it.
_INTERNAL: Final = ("torchwq", "torch.utils.data", "contextlib", "threading", "concurrent.futures", "weakref")


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Call ``warnings.warn`` with the first line outside of this library as its place, else with the caller's line."""
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
