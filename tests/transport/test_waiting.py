from __future__ import annotations

import _thread
import gc
import os
import select
import signal
import threading
import time
from collections.abc import Callable

import pytest

from tests.conftest import wait_until
from torchwq.transport import alarm as alarm_module
from torchwq.transport import descriptors, kinds, polling, waiting
from torchwq.transport.alarm import Alarm
from torchwq.transport.timing import MAX_SLEEP, MAX_SPIN_NS, MAX_SPIN_PAUSE_NS, MIN_SPIN_PAUSE_NS
from torchwq.transport.waiting import Waiter


def test_a_message_ends_the_wait() -> None:
    a, b = kinds.pair()
    waiter = Waiter(b)
    timer = threading.Timer(0.05, a.try_send, [b"x"])
    timer.start()
    assert waiter.wait(b.try_receive, None) == (b"x", [])
    timer.join()
    waiter.close()
    a.close()
    b.close()


def test_an_alarm_wakes_every_waiter_until_it_is_cleared() -> None:
    a, b = kinds.pair()
    waiter = Waiter(b)
    alarm = waiter.alarm
    results: list[object] = []
    threads = [threading.Thread(target=lambda: results.append(waiter.wait(b.try_receive, None))) for _ in range(3)]
    for thread in threads:
        thread.start()
    alarm.set()
    for thread in threads:
        thread.join(5)
    assert results == [None, None, None]
    alarm.clear()
    started = time.monotonic()
    assert waiter.wait(b.try_receive, started + 0.05) is None
    assert time.monotonic() >= started + 0.05
    waiter.close()
    a.close()
    b.close()


def test_wake_all_ends_each_wait_once() -> None:
    a, b = kinds.pair()
    waiter = Waiter(b)
    alarm = waiter.alarm
    waiter.wake_all()  # no thread waits
    results: list[object] = []
    threads = [threading.Thread(target=lambda: results.append(waiter.wait(b.try_receive, None))) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(waiter._asleep) == 3)
    waiter.wake_all()
    for thread in threads:
        thread.join(5)
    assert results == [None, None, None]
    assert not alarm.is_set()
    started = time.monotonic()
    assert waiter.wait(b.try_receive, started + 0.05) is None
    assert time.monotonic() >= started + 0.05
    assert waiter.wait(b.try_receive, started + 60, lambda: True) is None  # a reason that existed before
    assert time.monotonic() < started + 30
    waiter.close()
    a.close()
    b.close()


def test_an_alarm_is_set_while_there_is_any_reason() -> None:
    alarm = Alarm()
    for reasons in (("closed", "wake"), ("wake", "closed")):
        for reason in reasons:
            alarm.set(reason)
            alarm.set(reason)
        alarm.clear(reasons[0])
        assert alarm.is_set()
        assert select.select([alarm], [], [], 0)[0]
        alarm.clear(reasons[1])
        alarm.clear(reasons[1])
        assert not alarm.is_set()
        assert not select.select([alarm], [], [], 0)[0]
    alarm.close()


class Interrupting:
    """Stands for module os: calls something just before the next read or write, as a signal handler would."""

    def __init__(self) -> None:
        self.call: Callable[[], object] | None = None

    def _run(self) -> None:
        call, self.call = self.call, None
        if call is not None:
            call()

    def read(self, fd: int, count: int) -> bytes:
        self._run()
        return os.read(fd, count)

    def write(self, fd: int, data: bytes) -> int:
        self._run()
        return os.write(fd, data)


@pytest.mark.parametrize("has_eventfd", [True, False])
def test_an_alarm_that_a_signal_handler_changes_while_it_is_changed_ends_in_the_right_state(
    monkeypatch: pytest.MonkeyPatch, has_eventfd: bool
) -> None:
    if not has_eventfd:
        monkeypatch.setattr(descriptors, "eventfd", lambda: None)
    interrupting = Interrupting()
    monkeypatch.setattr(alarm_module, "os", interrupting)
    alarm = Alarm()
    for _ in range(3):
        interrupting.call = alarm.clear
        alarm.set()
        assert (alarm.is_set(), polling.readable(0, alarm.fileno())) == (False, [])
        alarm.set()
        interrupting.call = alarm.set
        alarm.clear()
        assert (alarm.is_set(), polling.readable(0, alarm.fileno())) == (True, [alarm.fileno()])
        alarm.clear()
        assert (alarm.is_set(), polling.readable(0, alarm.fileno())) == (False, [])
    alarm.close()


def test_a_wait_that_ctrl_c_ends_as_it_begins_or_ends_is_not_woken_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    class Waits(set[object]):
        def add(self, wait: object) -> None:
            super().add(wait)
            raise KeyboardInterrupt

    def leave() -> None:
        raise KeyboardInterrupt

    a, b = kinds.pair()
    waiter = Waiter(b)
    for name, value in (("_waits", Waits()), ("_leave", leave)):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(waiter, name, value)
            waiter.wait(b.try_receive, time.monotonic())
        if name == "_waits":
            waiter._waits |= value  # type: ignore[arg-type, operator]
        waiter.wake_all()
        waiter.wait(b.try_receive, time.monotonic() + 0.05)
        assert not waiter.alarm.is_set()
    waiter.close()
    a.close()
    b.close()


