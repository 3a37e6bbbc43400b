"""A pipe moves as a whole or not at all, and keeps the order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.conftest import wait_until
from torchwq.marshalling import codec
from torchwq.pipe.pipe import MovingPipe, Pipe
from torchwq.transport import parking
from torchwq.transport.capabilities import SAME_PROCESS
from torchwq.transport.endpoint import Received
from torchwq.transport.mailbox import Mailbox


class FakeCarrier:
    """Keeps what is sent; what came over it is read from it."""

    max_payload = 1 << 20

    def __init__(self) -> None:
        self.before: int | None = None
        self.is_cancelled = False
        self.box: Mailbox[Any] = Mailbox()

    def begin(self, before: int) -> None:
        self.before = before

    def cancel(self) -> None:
        self.is_cancelled = True

    def send(self, payload: Any) -> None:
        self.box.put((payload if isinstance(payload, bytes) else payload.data, []))

    def take(self) -> Received | None:
        return self.box.take()

    def can_take(self) -> bool:
        return self.box.has_message()

    def wait(self, attempt: Callable[[], Any], deadline: float | None, stop: Callable[[], object]) -> Any:
        return self.box.wait(attempt, deadline, stop)

    def wake_all(self) -> None:
        self.box.wake_all()

    def filenos(self) -> Sequence[int]:
        return (self.box.not_empty().fileno(),)


def put(pipe: MovingPipe[FakeCarrier], obj: object) -> bool | None:
    return pipe.put_if_local(codec.encode(obj, codec.UNLIMITED, peer=SAME_PROCESS))


def taken(pipe: Pipe[FakeCarrier]) -> list[Any]:
    found = []
    while (received := pipe.take()) is not None:
        found.append(codec.decode(*received))
    return found


def test_messages_move_in_their_order_and_later_ones_go_over_the_carrier() -> None:
    pipe: MovingPipe[FakeCarrier] = MovingPipe()
    for number in range(4):
        assert put(pipe, number)
    assert pipe.take() is not None
    carrier = FakeCarrier()
    assert pipe.move(lambda: carrier)
    assert (carrier.before, len(pipe.box)) == (1, 0)
    assert put(pipe, 4) is None
    carrier.send(codec.encode(4, 100))
    assert taken(pipe) == [1, 2, 3, 4]
    assert pipe.move(FakeCarrier)
    assert pipe.carrier is carrier


def test_one_that_cannot_go_leaves_all_where_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe: MovingPipe[FakeCarrier] = MovingPipe()
    for number in range(3):
        put(pipe, number)
    carrier = FakeCarrier()
    real = codec.for_other_processes

    def refuse(payload: Any, limit: int) -> Any:
        if codec.decode(*codec.deliver_local(payload)) == 1:
            raise ValueError("it stays here")
        return real(payload, limit)

    monkeypatch.setattr(codec, "for_other_processes", refuse)
    with pytest.raises(ValueError, match="it stays here"):
        pipe.move(lambda: carrier)
    assert carrier.is_cancelled
    assert pipe.carrier is None
    assert taken(pipe) == [0, 1, 2]
    assert put(pipe, 5)


@pytest.mark.parametrize("fails", [False, True])
def test_a_thread_that_reads_while_messages_move_gets_them_in_their_order(
    monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    pipe: MovingPipe[FakeCarrier] = MovingPipe()
    for number in range(3):
        put(pipe, number)
    real = codec.for_other_processes
    found: list[Any] = []
    left: list[Any] = []
    reader = threading.Thread(target=lambda: left.append(pipe.wait(pipe.take, None)))

    def read(payload: Any, limit: int) -> Any:
        if not left and not reader.is_alive():
            thread = threading.Thread(target=lambda: found.extend(taken(pipe)))
            thread.start()
            thread.join()
            reader.start()
            wait_until(lambda: bool(pipe.box._lot.asleep))
        if fails:
            raise ValueError("it stays here")
        return real(payload, limit)

    monkeypatch.setattr(codec, "for_other_processes", read)
    monkeypatch.setattr(parking, "MAX_PARKED", 1000.0)
    if fails:
        with pytest.raises(ValueError, match="it stays here"):
            pipe.move(FakeCarrier)
    else:
        pipe.move(FakeCarrier)
    reader.join(60)
    assert not found
    assert len(left) == 1
    found = [] if left == [None] else [codec.decode(*left[0])]
    assert found + taken(pipe) == [0, 1, 2]


def test_one_that_asks_for_the_move_while_it_is_moved_finds_it_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a message does that has a handle of its own queue or channel in it."""
    pipe: MovingPipe[FakeCarrier] = MovingPipe()
    for number in range(3):
        put(pipe, number)
    carrier = FakeCarrier()
    real = codec.for_other_processes
    asked = []

    def ask(payload: Any, limit: int) -> Any:
        if not asked:
            asked.append(pipe.move(FakeCarrier))
            put(pipe, "written meanwhile")
        return real(payload, limit)

    monkeypatch.setattr(codec, "for_other_processes", ask)
    assert pipe.move(lambda: carrier)
    assert asked == [False]
    assert taken(pipe) == [0, 1, 2, "written meanwhile"]


class Reader:
    """A thread that waits for one message."""

    def __init__(self, pipe: Pipe[FakeCarrier]) -> None:
        self._pipe = pipe
        self._found: deque[Received] = deque()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while not self._found:
            received = self._pipe.wait(self._pipe.take, None)
            if received is not None:
                self._found.append(received)

    def result(self) -> Any:
        self._thread.join(20)
        return codec.decode(*self._found[0])


@pytest.mark.parametrize("way", ["move", "carry"])
def test_who_waits_finds_what_comes_over_the_carrier(way: str) -> None:
    pipe: MovingPipe[FakeCarrier] = MovingPipe()
    carrier = FakeCarrier()
    reader = Reader(pipe)
    wait_until(lambda: len(pipe.box._lot.asleep) == 1)
    if way == "move":
        pipe.move(lambda: carrier)
    else:
        pipe.carry(carrier)
    carrier.send(codec.encode(7, 100))
    assert reader.result() == 7


def test_a_thread_that_waits_at_the_carrier_finds_what_a_thread_of_its_process_puts() -> None:
    pipe: Pipe[FakeCarrier] = Pipe()
    carrier = FakeCarrier()
    pipe.carry(carrier)
    reader = Reader(pipe)
    wait_until(lambda: len(carrier.box._lot.asleep) == 1)
    assert pipe.put(codec.encode(3, codec.UNLIMITED, peer=SAME_PROCESS))
    assert reader.result() == 3


def test_a_closed_pipe_takes_nothing_and_gives_what_it_has() -> None:
    pipe: MovingPipe[FakeCarrier] = MovingPipe()
    put(pipe, 1)
    pipe.close()
    assert put(pipe, 2) is False
    assert pipe.put(codec.encode(2, codec.UNLIMITED, peer=SAME_PROCESS)) is False
    assert pipe.wait(pipe.take, None) is not None
    assert pipe.wait(pipe.take, None) is None
    put(pipe, 1)
    pipe.discard()
    assert taken(pipe) == []
