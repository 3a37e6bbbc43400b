"""``with torchwq.map(...)``, ``as_completed``, ``terminate`` and ``wait``."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest

import torchwq
from tests.conftest import wait_until
from torchwq import WorkerDied


def end_when_told(queues: list[Any], mapid: int) -> int:
    if queues[mapid].read() == "fail":
        raise KeyError(mapid)
    return mapid * 10


def test_results_come_as_workers_end(backend: str) -> None:
    queues = [torchwq.workqueue() for _ in range(3)]
    workers = torchwq.map(3, end_when_told, queues, backend=backend)
    found = []
    queues[2].write("end")
    for mapid, result in workers.as_completed(timeout=30):
        found.append((mapid, result))
        if mapid:
            queues[mapid - 1].write("end")
    assert found == [(2, 20), (1, 10), (0, 0)]
    assert workers.join() == [0, 10, 20]
    for each in queues:
        each.close()


def test_an_error_comes_when_its_turn_comes_and_is_consumed(backend: str) -> None:
    queues = [torchwq.workqueue() for _ in range(2)]
    workers = torchwq.map(2, end_when_told, queues, backend=backend)
    with pytest.raises(TimeoutError, match="2 of 2 workers"):
        next(workers.as_completed(timeout=0.01))
    queues[1].write("fail")
    with pytest.raises(KeyError):
        next(workers.as_completed(timeout=30))
    queues[0].write("end")
    assert list(workers.as_completed(timeout=30)) == [(0, 0)]
    assert list(workers.as_completed(timeout=30)) == []
    assert workers.join() == [0]
    for each in queues:
        each.close()


def test_a_block_waits_for_its_workers_and_raises_their_errors(backend: str) -> None:
    with torchwq.map(2, time.sleep, 0.01, backend=backend) as workers:
        pass
    assert workers.wait(0)
    with pytest.raises(ZeroDivisionError), torchwq.map(1, divmod, 1, 0, backend=backend):
        pass


def test_an_error_in_the_block_ends_the_workers() -> None:
    with pytest.raises(KeyError, match="mine"), torchwq.map(2, time.sleep, 100) as workers:
        assert not workers.wait(0.01)
        raise KeyError("mine")
    assert workers.wait(0)


def spin() -> None:
    while True:
        time.sleep(0.001)


def test_a_thread_that_was_terminated_has_no_result() -> None:
    workers = torchwq.map(1, spin, backend="thread")
    workers.terminate()
    with pytest.raises(WorkerDied):
        workers.join(timeout=30)


def test_a_death_before_terminate_is_reported_of_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    workers = torchwq.map(1, die)
    assert workers.wait(30)
    workers.terminate()
    del workers
    wait_until(lambda: "SIGKILL" in caplog.text, 10, "the report")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_workers_that_were_terminated_are_not_reported_of_but_join_says_so(caplog: pytest.LogCaptureFixture) -> None:
    workers = torchwq.map(1, time.sleep, 100)
    workers.terminate()
    with pytest.raises(WorkerDied, match="SIGTERM"):
        workers.join(timeout=30)
    workers = torchwq.map(1, time.sleep, 100)
    workers.terminate()
    assert workers.wait(30)
    del workers
    assert not caplog.records
