"""Messages between the threads of one process: a deque, and the threads that sleep until it holds something.

``queue.SimpleQueue`` cannot wake its sleepers for another reason than a message, and cannot be watched together with
sockets. Neither ``put`` nor ``take`` holds a lock, so a finalizer that runs in the middle of either may call both.

Invariants:

* A thread that waits sleeps in a :class:`~torchwq.transport.parking.ParkingLot`, whose invariants hold.
* The alarm, once there is one, is set while there are messages: whoever changes the deque compares both afterwards.
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
        #: For the hot path, which looks here whether there is a message.
        self.messages: deque[T] = deque()
        self._lot = ParkingLot(self.messages.__len__)
        self._not_empty: Alarm | None = None
        self._ended = False
        #: Gives the next message. Raises IndexError if there is none.
        self.pop: Callable[[], T] = self.messages.popleft

    def __len__(self) -> int:
        return len(self.messages)

    def put(self, message: T) -> None:
        self.messages.append(message)
        if self._lot.asleep:
            self._lot.wake_one()
        alarm = self._not_empty
        if alarm is not None:
            self._update_not_empty(alarm)

    def take(self) -> T | None:
        """The next message; None if there is none."""
        try:
            return self.pop()
        except IndexError:
            return None

    def has_message(self) -> bool:
        """Whether there is a message. Also clears an alarm that was made while a message was being taken."""
        alarm = self._not_empty
        if alarm is not None:
            self._update_not_empty(alarm)
        return bool(self.messages)

    def _pop_and_update(self) -> T:
        try:
            return self.messages.popleft()
        finally:
            alarm = self._not_empty
            if alarm is not None:
                self._update_not_empty(alarm)

    def wait(
        self, attempt: Callable[[], R | None], deadline: float | None, stop: Callable[[], object] = never
    ) -> R | None:
        """See ``ParkingLot.wait``. Whoever gives ``stop`` a reason calls ``wake_all`` afterwards."""
        return self._lot.wait(attempt, deadline, stop)

    def wake_all(self) -> None:
        """End every wait that has begun."""
        self._lot.wake_all()

    def end(self) -> None:
        """No more messages will come: end every wait, and set the alarm for ever."""
        self._ended = True
        if self._not_empty is not None:
            self._update_not_empty(self._not_empty)
        self.wake_all()

    def not_empty(self) -> Alarm:
        """An alarm that is set while there are messages."""
        if self._not_empty is None:
            self._not_empty = Alarm()
            self.pop = self._pop_and_update
            self._update_not_empty(self._not_empty)
        return self._not_empty

    def _update_not_empty(self, alarm: Alarm) -> None:
        while bool(self.messages or self._ended) != alarm.is_set():
            if self.messages or self._ended:
                alarm.set()
            else:
                alarm.clear()
            if alarm.fileno() < 0:
                return

    def close(self) -> None:
        """Close the alarm."""
        alarm, self._not_empty = self._not_empty, None
        self.pop = self.messages.popleft  # no reference cycle is left, so the messages go with the mailbox
        if alarm is not None:
            alarm.close()
