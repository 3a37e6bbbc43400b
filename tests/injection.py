"""Does something in the middle of something else, as a signal handler or a finalizer does: at every place, one by one.

CPython runs signal handlers and finalizers where a function begins or has returned. ``sys.setprofile`` tells of each
such place, so no luck is needed to meet one. (It also tells when a function of C is about to be called: there nothing
comes.)
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


class _Injector:
    def __init__(self, at: int, action: Callable[[], object]) -> None:
        self._left = at
        self._action = action
        self.has_acted = False

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        if "torchwq" not in frame.f_code.co_filename or event == "c_call":
            return
        self._left -= 1
        if self._left < 0 and not self.has_acted:
            self.has_acted = True
            sys.setprofile(None)
            self._action()


def in_the_middle(operation: Callable[[], object], action: Callable[[], object], at: int) -> bool:
    """Run ``operation``, and ``action`` at the place number ``at`` in it; False if it has fewer."""
    injector = _Injector(at, action)
    sys.setprofile(injector)
    try:
        operation()
    finally:
        sys.setprofile(None)
    return injector.has_acted
