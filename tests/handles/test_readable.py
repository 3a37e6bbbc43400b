"""The order of looking: the same for who blocks and for a task."""

from __future__ import annotations

import asyncio
import os
import queue
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest

from torchwq.errors import WorkerDied
from torchwq.handles.readable import EndOfMessages, MessageSource
from torchwq.transport.endpoint import Received

Waits = Callable[[MessageSource, "float | None"], Received]

MESSAGE: Received = (b"message", [])


class Scripted(MessageSource):
    """Says what it is asked, and lets a test make things happen in between."""

    def __init__(self) -> None:
        self.messages: deque[Received] = deque()
        self.asked: list[str] = []
        self.trouble: Exception | None = None
        self.then: dict[str, Callable[[], None]] = {}
        self.readable, self.writable = os.pipe()

    def _note(self, what: str) -> None:
        self.asked.append(what)
        self.then.pop(what, lambda: None)()

    def take(self) -> Received | None:
        self._note("take")
        return self.messages.popleft() if self.messages else None

    def sleep(self, deadline: float | None) -> Received | None:
        self._note("wait")
        return self.take()

    def fileno(self) -> int:
        self._note("wait")
        os.write(self.writable, b"x")
        return self.readable

    def may_raise(self) -> bool:
        self._note("look")
        return self.trouble is not None

    def raise_failure(self) -> None:
        self._note("raise")
        if self.trouble is not None:
            raise self.trouble

    def on_empty(self) -> None:
        self._note("found nothing")

    def awaited(self) -> str:
        return "nothing"

    def is_ready(self) -> bool:
        return bool(self.messages)


def block(source: MessageSource, timeout: float | None) -> Received:
    received = source.wait(False, timeout)
    assert received is not None
    return received


def await_(source: MessageSource, timeout: float | None) -> Received:
    return asyncio.run(source.wait_async(timeout))


@pytest.fixture
def source() -> Any:
    made = Scripted()
    yield made
    os.close(made.readable)
    os.close(made.writable)


@pytest.fixture(params=[block, await_], ids=["read", "aread"])
def wait(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_a_message_that_comes_just_before_the_trouble_is_read_before_it(wait: Waits, source: Scripted) -> None:
    def answer_and_die() -> None:
        source.messages.append(MESSAGE)
        source.trouble = WorkerDied("it died")

    source.then["look"] = answer_and_die
    assert wait(source, None) == MESSAGE
    assert source.asked == ["look", "take"]
    with pytest.raises(WorkerDied, match="it died"):
        wait(source, None)
    assert source.asked == ["look", "take", "look", "take", "raise"]


def test_it_looks_waits_and_takes_in_turn(wait: Waits, source: Scripted) -> None:
    source.then["wait"] = lambda: source.then.update(wait=lambda: source.messages.append(MESSAGE))
    assert wait(source, None) == MESSAGE
    assert source.asked == ["look", "wait", "take", "look", "wait", "take"]


def test_it_looks_once_more_when_the_time_is_over(wait: Waits, source: Scripted) -> None:
    with pytest.raises((queue.Empty, TimeoutError), match="came within 0 s"):
        wait(source, 0)
    assert source.asked == ["look"]
    source.trouble = WorkerDied("it died")
    with pytest.raises(WorkerDied):
        wait(source, 0)


def test_an_end_that_is_no_error_goes_the_way_of_trouble(wait: Waits, source: Scripted) -> None:
    source.trouble = EndOfMessages()
    with pytest.raises(EndOfMessages):
        wait(source, None)


def test_a_read_that_does_not_wait_asks_what_it_is_to_be_told(source: Scripted) -> None:
    assert source.wait(True, None) is None
    assert source.asked == ["found nothing"]
