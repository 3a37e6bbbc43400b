"""``drain``: the owner waits until every question that it has written has its answer waiting.

It returns when all questions have left the outbox, the counters say that all of them were taken, or are lost, no worker
is at one of them, and there is nothing to tell of a worker, now or soon. An answer wakes it. It also looks at the
counters every ``_POLL_INTERVAL`` seconds: no event tells that a worker is done without an answer.

Invariant: a worker that fails, or dies, is at a question, then its handle is in doubt or its end is awaited, then there
is something to tell. Each begins before the one before it ends. ``drain`` looks in this order, so that it misses none.
Only a worker that takes more than ``_LONGEST_DOUBT`` to end after its error is not waited for.
"""

from __future__ import annotations

import time
from typing import Final

from ..errors import QueueClosed
from .owner import Owner

_POLL_INTERVAL: Final = 0.02
#: A question that nobody seems to have taken although the socket is empty is given up as lost after this, in seconds.
_LOST_AFTER: Final = 0.2


def drain(owner: Owner, timeout: float | None) -> None:
    """See ``WorkQueue.drain``."""
    with owner.absorbing():
        _Draining(owner).wait(timeout)


class _Draining:
    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        #: Number of the last question that this waits for.
        self._mark = owner.questions.count
        self._quiet_since = time.monotonic()

    def wait(self, timeout: float | None) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        owner = self._owner
        while True:
            if owner.closed:
                raise QueueClosed(owner.closed)
            self._absorb()
            is_done = self._is_done()
            if owner.troubles.any_to_tell:
                owner.raise_failure()
            if is_done:
                return
            if owner.alarm.is_set():
                owner.raise_failure()
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                raise TimeoutError(f"the queue was not drained within {timeout} s")
            until = now + _POLL_INTERVAL if deadline is None else min(now + _POLL_INTERVAL, deadline)
            if owner.answers.carrier is None:
                owner.answers.wait(lambda: self._is_done() or None, until, owner.may_not_wait)
            else:
                owner.connection.wait(self._absorb, until)

    def _absorb(self) -> bool | None:
        """Move answers of other processes out of the socket; True if there were any."""
        socket = self._owner.answers.carrier
        if socket is None or not socket.absorb():
            return None
        self._quiet_since = time.monotonic()
        self._owner.connection.wake_all()  # other threads that wait for answers: no descriptor tells of these any more
        return True

    def _is_done(self) -> bool:
        owner, mark = self._owner, self._mark
        questions, troubles = owner.questions, owner.troubles
        if questions.sent < mark:
            return False
        unread = questions.unread()
        missing = mark - owner.members.count_taken()
        if missing > 0:
            is_quiet = time.monotonic() - self._quiet_since >= _LOST_AFTER
            if unread or missing > troubles.possibly_lost or not is_quiet:
                return False
        return not owner.members.any_busy(mark) and not troubles.may_have_failed(mark)
