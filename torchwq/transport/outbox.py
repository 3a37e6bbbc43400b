"""Keeps, in order, the messages that a full socket does not take, so that a write never blocks.

Invariants:

* Messages leave in the order of ``send``, whichever threads call it: one lock covers "is anything waiting?" and
  the send itself.
* While something waits, the reactor watches the socket and sends on; nobody has to call anything for that.
* A waiting message keeps alive whatever its descriptors belong to, and no longer than until it is sent.
* ``sent(tag)`` is called exactly once per message that the socket took, under the lock, in order.
* When the other side is gone, all that waits is dropped, and every later ``send`` raises BrokenPipeError.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from . import reactor
from .endpoint import Endpoint
from .process import closed_in_child

Sent = Callable[[int, bytes], None]


class Outbox:
    """Sends over one endpoint without ever blocking. Safe to use from several threads."""

    def __init__(self, endpoint: Endpoint, sent: Sent | None = None) -> None:
        self._endpoint = endpoint
        self._sent = sent
        self._changed = threading.Condition(threading.Lock())
        self._pending: deque[tuple[bytes, Sequence[int], Any, int]] = deque()
        self._broken = False
        self._closing = False
        self._then: Callable[[], None]
        closed_in_child(self)

    def __len__(self) -> int:
        return len(self._pending)

    def send(self, data: bytes, fds: Sequence[int] = (), keep: Any = None, tag: int = 0) -> None:
        """Send, or keep for later, one message. ``keep`` stays alive until the message is sent.

        Raises BrokenPipeError if nobody can receive it any more.
        """
        with self._changed:
            if self._broken or self._closing:
                raise BrokenPipeError("the queue is closed")
            if not self._pending and self._try(data, fds, tag):
                return
            self._pending.append((data, fds, keep, tag))
            if len(self._pending) == 1:
                reactor.get().set_writer(self._endpoint.fileno(), self.flush)

    def _try(self, data: bytes, fds: Sequence[int], tag: int) -> bool:
        try:
            if not self._endpoint.try_send(data, fds):
                return False
        except BrokenPipeError:
            self._drop()
            raise
        if self._sent is not None:
            self._sent(tag, data)
        return True

    def _drop(self) -> None:
        self._broken = True
        self._pending.clear()
        self._stop_watching()

    def _stop_watching(self) -> None:
        if self._endpoint.fileno() >= 0:
            reactor.get().set_writer(self._endpoint.fileno(), None)
        self._changed.notify_all()
        if self._closing:
            self._then()

    def flush(self) -> None:
        """Send what the socket takes of what waits. Never blocks, never raises for a closed queue."""
        with self._changed:
            if not self._pending:
                return
            try:
                while self._pending:
                    data, fds, _, tag = self._pending[0]
                    if not self._try(data, fds, tag):
                        return
                    self._pending.popleft()
            except BrokenPipeError:
                return
            self._stop_watching()

    def wait_empty(self, timeout: float | None = None) -> bool:
        """Wait until nothing waits here any more, because it was sent or because the other side is gone."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._pending, timeout)

    def close_when_sent(self, then: Callable[[], None]) -> None:
        """Take nothing more, and call ``then`` as soon as nothing waits. Returns at once."""
        with self._changed:
            if self._closing:
                return
            self._closing, self._then = True, then
            if not self._pending:
                then()

    def abandon(self) -> None:
        self._pending.clear()
        self._broken = True
