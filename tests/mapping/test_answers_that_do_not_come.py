"""A worker ends without an answer, or with one that does not fit: the call that waits says so, and nothing hangs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

import torchwq

Run = Callable[..., subprocess.CompletedProcess[str]]


def leave(status: int) -> None:
    os._exit(status)


def leave_items(status: int) -> object:
    yield 1
    os._exit(status)


def test_os_exit_is_no_answer() -> None:
    workers = torchwq.map(2, leave, 0)
    with pytest.raises(torchwq.WorkerDied, match="ended before it had answered") as caught:
        workers.join(40)
    assert caught.value.exitcode == 0
    with pytest.raises(torchwq.WorkerDied, match="ended before it had answered"):
        torchwq.BackgroundTask(leave, 0).result(40)
    items = torchwq.BackgroundTask(leave_items, 0)
    assert next(items) == 1
    with pytest.raises(torchwq.WorkerDied, match="ended before it had answered"):
        next(items)
    with torchwq.BackgroundTaskPool(1) as pool:
        with pytest.raises(torchwq.WorkerDied, match="ended before it had answered"):
            pool.submit(leave, 0).result(40)
        assert pool.submit(len, "abc").result(40) == 3


def test_sys_exit_with_0_is_the_answer_none() -> None:
    assert torchwq.map(2, sys.exit, 0).join(40) == [None, None]
    assert torchwq.BackgroundTask(sys.exit, 0).result(40) is None


#: The owner may have fewer descriptors than an answer brings.
TOO_MANY = """
    import os, resource, sys
    import torch, torchwq

    def tensors(number):
        return [torch.full((64,), each, dtype=torch.float32) for each in range(number)]

    def produce(number):
        for _ in range(3):
            yield tensors(number)
        return "over"

    def outcome(call):
        try:
            value = call()
        except torchwq.ResourceError:
            return "refused"
        if not isinstance(value, list):
            return value
        return "right" if [int(each[-1]) for each in value] == list(range(len(value))) else value

    torchwq.warm_up()
    number = int(sys.argv[1])
    soft = len(os.listdir("/proc/self/fd"))
    workers = torchwq.map(1, tensors, number)
    task = torchwq.BackgroundTask(tensors, number)
    items = torchwq.BackgroundTask(produce, number)
    pool = torchwq.BackgroundTaskPool(1)
    pool.submit(len, "").result()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft + 60, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    print("map", outcome(lambda: workers.join()[0]))
    print("task", outcome(task.result))
    print("pool", outcome(pool.submit(tensors, number).result))
    print("later", outcome(pool.submit(len, "abc").result))
    print("item", outcome(lambda: next(items)))
    try:
        rest = list(items)
    except torchwq.ResourceError:
        rest = "refused"
    print("over")
    pool.shutdown()
"""


@pytest.mark.timeout(150)
@pytest.mark.parametrize("number", ["100", "400"])
def test_an_answer_with_too_many_descriptors_is_right_or_refused(run_script: Run, number: str) -> None:
    done = run_script(TOO_MANY, number, timeout=140)
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines()[:-1])
    assert done.stdout.splitlines()[-1] == "over"
    assert lines.pop("later") == "3"
    assert set(lines) == {"map", "task", "pool", "item"}
    assert set(lines.values()) <= {"right", "refused"}, lines
    # A copy of what was shared is told, once.
    assert done.stderr == "" or "Further tensors are copied instead of shared" in done.stderr
    assert "Traceback" not in done.stderr
