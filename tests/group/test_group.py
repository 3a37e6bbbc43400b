"""``WorkerGroup``: workers that are addressed one by one."""

from __future__ import annotations

import os
import queue
import signal
import time
from typing import Any

import numpy as np
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
    with pytest.raises(WorkerDied, match="ended by the group"), WorkerGroup(4, add, 0) as group:
        group.broadcast("sleep")
        wait_until(lambda: all(group.pids), 30, "the start of the workers")
    assert time.monotonic() - began < 20


def fail_at_one(q: Any, mapid: int) -> None:
    for message in q:
        if message == 1 and mapid == 0:
            raise ZeroDivisionError("at one")
        if message == "hang" and mapid == 0:
            time.sleep(100)
        q.write((mapid, message))


def test_a_death_ends_the_round_and_the_next_one_is_in_step(backend: str) -> None:
    with WorkerGroup(3, fail_at_one, backend=backend) as group:
        seen = []
        for message in range(4):
            group.broadcast(message)
            try:
                seen.append(group.gather(timeout=30))
            except WorkerDied as death:
                assert death.mapid == 0
                group.restart(0)
        assert seen == [[(index, message) for index in range(3)] for message in (0, 2, 3)]


def test_a_gather_that_returns_exceptions_gives_the_others_answers(backend: str) -> None:
    with WorkerGroup(3, fail_at_one, backend=backend) as group:
        group.broadcast(1)
        death, *others = group.gather(timeout=30, return_exceptions=True)
        assert isinstance(death, WorkerDied)
        assert isinstance(death.__cause__, ZeroDivisionError)
        assert others == [(1, 1), (2, 1)]


def test_a_gather_that_is_out_of_time_names_who_is_missing_and_can_go_on() -> None:
    with WorkerGroup(3, fail_at_one) as group:
        group.broadcast("hang")
        with pytest.raises(queue.Empty, match=r"no answer of worker 0 came within 3.0 s"):
            group.gather(timeout=3.0)
        group.restart(0)
        group.send(0, "again")
        assert group.gather(timeout=30) == [(0, "again"), (1, "hang"), (2, "hang")]


def test_answers_that_came_before_a_gather_ran_out_of_time_are_not_lost_to_a_death() -> None:
    with WorkerGroup(3, fail_at_one) as group:
        group.send(0, 1)
        with pytest.raises(WorkerDied):
            group.recv(0, timeout=30)
        group.send(1, 5)
        group.send(2, "hang on")
        assert group.recv(2, timeout=30) == (2, "hang on")
        group._unanswered[2] = 1  # as if it were late
        with pytest.raises(queue.Empty, match="worker 2"):
            group.gather(timeout=1.0)
        group.send(2, 6)
        death, *others = group.gather(timeout=30, return_exceptions=True)
        assert isinstance(death, WorkerDied)
        assert others == [(1, 5), (2, 6)]


def test_the_end_of_a_worker_is_told_again_at_once_and_what_to_do(backend: str) -> None:
    with WorkerGroup(2, fail_at_one, backend=backend) as group:
        group.send(0, 1)
        with pytest.raises(WorkerDied, match="at one"):
            group.recv(0, timeout=30)
        for call in (lambda: group.recv(0, timeout=0.2), lambda: group.gather(timeout=0.2)):
            with pytest.raises(WorkerDied, match=r"at one.*restart\(0\) starts another") as told:
                call()
            assert isinstance(told.value.__cause__, ZeroDivisionError)
        group.send(1, 5)
        assert group.recv_any(timeout=30) == (1, (1, 5))  # which does not tell it again


def test_what_was_told_is_not_raised_at_the_end_of_the_block(run_script: Any) -> None:
    done = run_script("""
        import os, signal, torchwq

        def work(q, mapid):
            for message in q:
                if message == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ValueError(message)

        with torchwq.WorkerGroup(2, work) as group:
            group.send(0, "kill")
            group.send(1, "mine")
            for index in range(2):
                try:
                    group.recv(index, timeout=40)
                except torchwq.WorkerDied as death:
                    print(death.mapid)
            group.restart(1)
    """)
    assert done.stdout == "0\n1\n"
    assert done.stderr == ""


def test_a_worker_that_does_not_end_with_the_block_is_named(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchwq.group._END_TIMEOUT", 0.5)
    told = r"worker 0 did not end within 0.5 s .* was ended by the group"
    with pytest.raises(WorkerDied, match=told), WorkerGroup(2, hang, backend=backend) as group:
        group.send(0, "now")
        assert group.recv(0, timeout=30) == "hanging"


def hang(q: Any, mapid: int) -> None:
    for _ in q:
        q.write("hanging")
        while True:
            time.sleep(0.01)


def test_a_worker_that_is_not_there_is_an_error_that_says_which_are() -> None:
    with WorkerGroup(2, add, 0, backend="thread") as group:
        for call in (lambda: group.send(2, 1), lambda: group.recv(-1), lambda: group.restart(5)):
            with pytest.raises(IndexError, match="the group has 2, with the numbers 0 to 1"):
                call()
        group.send(np.int64(1), 1)  # type: ignore[arg-type] # as argmax gives it
        assert group.recv(1, timeout=30) == (1, 1)
        with pytest.raises(TypeError, match="by its number, not by 'x'"):
            group.send("x", 1)  # type: ignore[arg-type]
