"""Errors and warnings say what was waited for, what was meant, and where."""

from __future__ import annotations

import os
import queue
import signal
import time
import warnings
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

import torchwq


class Stuck(Dataset[torch.Tensor]):
    """Does not come back from index 3; or its first worker dies there."""

    def __init__(self, dies: bool) -> None:
        self.dies = dies
        self.flag = torch.zeros(1).share_memory_()

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 3 and not self.flag:
            if self.dies:
                self.flag[0] = 1
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(1000)
        return torch.tensor(index)


def test_what_was_waited_for() -> None:
    with torchwq.workqueue() as q:
        q.write(1, 2)
        with pytest.raises(queue.Empty, match=r"no answer \(2 questions written, 2 not taken yet, 0 .*0\.01 s"):
            q.read(timeout=0.01)
    with pytest.raises(queue.Empty, match=r"no item came within 0\.01 s"):
        torchwq.channel().read(timeout=0.01)


def test_misplaced_arguments() -> None:
    call: Any = torchwq.map
    with pytest.raises(TypeError, match=r"must be an integer, not builtin.*torchwq\.map\(number, function, \*args\)"):
        call(len, 2)
    with pytest.raises(TypeError, match=r"must be an integer, not str: torchwq\.BackgroundTaskPool\(number\)"):
        torchwq.BackgroundTaskPool("2")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="capacity=16"):
        torchwq.workqueue("n", 16)  # type: ignore[arg-type]


def test_a_pool_has_as_many_workers_as_cores() -> None:
    with torchwq.BackgroundTaskPool() as pool:
        assert f"of {len(os.sched_getaffinity(0))} workers" in repr(pool)


def test_a_loader_that_times_out_names_the_worker_and_its_indices() -> None:
    loader = torchwq.DataLoader(Stuck(dies=False), batch_size=2, num_workers=2, timeout=1)
    with pytest.raises(RuntimeError, match=r"timed out after 1 seconds: worker 1 \(pid \d+\) .*\[2, 3\]"):
        list(loader)


@pytest.mark.parametrize("loop", ["for", "next", "list"])
def test_the_warning_of_a_restart_points_at_the_loop(loop: str) -> None:
    loader = torchwq.DataLoader(Stuck(dies=True), batch_size=2, num_workers=2, on_worker_death="restart")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if loop == "for":
            for _ in loader:
                pass
        elif loop == "next":
            batches = iter(loader)
            for _ in range(4):
                next(batches)
        else:
            list(loader)
    (warning,) = [each for each in caught if "restarted" in str(each.message)]
    assert warning.filename == __file__


def test_select_takes_a_list() -> None:
    with torchwq.workqueue() as queue, pytest.raises(TypeError, match=r"select takes a list: select\(\[workqueue"):
        torchwq.select(queue, timeout=1)  # type: ignore[arg-type]


def test_seconds_in_the_place_of_nonblocking() -> None:
    with torchwq.workqueue() as queue, pytest.raises(TypeError, match=r"say read\(timeout=0.5\)"):
        queue.read(0.5)  # type: ignore[arg-type]
    with torchwq.channel() as channel, pytest.raises(TypeError, match=r"say read\(timeout=2\)"):
        channel.read(2)  # type: ignore[arg-type]


def test_capacities_are_numbers() -> None:
    with pytest.raises(TypeError, match="a channel has no name"):
        torchwq.channel("name")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"capacity must be a number.*not str"):
        torchwq.workqueue(capacity="16")  # type: ignore[arg-type]


def test_a_number_of_workers_is_whole() -> None:
    with pytest.raises(TypeError, match=r"num_workers must be a whole number or 'auto', not 2\.0"):
        torchwq.DataLoader([1, 2, 3], num_workers=2.0)  # type: ignore[arg-type,call-overload]
