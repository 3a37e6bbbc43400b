"""``WorkerGroup``: workers that are addressed one by one."""

from __future__ import annotations

import os
import queue
import signal
import time
from typing import Any

import pytest
import torch

from tests.conftest import wait_until
from torchwq import QueueClosed, WorkerDied, WorkerGroup


def add(q: Any, base: int, mapid: int) -> int:
    """Answers (number, question + base) until its queue ends; does what some questions say."""
    count = 0
    for question in q:
        count += 1
        if question == "fail":
            raise ZeroDivisionError("as told")
        if question == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if question == "sleep":
            time.sleep(100)
        q.write((mapid, question + base))
    return count


def test_each_worker_is_addressed_by_its_number(backend: str) -> None:
    with WorkerGroup(3, add, 10, backend=backend) as group:
        assert len(group) == 3
        group.broadcast(1)
        assert group.gather(timeout=30) == [(0, 11), (1, 11), (2, 11)]
        group.send(2, 5, 6)
        assert group.recv(2, timeout=30) == (2, 15)
        assert group.recv_any(timeout=30) == (2, (2, 16))
        assert "3 workers, 3 running" in repr(group)
    assert "0 running, closed" in repr(group)


def test_join_closes_the_queues_and_returns_what_the_functions_returned(backend: str) -> None:
    group = WorkerGroup(2, add, 0, backend=backend)
    group.send(1, 1, 2)
    assert [group.recv(1, timeout=30), group.recv(1, timeout=30)] == [(1, 1), (1, 2)]
    assert group.join(timeout=30) == [0, 2]
    with pytest.raises(QueueClosed, match="the group is closed"):
        group.broadcast(1)


def test_a_tensor_that_is_broadcast_is_one_tensor(backend: str) -> None:
    tensor = torch.zeros(4)
    with WorkerGroup(2, write_row, backend=backend) as group:
        group.broadcast(tensor)
        group.gather(timeout=30)
    assert tensor.tolist() == [1, 2, 0, 0]


def write_row(q: Any, mapid: int) -> None:
    for tensor in q:
        tensor[mapid] = mapid + 1
        q.write(None)


def test_recv_any_hears_everybody() -> None:
    with WorkerGroup(2, add, 0, backend="thread") as group:
        for number in range(20):
            group.broadcast(number)
        heard = [group.recv_any(timeout=30)[0] for _ in range(40)]
        assert heard.count(0) == heard.count(1) == 20
        with pytest.raises(queue.Empty, match=r"within 0\.01 s"):
            group.recv_any(timeout=0.01)


def test_answers_that_an_interrupted_gather_had_read_come_with_the_next_one(backend: str) -> None:
    with WorkerGroup(3, add, 0, backend=backend) as group:
        group.send(0, 1)
        group.send(1, 2)
        with pytest.raises(queue.Empty):
            group.gather(timeout=0.5)
        group.send(2, 3)
        assert group.gather(timeout=30) == [(0, 1), (1, 2), (2, 3)]


def test_a_worker_that_failed_is_named_with_its_error_and_can_be_restarted(backend: str) -> None:
    with WorkerGroup(2, add, 0, backend=backend) as group:
        group.broadcast(1)
        group.send(1, "fail")
        assert group.gather(timeout=30) == [(0, 1), (1, 1)]
        with pytest.raises(WorkerDied, match=r"worker 1 .*as told") as told:
            group.recv(1, timeout=30)
        assert isinstance(told.value.__cause__, ZeroDivisionError)
        group.restart(1)
        group.broadcast(2)
        assert group.gather(timeout=30) == [(0, 2), (1, 2)]


def test_a_worker_that_was_killed_is_told_of_and_can_be_restarted() -> None:
    with WorkerGroup(2, add, 0) as group:
        group.send(0, "die")
        with pytest.raises(WorkerDied, match="SIGKILL") as told:
            group.gather(timeout=30)
        assert told.value.mapid == 0
        group.restart(0)
        group.broadcast(2)
        assert group.gather(timeout=30) == [(0, 2), (1, 2)]


def test_the_end_of_a_block_raises_a_workers_error() -> None:
    with pytest.raises(ZeroDivisionError, match="as told"), WorkerGroup(2, add, 0) as group:
        group.send(1, "fail")


def test_an_error_in_the_block_ends_workers_that_are_busy_and_is_what_is_raised() -> None:
    began = time.monotonic()
    with pytest.raises(KeyError, match="mine"), WorkerGroup(2, add, 0) as group:
        group.broadcast("sleep")
        group.send(0, "fail")
        raise KeyError("mine")
    assert time.monotonic() - began < 30
    assert all(worker.wait(0) for worker in group._maps)


def test_terminate_ends_workers_at_once() -> None:
    group = WorkerGroup(2, add, 0)
    group.broadcast("sleep")
    group.terminate()
    assert "0 running" in repr(group)
    group.terminate()


def test_wrong_arguments_teach_the_call() -> None:
    with pytest.raises(TypeError, match=r"torchwq\.WorkerGroup\(number, function, \*args\)"):
        WorkerGroup(add, 2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a function is needed"):
        WorkerGroup(2, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1"):
        WorkerGroup(0, add)
    with WorkerGroup(1, add, 0, backend="thread") as group, pytest.raises(IndexError):
        group.send(1, 0)


def end_at_once(q: Any, mapid: int) -> None:
    if mapid:
        add(q, 0, mapid)


def test_recv_any_tells_each_end_once_and_hears_the_others(backend: str) -> None:
    with WorkerGroup(3, end_at_once, backend=backend) as group:
        with pytest.raises(WorkerDied) as told:
            group.recv_any(timeout=30)
        assert told.value.mapid == 0
        with pytest.raises(queue.Empty):
            group.recv_any(timeout=0.05)
        group.send(2, 5)
        assert group.recv_any(timeout=30) == (2, (2, 5))
    with WorkerGroup(1, end_at_once, backend=backend) as group:
        with pytest.raises(WorkerDied):
            group.recv_any(timeout=30)
        with pytest.raises(WorkerDied, match="no worker is left"):
            group.recv_any(timeout=30)


def test_a_restart_that_fails_leaves_the_old_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    with WorkerGroup(2, add, 0) as group:
        with monkeypatch.context() as patched:
            patched.setattr(group, "_backend", None)
            with pytest.raises(AttributeError):
                group.restart(0)
        group.broadcast(1)
        assert group.gather(timeout=30) == [(0, 1), (1, 1)]


def test_workers_that_do_not_end_are_ended_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchwq.group._END_TIMEOUT", 0.5)
    began = time.monotonic()
    with pytest.raises(WorkerDied, match="SIGTERM"), WorkerGroup(4, add, 0) as group:
        group.broadcast("sleep")
        wait_until(lambda: all(group.pids), 30, "the start of the workers")
    assert time.monotonic() - began < 20
