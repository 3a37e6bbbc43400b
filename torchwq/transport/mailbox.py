"""Messages between the threads of one process: a deque, and those who sleep until there is something in it.

``queue.SimpleQueue`` does as much, but cannot wake its sleepers for another reason than a message, and cannot be
watched together with sockets. Neither putting nor taking holds a lock: a finalizer that runs in the middle of either,
and puts or takes itself, waits for nobody.

Invariants:

* A sleeper is in ``_asleep`` before it looks for the last time, at the messages and at its reasons not to wait; whoever
  puts a message, or makes such a reason, looks there afterwards. So one of them sees the other.
* Whoever takes a sleeper out of ``_asleep`` wakes it. One that was woken and does not take the message that is there
  wakes the next one.
* The bell, once there is one, is rung while there are messages: after each change, whoever made it looks again.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from .alarm import Alarm
from .waiting import never

T = TypeVar("T")
R = TypeVar("R")


#: Nobody sleeps longer without looking, in seconds.
_LONGEST: Final = 1.0


class Mailbox(Generic[T]):
    """A first-in-first-out queue for any number of threads. Its messages must not be None."""

    def __init__(self) -> None:
        self._messages: deque[T] = deque()
        self._asleep: deque[threading.Lock] = deque()
        self._bell: Alarm | None = None
        self._ended = False
        #: Gives the next message. Raises IndexError if there is none.
        self.pop: Callable[[], T] = self._messages.popleft

    def __len__(self) -> int:
        return len(self._messages)

    def put(self, message: T) -> None:
        self._messages.append(message)
        if self._asleep:
            self._wake_one()
        bell = self._bell
        if bell is not None:
            self._ring_or_hush(bell)

    def take(self) -> T | None:
        """The next message; None if there is none."""
        try:
            return self.pop()
        except IndexError:
            return None

    def has_message(self) -> bool:
        """Whether there is one. Whoever asks because the bell rings makes good what a taker has left, who came before
        there was a bell."""
        bell = self._bell
        if bell is not None:
            self._ring_or_hush(bell)
        return bool(self._messages)

    def _pop_with_bell(self) -> T:
        try:
            return self._messages.popleft()
        finally:
            bell = self._bell
            if bell is not None:
                self._ring_or_hush(bell)

    def wait(
        self, attempt: Callable[[], R | None], deadline: float | None, stop: Callable[[], object] = never
    ) -> R | None:
        """What ``attempt`` gives as soon as it gives something; None after ``deadline`` (time.monotonic), or if there
        is a reason to ``stop``, or for no reason: the caller looks at the state of things and waits again. Who makes
        a reason calls ``wake_all`` then.

        A KeyboardInterrupt that ends the wait takes nothing.
        """
        latch = threading.Lock()
        latch.acquire()
        self._asleep.append(latch)
        try:
            found = attempt()
            if found is None and not stop():
                left = _LONGEST if deadline is None else deadline - time.monotonic()
                latch.acquire(timeout=max(0.0, min(left, _LONGEST)))
        finally:
            try:
                self._asleep.remove(latch)
                chosen = False
            except ValueError:
                chosen = True
            if chosen and found is not None and self._messages:
                self._wake_one()
        if found is None:
            try:
                found = attempt()
            finally:
                if chosen and self._messages:
                    self._wake_one()
        return found

    def wake_all(self) -> None:
        """Let everyone who waits look at the state of things."""
        for _ in range(len(self._asleep)):
            self._wake_one()

    def end(self) -> None:
        """No more will come: wake everyone, and let the bell ring for ever."""
        self._ended = True
        if self._bell is not None:
            self._ring_or_hush(self._bell)
        self.wake_all()

    def _wake_one(self) -> None:
        try:
            latch = self._asleep.popleft()
        except IndexError:
            return
        latch.release()

    def bell(self) -> Alarm:
        """An alarm that is set while there are messages."""
        if self._bell is None:
            self._bell = Alarm()
            self.pop = self._pop_with_bell
            self._ring_or_hush(self._bell)
        return self._bell

    def _ring_or_hush(self, bell: Alarm) -> None:
        while bool(self._messages or self._ended) != bell.is_set():
            if self._messages or self._ended:
                bell.set()
            else:
                bell.clear()
            if bell.fileno() < 0:
                return

    def close(self) -> None:
        """Give up the bell's descriptor."""
        bell, self._bell = self._bell, None
        self.pop = self._messages.popleft  # refers to this object no more: what is in it goes with it
        if bell is not None:
            bell.close()
