"""Tells that a thread has ended, to whom its being busy matters."""

from __future__ import annotations

import weakref
from typing import Protocol


class _Side(Protocol):
    def thread_ended(self, ident: int) -> None: ...


class Presence:
    """Lives in its thread's locals, and so as long as its thread: a thread that ends is not busy any more."""

    def __init__(self, side: _Side, ident: int) -> None:
        self._side = weakref.ref(side)
        self._ident = ident

    def __del__(self) -> None:
        side = self._side()
        if side is not None:
            side.thread_ended(self._ident)
