"""Room is kept to, and nobody who waits for it is forgotten: no test here can pass by looking again after a while."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Iterator

import pytest

from tests.conftest import wait_until
from tests.injection import in_the_middle
from torchwq.pipe import room as rooms
from torchwq.pipe.room import Room, SharedRoom
from torchwq.transport import parking, waiting


@pytest.fixture(autouse=True)
def _nobody_looks_by_himself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parking, "MAX_PARKED", 1000.0)
    monkeypatch.setattr(waiting, "MAX_SLEEP", 1000.0)
    monkeypatch.setattr(rooms, "MAX_SLEEP", 1000.0)
    monkeypatch.setattr(rooms, "_FIRST_LOOK", 1000.0)


def no_news() -> None:
    """There is nothing to tell one who waits."""


class Bounded:
    """Messages with room for some of them; several of these may share them, as processes do."""

    def __init__(self, capacity: int, messages: deque[int] | None = None, lock: threading.RLock | None = None) -> None:
        self.messages = deque() if messages is None else messages
        self.is_closed = False
        self.most = 0
        self.lock = lock or threading.RLock()
        # As a queue's, whose writers are all of one process; or as a channel's.
        locks = contextlib.nullcontext if lock is None else lambda: self.lock
        self.room = Room(capacity, lambda: len(self.messages), lambda: self.is_closed, locks)

    def write(self, message: int) -> bool:
        return self.room.write(lambda: self._put(message), no_news)

    def _put(self, message: int) -> bool:
        if self.is_closed:
            return False
        self.messages.append(message)
        self.most = max(self.most, len(self.messages))
        return True

    def take(self) -> int:
        message = self.messages.popleft()
        self.room.made()
        return message


@pytest.fixture(params=["threads", "processes"])
def sides(request: pytest.FixtureRequest) -> Iterator[list[Bounded]]:
    """Two sides that write to and read from the same messages, of which there may be two."""
    if request.param == "threads":
        one = Bounded(2)
        yield [one, one]
        return
    words = memoryview(bytearray(64)).cast("Q")
    first = Bounded(2, lock=threading.RLock())
    second = Bounded(2, first.messages, first.lock)
    shared = SharedRoom(words, 3)
    other = SharedRoom(words, 3, [os.dup(fd) for fd in shared.handover()])
    first.room.share(shared)
    second.room.share(other)
    yield [first, second]
    shared.close()
    other.close()


def test_writers_keep_to_the_room_and_each_gets_in(sides: list[Bounded]) -> None:
    writers = [
        threading.Thread(target=lambda side=side, n=n: [side.write(n * 100 + i) for i in range(50)], daemon=True)
        for n, side in enumerate(sides * 3)
    ]
    got: list[int] = []

    def read(side: Bounded) -> None:
        while len(got) < 300:
            with contextlib.suppress(IndexError):
                got.append(side.take())
            time.sleep(0)

    readers = [threading.Thread(target=read, args=(side,), daemon=True) for side in sides]
    for thread in writers + readers:
        thread.start()
    for thread in writers + readers:
        thread.join(60)
        assert not thread.is_alive()
    assert sorted(got) == sorted(n * 100 + i for n in range(6) for i in range(50))
    assert max(side.most for side in sides) <= 2


def waiting_writer(side: Bounded, message: int, left: list[object]) -> threading.Thread:
    """A thread that waits for room; how its write ends comes into ``left``."""

    def write() -> None:
        try:
            left.append(side.write(message))
        except BaseException as error:
            left.append(error)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    return thread


def waits(side: Bounded, count: int) -> bool:
    shared = side.room._shared
    return len(side.room._lot.asleep) == count if shared is None else bool(shared._waiter and shared._waiter._asleep)


def test_two_that_wait_get_in_although_two_were_taken_at_once(sides: list[Bounded]) -> None:
    for message in range(2):
        sides[0].write(message)
    left: list[object] = []
    threads = [waiting_writer(sides[0], 2, left), waiting_writer(sides[1], 3, left)]
    wait_until(lambda: waits(sides[0], 1 + (sides[0] is sides[1])) and waits(sides[1], 1 + (sides[0] is sides[1])))
    with sides[0].lock:  # neither can look in between
        assert [sides[1].take(), sides[1].take()] == [0, 1]
    for thread in threads:
        thread.join(60)
    assert left == [True, True]
    assert sorted(sides[0].messages) == [2, 3]


def test_one_that_is_woken_and_cannot_write_wakes_the_next(sides: list[Bounded]) -> None:
    for message in range(2):
        sides[0].write(message)
    left: list[object] = []
    refused = []

    def put(message: int) -> bool:
        if not refused:
            refused.append(message)
            raise KeyboardInterrupt
        return Bounded._put(sides[0], message)

    for side in sides:
        side._put = put  # type: ignore[method-assign]
    threads = [waiting_writer(sides[0], 2, left), waiting_writer(sides[1], 3, left)]
    wait_until(lambda: waits(sides[0], 1 + (sides[0] is sides[1])) and waits(sides[1], 1 + (sides[0] is sides[1])))
    sides[0].take()
    for thread in threads:
        thread.join(60)
    assert sorted(map(str, left)) == ["", "True"]
    assert len(sides[0].messages) == 2


def test_a_claim_that_ends_without_a_message_is_room_for_another_writer(sides: list[Bounded]) -> None:
    sides[0].write(0)
    left: list[object] = []
    threads: list[threading.Thread] = []

    def fail() -> bool:
        threads.append(waiting_writer(sides[1], 2, left))
        if sides[0].room._shared is None:
            wait_until(lambda: waits(sides[1], 1))
        raise ValueError("it cannot be written")

    with pytest.raises(ValueError, match="it cannot be written"):
        sides[0].room.write(fail, no_news)
    threads[0].join(60)
    assert left == [True]


def test_one_that_a_claim_has_turned_away_gets_in_when_the_message_counts_alone(sides: list[Bounded]) -> None:
    one = sides[0]
    one.room._lock = None  # as in a queue, whose writers are all of one process
    left: list[object] = []
    threads: list[threading.Thread] = []

    def put_slowly() -> bool:
        one._put(0)  # counts twice now
        threads.append(waiting_writer(one, 1, left))
        wait_until(lambda: waits(one, 1))
        return True

    assert one.room.write(put_slowly, no_news)
    threads[0].join(60)
    assert left == [True]


def test_a_claim_ends_wherever_a_write_is_interrupted(sides: list[Bounded]) -> None:
    one = sides[0]

    def interrupt() -> None:
        raise KeyboardInterrupt

    for at in itertools.count():
        try:
            has_acted = in_the_middle(lambda: one.write(0), interrupt, at)
        except KeyboardInterrupt:
            has_acted = True
        one.messages.clear()
        assert not one.room._claims, f"at place {at}"
        if not has_acted:
            break
    assert at > 5


def test_a_write_in_the_middle_of_a_write_is_counted() -> None:
    """As a finalizer or a signal handler makes it, just when the outer one has found room."""
    one = Bounded(1)
    inner: list[bool] = []
    count = one.room._count

    def count_and_write() -> int:
        found = count()
        if not inner:
            inner.append(True)
            one.write(1)
        return found

    one.room._count = count_and_write
    left: list[object] = []
    thread = waiting_writer(one, 2, left)
    wait_until(lambda: waits(one, 1))
    assert list(one.messages) == [1]
    one.take()
    thread.join(60)
    assert list(one.messages) == [2]


def test_news_and_the_closing_end_a_wait(sides: list[Bounded]) -> None:
    for message in range(2):
        sides[0].write(message)
    news: list[Exception] = []

    def look() -> None:
        if news:
            raise news[0]

    left: list[object] = []

    def write() -> None:
        try:
            sides[0].room.write(lambda: sides[0]._put(2), look)
        except ValueError as error:
            left.append(error)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    wait_until(lambda: waits(sides[0], 1))
    news.append(ValueError("somebody has died"))
    sides[0].room.wake_all()
    thread.join(60)
    assert left == news
    thread = waiting_writer(sides[0], 3, left)
    wait_until(lambda: waits(sides[0], 1))
    for side in sides:
        side.is_closed = True
        side.room.wake_all()
    thread.join(60)
    assert left[1:] == [False]


def test_a_shared_room_without_an_eventfd_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms.descriptors, "eventfd", lambda: None)
    words = memoryview(bytearray(8)).cast("Q")
    shared = SharedRoom(words, 0)
    one = Bounded(1)
    one.room.share(shared)
    assert shared.handover() == []
    other = SharedRoom(words, 0, [])
    one.write(0)
    left: list[object] = []
    thread = waiting_writer(one, 1, left)
    one.messages.popleft()
    other.made()
    thread.join(60)
    assert left == [True]
    shared.close()
    other.close()
    shared.made()  # closed: nothing to do
