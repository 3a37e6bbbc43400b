"""Waiting for a descriptor on asyncio's event loop: no thread, one registration however many tasks wait.

Invariants:

* A descriptor is registered with a loop exactly while tasks of that loop wait for it.
* Each time it is readable, the task that has waited longest is woken. If it takes no message, the descriptor stays
  readable, and the next task is woken.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import deque

_Waiting = dict[int, "deque[asyncio.Future[None]]"]
_loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Waiting] = weakref.WeakKeyDictionary()


async def readable(fd: int, seconds: float) -> None:
    """Wait until ``fd`` may be readable, at most ``seconds``. May be cancelled."""
    loop = asyncio.get_running_loop()
    waiting = _loops.setdefault(loop, {})
    future: asyncio.Future[None] = loop.create_future()
    queue = waiting.get(fd)
    if queue is None:
        queue = waiting[fd] = deque()
        loop.add_reader(fd, _wake, queue)
    queue.append(future)
    timer = loop.call_later(seconds, _finish, future)
    try:
        await future
    finally:
        timer.cancel()
        if future in queue:
            queue.remove(future)
        if not queue and waiting.get(fd) is queue:
            del waiting[fd]
            loop.remove_reader(fd)


def _wake(queue: deque[asyncio.Future[None]]) -> None:
    for future in queue:
        if not future.done():
            future.set_result(None)
            return


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
