"""Writing by a task on asyncio's event loop.

Polls while a bounded queue or channel has no room: among threads of one process, nothing that an event loop can watch
tells of room. The loop goes on meanwhile, and a task that is cancelled has not written.
"""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

from ..futures import TimedOut

R = TypeVar("R")

#: Seconds between two attempts, at first and at most.
_FIRST_PAUSE: Final = 0.0005
_MAX_PAUSE: Final = 0.01


async def send_async(send: Callable[[Any, float], R], payloads: Sequence[Any], timeout: float | None) -> R | None:
    """Send payloads, each as soon as there is room. Returns what the last ``send`` returned.

    Args:
        send: sends a payload; raises queue.Full if there is no room at the given time (time.monotonic).
        timeout: seconds for all of them together; None waits for ever.

    Raises TimedOut, and what ``send`` raises.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    found = None
    for payload in payloads:
        pause = _FIRST_PAUSE
        while True:
            try:
                found = send(payload, time.monotonic())
                break
            except queue.Full:
                if deadline is not None and time.monotonic() >= deadline:
                    raise TimedOut(f"there was no room within {timeout} s") from None
            await asyncio.sleep(pause)
            pause = min(2 * pause, _MAX_PAUSE)
    return found
