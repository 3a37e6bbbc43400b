"""Messages between the threads of one process: a deque, and those who sleep until there is something in it.

``queue.SimpleQueue`` does as much, but cannot wake its sleepers for another reason than a message, and cannot be
watched together with sockets. Neither putting nor taking holds a lock: a finalizer that runs in the middle of either,
and puts or takes itself, waits for nobody.

Invariants:

* Who waits sleeps in a :class:`~torchwq.transport.parking.ParkingLot`, whose invariants hold.
* The bell, once there is one, is rung while there are messages: after each change, whoever made it looks again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from .alarm import Alarm
from .parking import ParkingLot
from .waiting import never

T = TypeVar("T")
R = TypeVar("R")


class Mailbox(Generic[T]):
    """A first-in-first-out queue for any number of threads. Its messages must not be None."""

    def __init__(self) -> None:
        #: What waits here. Whoever is in a hurry looks here whether there is something.
        self.messages: deque[T] = deque()
        self._lot = ParkingLot(self.messages.__len__)
        self._bell: Alarm | None = None
        self._ended = False
        #: Gives the next message. Raises IndexError if there is none.
        self.pop: Callable[[], T] = self.messages.popleft

    def __len__(self) -> int:
        return len(self.messages)

    def put(self, message: T) -> None:
        self.messages.append(message)
        if self._lot.asleep:
            self._lot.wake_one()
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
        return bool(self.messages)

    def _pop_with_bell(self) -> T:
        try:
            return self.messages.popleft()
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
        return self._lot.wait(attempt, deadline, stop)

    def wake_all(self) -> None:
        """Let everyone who waits look at the state of things."""
        self._lot.wake_all()

    def end(self) -> None:
        """No more will come: wake everyone, and let the bell ring for ever."""
        self._ended = True
        if self._bell is not None:
            self._ring_or_hush(self._bell)
        self.wake_all()

    def bell(self) -> Alarm:
        """An alarm that is set while there are messages."""
        if self._bell is None:
            self._bell = Alarm()
            self.pop = self._pop_with_bell
            self._ring_or_hush(self._bell)
        return self._bell

    def _ring_or_hush(self, bell: Alarm) -> None:
        while bool(self.messages or self._ended) != bell.is_set():
            if self.messages or self._ended:
                bell.set()
            else:
                bell.clear()
            if bell.fileno() < 0:
                return

    def close(self) -> None:
        """Give up the bell's descriptor."""
        bell, self._bell = self._bell, None
        self.pop = self.messages.popleft  # refers to this object no more: what is in it goes with it
        if bell is not None:
            bell.close()
