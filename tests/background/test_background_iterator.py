"""A BackgroundTask over an iterator produces items ahead: how far, in which order, and how it ends."""

from __future__ import annotations

import gc
import os
import signal
from typing import Any

import psutil
import pytest
import torch

import torchwq
from tests.background import jobs
from tests.conftest import wait_until
from torchwq.workers import worker


def flags(n: int = 2) -> torch.Tensor:
    return torch.zeros(n, dtype=torch.int64).share_memory_()


# --- sources of items ---


@pytest.mark.parametrize(
    ("f", "args", "items", "length"),
    [
        pytest.param(jobs.count, (5,), [0, 1, 2, 3, 4], None, id="generator function"),
        pytest.param(jobs.count, (0,), [], None, id="no items"),
        pytest.param(jobs.give_iterator, (4,), [0, 1, 2, 3], None, id="function that returns an iterator"),
        pytest.param(jobs.give_map, (3,), ["0", "1", "2"], None, id="function that returns a map"),
        pytest.param([1, "b", None], (), [1, "b", None], 3, id="list"),
        pytest.param(range(3), (), [0, 1, 2], 3, id="range"),
        pytest.param("abc", (), ["a", "b", "c"], 3, id="string"),
        pytest.param({"x": 1, "y": 2}, (), ["x", "y"], 2, id="dict"),
        pytest.param(iter([7, 8]), (), [7, 8], None, id="iterator"),
        pytest.param(jobs.Countdown(3), (), [2, 1, 0], None, id="iterator object"),
        pytest.param(jobs.Bag("a", "b"), (), ["a", "b"], 2, id="iterable object"),
        pytest.param(jobs.OldStyle(), (), [0, 3, 6, 9], None, id="old protocol"),
        pytest.param(jobs.Squares(4), (), [0, 1, 4, 9], None, id="iterable dataset"),
        pytest.param(jobs.SizedSquares(4), (), [0, 1, 4, 9], 4, id="iterable dataset with a length"),
        pytest.param(jobs.Letters("abc"), (), ["a", "b", "c"], 3, id="map-style dataset"),
    ],
)
def test_items_in_order(f: Any, args: Any, items: list[Any], length: int | None) -> None:
    task = torchwq.BackgroundTask(f, *args)
    if length is None:
        with pytest.raises(TypeError, match="no length"):
            len(task)
    else:
        assert len(task) == length
    assert bool(task)
    assert list(task) == items
    assert list(task) == []  # exhausted stays exhausted
    with pytest.raises(StopIteration):
        next(task)
    assert task.result(timeout=30) is None


def test_next_without_a_loop() -> None:
    task = torchwq.BackgroundTask(jobs.count, 2)
    assert [next(task), next(task)] == [0, 1]
    for _ in range(3):
        with pytest.raises(StopIteration):
            next(task)


def test_the_result_is_what_the_generator_returned() -> None:
    task = torchwq.BackgroundTask(jobs.count, 3, {"loss": 0.5})
    with pytest.raises(TimeoutError):
        task.result(timeout=0.02)
    assert list(task) == [0, 1, 2]
    assert task.result(timeout=30) == {"loss": 0.5}
    assert task.done()


def test_tensors_in_items_are_shared() -> None:
    gate = flags(1)
    task = torchwq.BackgroundTask(jobs.hand_over, gate, prefetch=1)
    next(task)["batch"][0].fill_(7)
    gate[0] = 1
    assert next(task) == [7.0] * 4


@pytest.mark.parametrize("prefetch", [1, 2, 7])
def test_many_items_in_order(prefetch: int) -> None:
    assert list(torchwq.BackgroundTask(jobs.count, 3000, prefetch=prefetch)) == list(range(3000))


def test_two_tasks_at_once() -> None:
    pairs = zip(torchwq.BackgroundTask(jobs.count, 50), torchwq.BackgroundTask(jobs.Squares(50)), strict=True)
    assert list(pairs) == [(number, number * number) for number in range(50)]


def test_a_queue_feeds_a_producer() -> None:
    with torchwq.workqueue() as queue:
        task = torchwq.BackgroundTask(jobs.read_and_double, queue)
        queue.write(1, 2, 3, None)
        assert list(task) == [2, 4, 6]


def test_a_producer_has_a_producer() -> None:
    assert list(torchwq.BackgroundTask(jobs.nested_producer, 5)) == [100, 101, 102, 103, 104]


# --- how far ahead ---


@pytest.mark.parametrize("prefetch", [1, 2, 5])
def test_exactly_prefetch_items_are_made_ahead(prefetch: int) -> None:
    made = flags()
    task = torchwq.BackgroundTask(jobs.counted, 100, made, prefetch=prefetch)
    for taken in range(10):
        wait_until(lambda wanted=taken + prefetch: int(made[0]) == wanted, what="the items ahead")
        assert next(task) == taken
    wait_until(lambda: int(made[0]) == 10 + prefetch)
    # The producer uses all credits that it had before it was closed: more credits would show as more items
    task.close()
    wait_until(lambda: int(made[1]) == 1, what="the end of the producer")
    assert int(made[0]) == 10 + prefetch


@pytest.mark.parametrize("prefetch", [1, 3])
def test_never_more_than_prefetch_items_are_made_ahead(prefetch: int) -> None:
    taken, ahead = flags(1), flags(1)
    task = torchwq.BackgroundTask(jobs.most_ahead, 500, taken, ahead, prefetch=prefetch)
    for expected in range(500):
        taken[0] = expected + 1  # from here on, the producer may know of it
        assert next(task) == expected
    assert list(task) == []
    assert int(ahead[0]) <= prefetch


