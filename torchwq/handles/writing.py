"""Writing by a task on asyncio's event loop.

Polls while a bounded queue or channel has no room: among threads of one process, nothing that an event loop can watch
tells of room. The loop goes on meanwhile, and a task that is cancelled has not written.
"""

from __future__ import annotations

import asyncio
import queue
import time
from typing import Any, Final

from ..futures import TimedOut

#: Seconds between two attempts, at first and at most.
_FIRST_PAUSE: Final = 0.0005
_MAX_PAUSE: Final = 0.01


async def write_async(handle: Any, obj: Any, timeout: float | None) -> Any:
    """Call ``handle.write(obj)`` as soon as there is room, and return what it returns.

    Raises TimedOut after ``timeout`` seconds, and what ``write`` raises.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    pause = _FIRST_PAUSE
    while True:
        try:
            return handle.write(obj, timeout=0)
        except queue.Full:
            if deadline is not None and time.monotonic() >= deadline:
                raise TimedOut(f"there was no room within {timeout} s") from None
        await asyncio.sleep(pause)
        pause = min(2 * pause, _MAX_PAUSE)
