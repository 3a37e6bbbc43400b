"""A mailbox loses nothing and wakes whom it must, with an alarm and without."""

from __future__ import annotations

import itertools
import threading
import time

import pytest

from tests.conftest import wait_until
from tests.injection import in_the_middle
from torchwq.transport.mailbox import Mailbox


def test_messages_come_in_order_and_then_none() -> None:
    box: Mailbox[int] = Mailbox()
    for number in range(3):
        box.put(number)
    assert [box.pop(), box.take(), box.take(), box.take()] == [0, 1, 2, None]
    with pytest.raises(IndexError):
        box.pop()


def test_the_alarm_is_set_while_there_are_messages() -> None:
    box: Mailbox[str] = Mailbox()
    box.put("before")
    alarm = box.not_empty()
    assert alarm.is_set()
    assert box.pop() == "before"
    assert not alarm.is_set()
    with pytest.raises(IndexError):
        box.pop()
    assert not alarm.is_set()
    box.put("a")
    box.put("b")
    assert box.take() == "a"
    assert alarm.is_set()
    assert box.take() == "b"
    assert not alarm.is_set()
    box.end()
    assert alarm.is_set()
    assert box.take() is None
    assert alarm.is_set(), "the end stays"
    box.close()
    assert alarm.fileno() < 0
    box.put("after")
    assert box.pop() == "after"


@pytest.mark.parametrize("alarm", [False, True])
def test_threads_that_put_take_and_sleep_lose_nothing(alarm: bool) -> None:
    box: Mailbox[tuple[int, int]] = Mailbox()
    if alarm:
        box.not_empty()
    got: list[list[tuple[int, int]]] = [[], [], []]

    def read(mine: list[tuple[int, int]]) -> None:
        while True:
            found = box.take() or box.wait(box.take, None)
            if found is None:  # another reader was faster
                continue
            if found[0] < 0:
                return
            mine.append(found)

    def write(writer: int) -> None:
        for number in range(5_000):
            box.put((writer, number))

    readers = [threading.Thread(target=read, args=(mine,)) for mine in got]
    writers = [threading.Thread(target=write, args=(writer,)) for writer in range(2)]
    for thread in (*readers, *writers):
        thread.start()
    for thread in writers:
        thread.join(30)
    for _ in readers:
        box.put((-1, 0))
    for thread in readers:
        thread.join(30)
    assert sorted(item for mine in got for item in mine) == [(w, n) for w in range(2) for n in range(5_000)]
    for mine in got:
        for writer in range(2):
            numbers = [number for by, number in mine if by == writer]
            assert numbers == sorted(numbers)
    if alarm:
        assert not box.not_empty().is_set()
    box.close()


def test_wait_ends_for_a_reason_and_at_the_deadline() -> None:
    box: Mailbox[int] = Mailbox()
    assert box.wait(box.take, time.monotonic() + 0.01) is None
    assert box.wait(box.take, None, lambda: True) is None
    stopped = threading.Event()
    thread = threading.Thread(target=lambda: box.wait(box.take, time.monotonic() + 20, stopped.is_set))
    thread.start()
    stopped.set()
    box.wake_all()
    thread.join(5)
    assert not thread.is_alive()


def test_nobody_who_was_interrupted_is_taken_for_a_sleeper() -> None:
    box: Mailbox[int] = Mailbox()

    def interrupt() -> None:
        raise KeyboardInterrupt

    for at in itertools.count():
        try:
            has_acted = in_the_middle(lambda: box.wait(box.take, 0), interrupt, at)
        except KeyboardInterrupt:
            has_acted = True
        assert not box._lot.asleep, f"at place {at}"
        if not has_acted:
            break
    assert at > 5


def test_an_alarm_made_while_a_message_is_taken_is_cleared_by_has_message() -> None:
    box: Mailbox[int] = Mailbox()
    box.put(1)
    pop = box.pop
    alarm = box.not_empty()
    assert pop() == 1
    assert alarm.is_set()
    assert not box.has_message()
    assert not alarm.is_set()
    box.close()


@pytest.mark.parametrize("where", ["looking", "about to sleep"])
def test_a_sleeper_that_is_woken_and_interrupted_wakes_the_next_one(where: str) -> None:
    mailbox: Mailbox[str] = Mailbox()
    found: list[object] = []

    next_sleeper = threading.Thread(target=lambda: found.append(mailbox.wait(mailbox.take, None)))

    def put_and_interrupt() -> None:
        next_sleeper.start()
        wait_until(lambda: len(mailbox._lot.asleep) == 2)
        mailbox.put("message")  # chooses the first sleeper, which is this one
        raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        if where == "looking":
            mailbox.wait(put_and_interrupt, None)
        else:
            mailbox.wait(lambda: None, None, put_and_interrupt)
    next_sleeper.join()
    assert found == ["message"]
    assert time.monotonic() - began < 0.9  # not by the end of its sleep