def test_two_items_ahead_unless_told() -> None:
    made = flags()
    task = torchwq.BackgroundTask(jobs.counted, 100, made)
    wait_until(lambda: int(made[0]) == 2)
    task.close()
    wait_until(lambda: int(made[1]) == 1)
    assert int(made[0]) == 2


# --- errors, at their place ---


@pytest.mark.parametrize("prefetch", [1, 2, 10])
def test_an_error_comes_after_the_items_before_it(prefetch: int) -> None:
    task = torchwq.BackgroundTask(jobs.fail_at, 3, prefetch=prefetch)
    assert [next(task), next(task), next(task)] == [0, 1, 2]
    with pytest.raises(ZeroDivisionError, match="at item 3") as caught:
        next(task)
    assert "fail_at" in str(caught.value.__cause__)
    assert list(task) == []
    with pytest.raises(ZeroDivisionError):
        task.result(timeout=30)


def test_an_error_in_a_dataset() -> None:
    task = torchwq.BackgroundTask(jobs.Letters("abcde", bad=2), prefetch=4)
    seen: list[Any] = []
    with pytest.raises(LookupError, match="letter 2"):
        seen.extend(task)
    assert seen == ["a", "b"]


def test_an_error_before_the_first_item() -> None:
    task = torchwq.BackgroundTask(jobs.fail_before_the_first)
    with pytest.raises(LookupError, match="no items at all"):
        list(task)
    assert list(task) == []
    assert isinstance(task.exception(timeout=30), LookupError)


def test_an_item_that_cannot_be_sent_is_an_error_at_its_place() -> None:
    task = torchwq.BackgroundTask(jobs.unpicklable_at, 2, prefetch=5)
    assert [next(task), next(task)] == [0, 1]
    with pytest.raises(torchwq.MarshalError, match=r"\['held'\]"):
        next(task)
    assert list(task) == []
    assert isinstance(task.exception(timeout=30), torchwq.MarshalError)


@pytest.mark.parametrize("prefetch", [1, 2, 10])
def test_a_death_comes_after_the_items_before_it(prefetch: int) -> None:
    task = torchwq.BackgroundTask(jobs.die_at, 3, prefetch=prefetch)
    assert [next(task), next(task), next(task)] == [0, 1, 2]
    with pytest.raises(torchwq.WorkerDied) as caught:
        next(task)
    assert caught.value.signal == signal.SIGKILL
    assert caught.value.pid is not None
    assert list(task) == []
    assert isinstance(task.exception(timeout=30), torchwq.WorkerDied)


def test_a_producer_that_is_killed_while_it_waits() -> None:
    made = flags()
    task = torchwq.BackgroundTask(jobs.counted_with_pid, 100, made, prefetch=3)
    wait_until(lambda: int(made[0]) == 3)
    os.kill(int(made[1]), signal.SIGKILL)
    seen: list[Any] = []
    with pytest.raises(torchwq.WorkerDied) as caught:
        seen.extend(task)
    # The last may have been on its way
    assert seen in ([0, 1], [0, 1, 2])
    assert caught.value.pid == int(made[1])


@pytest.mark.parametrize("status", [0, 3])
def test_a_producer_that_leaves_without_a_word(status: int) -> None:
    task = torchwq.BackgroundTask(jobs.exit_at, 1, status)
    assert next(task) == 0
    with pytest.raises(torchwq.WorkerDied) as caught:
        next(task)
    assert caught.value.exitcode == status


# --- leaving early ---


def test_leaving_the_loop_stops_the_producer() -> None:
    made = flags()
    for item in torchwq.BackgroundTask(jobs.counted, 1000, made):
        if item == 3:
            break
    wait_until(lambda: int(made[1]) == 1, what="the producer's finally block")
    wait_until(lambda: not worker.active_workers(), 2.0, "the end of its process")
    assert int(made[0]) <= 6


def test_an_error_in_the_loop_stops_the_producer() -> None:
    made = flags()
    task = torchwq.BackgroundTask(jobs.counted, 1000, made)
    with pytest.raises(ZeroDivisionError):
        sum(1 / item for item in task)
    wait_until(lambda: int(made[1]) == 1, what="the producer's finally block")
    assert list(task) == []
    assert task.result(timeout=30) is None


def test_close_stops_the_producer() -> None:
    made = flags()
    task = torchwq.BackgroundTask(jobs.counted, 1000, made)
    assert next(task) == 0
    task.close()
    task.close()
    assert list(task) == []
    assert task.result(timeout=30) is None
    assert int(made[1]) == 1


def test_dropping_the_task_stops_the_producer() -> None:
    made = flags()
    task = torchwq.BackgroundTask(jobs.counted, 1000, made)
    assert next(task) == 0
    del task
    gc.collect()
    wait_until(lambda: int(made[1]) == 1, what="the producer's finally block")
    wait_until(lambda: not worker.active_workers(), 2.0, "the end of its process")


def test_dropping_a_task_that_nobody_looked_at_stops_the_producer() -> None:
    made = flags()
    torchwq.BackgroundTask(jobs.counted, 1000, made)
    gc.collect()
    wait_until(lambda: int(made[1]) == 1, what="the producer's finally block")


@pytest.mark.timeout(60)
def test_a_producer_that_is_stuck_is_ended() -> None:
    gate, made = flags(1), flags()
    task = torchwq.BackgroundTask(jobs.stuck_at, 1, gate, made)
    assert next(task) == 0
    wait_until(lambda: int(made[0]) == 2)
    task.close()
    wait_until(lambda: not psutil.pid_exists(int(made[1])), 10.0, "the end of the process")
    assert task.exception(timeout=30) is None  # its consumer left: no error of anybody