def test_where_a_spin_costs_another_thread_its_core_there_is_none_for_ever_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a, b = kinds.pair()
    waiter = Waiter(b)
    waiter._can_spin = True
    results = iter([-1, -1, 1])
    spins: list[int] = []

    def spin(waiter: Waiter, ns: int) -> int:
        spins.append(ns)
        return next(results)

    monkeypatch.setattr(waiting, "_spin", spin)
    pauses = []
    for _ in range(2):
        waiter._spin = MAX_SPIN_NS
        waiter.wait(b.try_receive, time.monotonic())
        pauses.append(waiter._pause)
        assert not waiter._spin
        assert waiter._spin_from > time.monotonic_ns() - MAX_SPIN_PAUSE_NS
    assert pauses == [MIN_SPIN_PAUSE_NS, 2 * MIN_SPIN_PAUSE_NS]
    assert len(spins) == 2

    waiter._spin_from = time.monotonic_ns() + 10**12  # a short sleep does not make it spin again before
    a.try_send(b"x")
    assert waiter.wait(b.try_receive, None) == (b"x", [])
    assert not waiter._spin
    waiter._spin_from = 0  # and afterwards it does
    a.try_send(b"y")
    assert waiter.wait(b.try_receive, None) == (b"y", [])
    assert waiter._spin
    a.try_send(b"z")
    assert waiter.wait(b.try_receive, None) == (b"z", [])
    assert len(spins) == 3
    assert waiter._pause == MIN_SPIN_PAUSE_NS, "a spin that finds a message halves the pause"
    for each in (waiter, a, b):
        each.close()


def test_threads_that_wake_together_end_the_watching() -> None:
    """Whoever is the last one to wake ends it: the writer pays for an end that is watched."""
    a, b = kinds.pair()
    waiter = Waiter(b)
    waiter._spin = 0
    for _ in range(20):
        threads = [threading.Thread(target=waiter.wait, args=(lambda: None, None)) for _ in range(3)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(waiter._asleep) == 3)
        waiter.wake_all()
        for thread in threads:
            thread.join()
        assert waiter._epoll is not None
        with pytest.raises(FileNotFoundError):
            waiter._epoll.unregister(b.fileno())
    for each in (waiter, a, b):
        each.close()


def test_a_deadline_in_the_past_still_takes_a_message_that_is_there() -> None:
    a, b = kinds.pair()
    waiter = Waiter(b)
    a.try_send(b"x")
    assert waiter.wait(b.try_receive, time.monotonic() - 1) == (b"x", [])
    waiter.close()
    a.close()
    b.close()


def test_closing_ends_the_wait_and_releases_the_descriptors() -> None:
    a, b = kinds.pair()
    waiter = Waiter(b)
    thread = threading.Thread(target=waiter.wait, args=(b.try_receive, None))
    thread.start()
    waiter.close()
    thread.join(5)
    assert not thread.is_alive()
    a.close()
    b.close()


def test_an_alarm_that_is_garbage_is_closed_for_a_finalizer_that_uses_it() -> None:
    class Uses:
        def __init__(self) -> None:
            self.alarm, self.me = Alarm(), self

        def __del__(self) -> None:
            self.alarm.set()
            self.alarm.clear()
            seen.append(self.alarm.fileno())

    seen: list[int] = []
    Uses()
    gc.collect()
    assert seen == [-1]


def test_a_source_that_was_closed_ends_the_wait_by_the_alarm() -> None:
    a, b = kinds.pair()
    waiter = Waiter(b)
    alarm = waiter.alarm
    b.close()
    alarm.set()
    assert waiter.wait(lambda: None, time.monotonic() + 20) is None
    waiter.close()
    a.close()


def test_a_sleeper_left_by_an_interruption_delays_no_message() -> None:
    a, b = kinds.pair()
    waiter = Waiter(b)
    waiter._spin = 0
    waiter._asleep.add(-1)  # as if a thread slept that watches nothing
    timer = threading.Timer(0.1, a.try_send, [b"x"])
    timer.start()
    began = time.monotonic()
    assert waiter.wait(b.try_receive, None) == (b"x", [])
    assert time.monotonic() - began < MAX_SLEEP
    timer.join()
    waiter.close()
    a.close()
    b.close()


@pytest.mark.parametrize("sleeps", [False, True], ids=["raises", "sleeps"])
def test_a_signal_that_interrupts_no_system_call_ends_the_sleep_of_the_main_thread(sleeps: bool) -> None:
    class Told(Exception):
        pass

    def on_signal(number: int, frame: object) -> None:
        if not sleeps:
            raise Told
        assert waiter.wait(b.try_receive, time.monotonic() + 0.01) is None
        a.try_send(b"x")

    a, b = kinds.pair()
    waiter = Waiter(b)
    before = signal.signal(signal.SIGUSR1, on_signal)
    timer = threading.Timer(0.1, _thread.interrupt_main, [signal.SIGUSR1])
    timer.start()
    began = time.monotonic()
    try:
        assert waiter.wait(b.try_receive, began + 9) == (b"x", [])
    except Told:
        assert not sleeps
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert time.monotonic() - began < 8 * MAX_SLEEP
    timer.join()
    waiter.close()
    a.close()
    b.close()
