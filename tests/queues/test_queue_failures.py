"""A worker's function raises: whoever waits for answers of a queue that it had open is told."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

import torchwq
from tests.conftest import wait_until
from tests.queues import jobs
from torchwq.queues import draining

#: Ways of a worker to have a queue open when it fails.
WAYS = ["argument", "with", "other handle"]


def told(call: Callable[[], Any]) -> torchwq.WorkerDied:
    with pytest.raises(torchwq.WorkerDied) as caught:
        call()
    return caught.value


@pytest.mark.parametrize("way", WAYS)
def test_a_reader_is_told_of_an_error_after_the_answers_that_are_there(backend: str, way: str) -> None:
    with torchwq.workqueue("of unfit workers") as owner:
        where = owner.name if way == "other handle" else owner
        workers = torchwq.map(2, jobs.square_or_fail, where, way, backend=backend)
        owner.write(1, 2, 3)
        assert {owner.read(timeout=40), owner.read(timeout=40)} == {1, 4}
        death = told(lambda: owner.read(timeout=40))
        assert "ended with an error: Unfit: three" in str(death) or "ended with an error, with" in str(death)
        assert "Unfit: three" in str(death)
        assert type(death.__cause__) is jobs.Unfit
        assert death.mapid in (0, 1)
        owner.write(4)  # once only: the other one goes on
        assert owner.read(timeout=40) == 16
        owner.write(None)
        with pytest.raises(jobs.Unfit, match="three") as caught:
            workers.join(40)
        assert caught.value is death.__cause__
        assert "no worker is left" in str(told(lambda: owner.read(timeout=40)))


def test_drain_and_aread_are_told_too(backend: str) -> None:
    with torchwq.workqueue() as owner:
        workers = torchwq.map(1, jobs.square_or_fail, owner, "argument", backend=backend)
        owner.write(3)
        assert type(told(lambda: owner.drain(40)).__cause__) is jobs.Unfit
        owner.drain(40)  # the one who had the question in hand will not answer
        with pytest.raises(jobs.Unfit):
            workers.join(40)
        task: torchwq.BackgroundTask[None] = torchwq.BackgroundTask(jobs.square_or_fail, owner, "with", backend=backend)
        owner.write(3)
        death = told(lambda: asyncio.run(owner.aread(timeout=40)))
        assert type(death.__cause__) is jobs.Unfit
        assert isinstance(task.exception(40), jobs.Unfit)


def test_a_failure_that_is_told_while_drain_looks_is_raised(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it may happen between two looks: that at what is to be told, and that at who is busy."""
    with torchwq.workqueue() as owner:
        workers = torchwq.map(1, jobs.square_or_fail, owner, "argument", backend=backend)
        role: Any = owner._role
        any_busy = role.members.any_busy

        def look_late(mark: int) -> bool:
            wait_until(lambda: role.troubles.any_to_tell)
            return bool(any_busy(mark))

        monkeypatch.setattr(role.members, "any_busy", look_late)
        owner.write(3)
        assert type(told(lambda: owner.drain(40)).__cause__) is jobs.Unfit
        with pytest.raises(jobs.Unfit):
            workers.join(40)


def test_drain_does_not_wait_for_a_handle_in_doubt_that_has_nothing_in_hand(backend: str) -> None:
    """The worker goes on after the error, and opens the queue again."""
    with torchwq.workqueue("opened again and again") as owner:
        workers = torchwq.map(1, jobs.open_again_and_again, owner.name, backend=backend)
        owner.write(1)
        assert owner.read(timeout=40) == 1
        role: Any = owner._role
        wait_until(lambda: role.troubles._in_doubt)
        began = time.monotonic()
        owner.write(2)
        owner.drain(40)
        assert time.monotonic() - began < 4  # the doubt lasts for 5 s
        assert owner.read(timeout=40) == 2
        owner.write(None)
        assert workers.join(40) == [None]


def test_a_worker_that_is_killed_while_its_handle_is_in_doubt_is_told() -> None:
    with torchwq.workqueue() as owner:
        workers = torchwq.map(1, jobs.fail_and_be_killed, owner)
        owner.write(1)
        death = told(lambda: owner.drain(40))
        assert death.signal == signal.SIGKILL
        assert "question 1" in str(death)
        with pytest.raises(torchwq.WorkerDied):
            workers.join(40)


def test_a_pools_task_that_fails_is_told_and_its_worker_goes_on(backend: str) -> None:
    with torchwq.workqueue() as owner, torchwq.BackgroundTaskPool(1, backend=backend) as pool:
        for way in ("argument", "with"):
            future = pool.submit(jobs.square_or_fail, owner, way)
            owner.write(2, 3)
            assert owner.read(timeout=40) == 4
            assert type(told(lambda: owner.read(timeout=40)).__cause__) is jobs.Unfit
            with pytest.raises(jobs.Unfit):
                future.result(40)
        good = pool.submit(jobs.square_or_fail, owner, "argument")
        owner.write(5, None)
        assert owner.read(timeout=40) == 25
        assert good.result(40) is None


def test_an_error_that_was_caught_is_none(backend: str) -> None:
    with torchwq.workqueue() as owner:
        workers = torchwq.map(1, jobs.fail_and_go_on, owner, backend=backend)
        assert workers.join(40) == ["went on"]
        began = time.monotonic()
        assert "no worker is left" in str(told(lambda: owner.read(timeout=40)))
        assert time.monotonic() - began < 20


@pytest.mark.parametrize("hard", [False, True])
def test_an_exit_status_is_told(hard: bool) -> None:
    with torchwq.workqueue() as owner, torchwq.workqueue() as other:
        workers = torchwq.map(1, jobs.exit_with, 3, owner, hard)
        waiting = torchwq.map(1, jobs.square_or_fail, owner, "argument")
        owner.write(1)  # whoever takes it
        death = told(lambda: [owner.write(1) for _ in iter(lambda: owner.read(timeout=40), None)])
        assert death.exitcode == 3
        owner.write(None)
        assert waiting.join(40) == [None]
        assert told(lambda: workers.join(40)).exitcode == 3
        assert other.read(True) is None


def test_an_error_of_a_process_that_a_worker_has_forked_is_told() -> None:
    with torchwq.workqueue("of forked processes") as owner:
        workers = torchwq.map(1, jobs.fail_in_a_forked_process, owner.name)
        assert owner.read(timeout=40) == "opened"
        assert type(told(lambda: owner.read(timeout=40)).__cause__) is jobs.Unfit
        assert workers.join(40) == [None]


def test_no_reader_finds_nobody_left_before_a_handle_that_an_error_has_closed_is_in_doubt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The reactor forgets the handle and notes the doubt; a reader may look in between."""
    with torchwq.workqueue() as owner:
        role: Any = owner._role
        remove = role.members.remove
        seen: list[bool] = []

        def remove_and_look(*args: Any, **kwargs: Any) -> Any:
            found = remove(*args, **kwargs)
            seen.append(role.members.nobody_left())
            seen.append(draining._Draining(role)._is_done())
            return found

        monkeypatch.setattr(role.members, "remove", remove_and_look)
        workers = torchwq.map(1, jobs.square_or_fail, owner, "with")
        owner.write(3)
        assert type(told(lambda: owner.read(timeout=40)).__cause__) is jobs.Unfit
        assert seen[:2] == [False, False]
        with pytest.raises(jobs.Unfit):
            workers.join(40)
