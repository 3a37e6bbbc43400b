"""Tells that a thread has ended, to whom its being busy matters."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Protocol


class _Side(Protocol):
    def on_thread_exit(self, ident: int) -> None: ...


class ThreadExitHook:
    """Lives in its thread's locals, and so as long as its thread: a thread that ends is not busy any more."""

    def __init__(self, side: _Side, ident: int) -> None:
        weakref.finalize(self, _tell_end, weakref.ref(side), ident).atexit = False


def _tell_end(find: Callable[[], _Side | None], ident: int) -> None:
    side = find()
    if side is not None:
        side.on_thread_exit(ident)
