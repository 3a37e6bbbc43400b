"""Asks descriptors whether they are ready, or waits for that: by poll(2), which has no limit as select(2) has.

Code that waits again and again for the same descriptors keeps a ``poll`` object: see
:class:`~torchwq.transport.waiting.Waiter`. A closed one (below 0) counts as ready: its next use says that it is closed.
"""

from __future__ import annotations

import select


def readable(seconds: float | None, *fds: int) -> list[int]:
    """Those of ``fds`` that are readable or at their end; waits at most ``seconds`` for one, for ever if None."""
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
