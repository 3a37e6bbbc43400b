"""A worker cannot be started, or the system refuses its messages: the caller gets the error, and no worker stays."""

from __future__ import annotations

import concurrent.futures
import threading
from collections import Counter
from typing import Any

import pytest

import torchwq
from tests.conftest import wait_until
from tests.pool.jobs import square
from torchwq.workers import worker
from torchwq.workers.processes import ProcessWorker


def refuse(monkeypatch: pytest.MonkeyPatch, number: int, mapid: int = 0) -> None:
    """Let the system refuse a worker's message with this number. Its setup has number 1."""
    sent: Counter[ProcessWorker] = Counter()
    send = ProcessWorker.send

    def refusing(process: ProcessWorker, payload: Any) -> bool:
        sent[process] += 1
        if process.info.mapid == mapid and sent[process] == number:
            raise torchwq.ResourceError("refused")
        return send(process, payload)

    monkeypatch.setattr(ProcessWorker, "send", refusing)


def test_a_task_of_a_pool_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, 4)
    with torchwq.BackgroundTaskPool(1) as pool:
        first, second, third = (pool.submit(square, number) for number in (1, 2, 3))
        assert first.result(timeout=50) == 1
        with pytest.raises(torchwq.ResourceError, match="refused"):
            second.result(timeout=50)
        assert third.result(timeout=50) == 9


def test_an_initializer_breaks_its_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, 2)
    with torchwq.BackgroundTaskPool(2) as pool:
        for future in [pool.submit(square, number) for number in (1, 2)]:
            with pytest.raises(concurrent.futures.BrokenExecutor, match="refused"):
                future.result(timeout=50)
    wait_until(lambda: not worker.active_workers(), what="the end of the workers")


def test_a_map_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, 2, mapid=1)
    with pytest.raises(torchwq.ResourceError, match="refused"):
        torchwq.map(3, square)
    wait_until(lambda: not worker.active_workers(), what="the end of the workers")


def test_a_background_task_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, 2)
    with pytest.raises(torchwq.ResourceError, match="refused"):
        torchwq.BackgroundTask(square, 3)
    wait_until(lambda: not worker.active_workers(), what="the end of the worker")


def test_threads_end_if_another_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def refusing(thread: threading.Thread) -> None:
        if thread.name == "torchwq-worker-2":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refusing)
    with pytest.raises(torchwq.ResourceError, match="limit on threads"):
        torchwq.map(3, square, backend="thread")
    wait_until(lambda: not worker.active_workers(), what="the end of the threads")
