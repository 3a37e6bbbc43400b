"""Asks descriptors whether they are ready, or waits for that: by poll(2), for which no descriptor is too high.

Who waits again and again for the same ones keeps the ``poll`` object, as :class:`~torchwq.transport.waiting.Waiter`
does. A closed one (below 0) counts as ready: what is done with it next tells that it is closed.
"""

from __future__ import annotations

import select


def readable(seconds: float | None, *fds: int) -> list[int]:
    """Those of ``fds`` that can be read from, be it the end; waits at most ``seconds`` for one, for ever if None."""
    return _ready(seconds, select.POLLIN, fds)


def writable(seconds: float | None, fd: int) -> bool:
    """Whether there is room to write to ``fd``; waits at most ``seconds`` for it, for ever if None."""
    return bool(_ready(seconds, select.POLLOUT, (fd,)))


def _ready(seconds: float | None, event: int, fds: tuple[int, ...]) -> list[int]:
    closed = [fd for fd in fds if fd < 0]
    if closed:
        return closed
    poll = select.poll()
    for fd in fds:
        poll.register(fd, event)
    return [fd for fd, _ in poll.poll(None if seconds is None else seconds * 1000)]
