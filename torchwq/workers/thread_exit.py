"""A hook that runs when a thread ends."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Protocol


class _Listener(Protocol):
    def on_thread_exit(self, ident: int) -> None: ...


class ThreadExitHook:
    """Calls ``listener.on_thread_exit(ident)`` when its thread ends. Put it into the thread's ``threading.local``."""

    def __init__(self, listener: _Listener, ident: int) -> None:
        weakref.finalize(self, _on_thread_exit, weakref.ref(listener), ident).atexit = False


def _on_thread_exit(reference: Callable[[], _Listener | None], ident: int) -> None:
    listener = reference()
    if listener is not None:
        listener.on_thread_exit(ident)
