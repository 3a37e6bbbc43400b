"""The debug mode of the reactor. After each test, the fixtures check that it has not reported torchwq itself."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from typing import Any

from tests.conftest import report_of_debug_mode
from torchwq.marshalling import codec
from torchwq.transport import debug, reactor


def run_in_reactor(callback: Callable[[], object]) -> str:
    """Have the reactor call it; returns what the debug mode reports."""
    done = threading.Event()
    reactor.get().call_later(0, callback)
    reactor.get().call_later(0, done.set)
    assert done.wait(30)
    return report_of_debug_mode()


def burn(seconds: float) -> None:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def test_a_callback_that_takes_long_is_reported() -> None:
    def burns() -> None:
        burn(debug.MAX_CALLBACK_TIME * 1.2)

    report = run_in_reactor(burns)
    assert "burns" in report
    assert "ms of processor time" in report
    assert f"process {os.getpid()}" in report


def test_a_callback_that_takes_a_moment_is_not_reported() -> None:
    assert not run_in_reactor(lambda: burn(debug.MAX_CALLBACK_TIME / 5))


def test_a_callback_that_waits_is_reported_while_it_does() -> None:
    go_on = threading.Event()

    def waits() -> None:
        go_on.wait(30)

    reactor.get().call_later(0, waits)
    report = ""
    until = time.monotonic() + 30
    while not report and time.monotonic() < until:
        report = report_of_debug_mode()
    go_on.set()
    assert "waits" in report
    assert "go_on.wait(30)" in report, "where it waits"


def test_a_callback_that_has_to_share_the_processor_is_not_reported() -> None:
    stop = threading.Event()

    def shares() -> None:
        for _ in range(50):
            time.sleep(0)  # others take the GIL, each for 5 ms

    others = [threading.Thread(target=lambda: [None for _ in iter(stop.is_set, True)]) for _ in range(3)]
    for each in others:
        each.start()
    try:
        assert not run_in_reactor(shares)
    finally:
        stop.set()
        for each in others:
            each.join()


def test_a_callback_that_marshals_is_reported() -> None:
    def marshals() -> None:
        codec.decode(*codec.deliver_local(codec.encode({"a": [1]}, 1000)))

    report = run_in_reactor(marshals)
    assert report.count("marshals at") == 2
    assert report.count("runs code of the user's") == 2
    assert "codec.encode({" in report, "where it does"


def test_garbage_collected_in_the_reactor_is_not_reported() -> None:
    class Marshals:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            codec.encode({"a": [1]}, 1000)
            burn(debug.MAX_CALLBACK_TIME * 1.2)
            ran.append(threading.current_thread().name)

    ran: list[str] = []
    gc.disable()
    try:
        Marshals()
        assert not run_in_reactor(gc.collect)
    finally:
        gc.enable()
    assert ran == ["torchwq-reactor"]


def run(source: str, environment: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source)], env=environment, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_the_debug_mode_costs_nothing_when_it_is_off() -> None:
    source = """
        import threading
        import torchwq
        from torchwq.marshalling import codec
        from torchwq.transport import debug, reactor

        assert not debug.ON
        assert not any(hasattr(each, "__wrapped__") for each in (reactor._call, codec.encode, codec.decode))
        with torchwq.workqueue("named"):
            assert "torchwq-debug" not in [thread.name for thread in threading.enumerate()]
    """
    assert not run(source, {key: value for key, value in os.environ.items() if not key.startswith("TORCHWQ_")})


def test_the_debug_mode_reports_on_stderr_unless_it_has_a_path() -> None:
    source = """
        import threading, time
        from torchwq.transport import reactor

        def burns():
            until = time.thread_time() + 0.1
            while time.thread_time() < until:
                pass

        ended = threading.Event()
        reactor.get().call_later(0, burns)
        reactor.get().call_later(0, ended.set)
        ended.wait()
    """
    assert "ms of processor time" in run(source, {**os.environ, debug.VARIABLE: "1", debug.SLOWDOWN_VARIABLE: "1"})


def test_the_watching_thread_ends_before_the_interpreter(run_script: Any) -> None:
    done = run_script(
        """
        import atexit, threading
        atexit.register(lambda: print([each.name for each in threading.enumerate()]))  # first, so it runs last
        import torchwq
        from torchwq.transport import debug
        with torchwq.workqueue() as queue:
            worker = torchwq.map(1, lambda q: q.write(1), queue)
            queue.read()
            worker.join()
        assert any(each.name == "torchwq-debug" for each in threading.enumerate())
        """,
        env={"TORCHWQ_DEBUG": "1"},
        fresh=True,
    )
    assert "torchwq-debug" not in done.stdout
    assert "MainThread" in done.stdout
