"""``torchwq.select``: wait for several queues and channels at once."""

from __future__ import annotations

import select as _select
import time
from collections.abc import Sequence
from typing import Any, Final

#: The sources are asked again this often, in seconds: a handle may have a failure to report that made no event.
_POLL_INTERVAL: Final = 0.25


def select(sources: Sequence[Any], timeout: float | None = None) -> list[Any]:
    """Wait until at least one of several queues and channels can be read without waiting.

    A source is ready if an item is there, if it is closed, or if reading it would raise. Another reader may be faster
    than you: read with ``timeout=0``, which raises ``queue.Empty`` then.

    Args:
        sources: handles on :class:`WorkQueue` and :class:`Channel`, and anything else that has a ``fileno()``, such as
            a socket.
        timeout: how long to wait at most, in seconds; None waits for ever, 0 does not wait.

    Returns:
        Those of ``sources`` that are ready, in their order; an empty list after ``timeout``.

    Raises:
        ValueError: ``sources`` is empty, and there is no ``timeout``.
        TypeError: one of the sources has no ``fileno()``, or ``sources`` is no list of them.

    Source: ``multiprocessing.connection.wait``; torch-ipc's channels were promised a select and did not get it.
    """
    if hasattr(sources, "fileno"):
        raise TypeError(f"select takes a list: select([{type(sources).__name__.lower()}, ...])")
    if not sources and timeout is None:
        raise ValueError("there is nothing to wait for: pass at least one queue or channel, or a timeout")
    for source in sources:
        if not hasattr(source, "fileno"):
            raise TypeError(f"a queue, a channel or something with fileno() is needed, not {type(source).__name__}")
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        ready = [source for source in sources if hasattr(source, "_is_ready") and source._is_ready()]
        poll = _select.poll()
        for source in sources:
            if source not in ready:
                poll.register(source.fileno(), _select.POLLIN)
        left = (
            0.0 if ready else _POLL_INTERVAL if deadline is None else min(_POLL_INTERVAL, deadline - time.monotonic())
        )
        readable = {fd for fd, _ in poll.poll(max(0.0, left) * 1000)}
        ready = [
            source
            for source in sources
            if source in ready or (source._is_ready() if hasattr(source, "_is_ready") else source.fileno() in readable)
        ]
        if ready or (deadline is not None and time.monotonic() >= deadline):
            return ready
