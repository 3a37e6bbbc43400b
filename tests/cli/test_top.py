"""``python -m torchwq top`` sees queues and loaders of any process of this user."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import torchwq
from torchwq.cli import top
from torchwq.cli.main import main

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="top finds queues and loaders in /proc")


class Samples(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 4000

    def __getitem__(self, index: int) -> Any:
        time.sleep(0.002)
        return torch.tensor(index)


def take_some(queue: torchwq.WorkQueue, count: int, gate: torchwq.WorkQueue) -> None:
    for _ in range(count):
        queue.read()
    queue.write("taken")
    gate.read()


def seen(name: str, pid: int | None = None) -> list[top.Row]:
    rows = next(top.watch(0.05))
    return [row for row in rows if row.name == name and row.pid == (pid or os.getpid())]


def test_a_queue_is_shown_with_what_was_not_taken() -> None:
    name = "of top, with / and ü"
    with torchwq.workqueue(name) as queue, torchwq.workqueue() as gate:
        workers = torchwq.map(1, take_some, queue, 3, gate)
        queue.write(*range(10))
        assert queue.read(timeout=40) == "taken"
        (row,) = seen(name)
        assert (row.kind, row.workers, row.depth, row.busy) == ("queue", 1, 7, 0.0)
        assert row.command
        more = torchwq.map(1, take_some, queue, 7, gate)
        assert queue.read(timeout=40) == "taken"
        (row,) = seen(name)
        assert (row.workers, row.depth) == (2, 0)
        gate.write(None, None)
        workers.join(40)
        more.join(40)
        (row,) = seen(name)
        assert (row.workers, row.depth) == (0, 0)
    assert seen(name) == []


def test_a_loader_is_shown_with_its_rate_and_its_workers(backend: str) -> None:
    batches = iter(torchwq.DataLoader(Samples(), 4, num_workers=2, backend=backend))
    next(batches)
    looks = top.watch(0.2)
    rate = 0.0
    until = time.monotonic() + 30
    row = None
    while rate == 0.0 and time.monotonic() < until:
        for _ in range(20):
            next(batches)
        row = next(each for each in next(looks) if each.name == "Samples" and each.pid == os.getpid())
        rate = row.rate
    assert row is not None
    assert row.kind == "loader"
    assert row.workers == 2
    assert rate > 0
    assert 0 < row.busy <= 1
    assert 0 <= row.waiting <= 1
    assert 0 <= row.depth <= 4 * 2


@pytest.fixture
def other() -> Iterator[subprocess.Popen[str]]:
    program = """
import torchwq, sys
def work(queue):
    for question in queue:
        queue.write(question)
with torchwq.workqueue("of another program") as queue:
    workers = torchwq.map(1, work, queue)
    queue.write(1)
    print(queue.read(), flush=True)
    sys.stdin.readline()
    queue.write(None)
    workers.join()
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        assert started.stdout.readline() == "1\n"
        yield started
        started.communicate("\n", timeout=40)
    assert started.returncode == 0


def test_those_of_other_programs_are_shown_too(
    other: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = seen("of another program", other.pid)
    assert "torchwq" in row.command
    assert main(["top", "--json", "--interval", "0.05"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["pid"] for each in found if each["name"] == "of another program"] == [other.pid]
    assert main(["top", "--once", "--interval", "0.05"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["pid", "what", "name", "workers"]
    assert any(str(other.pid) in line and "of another program" in line for line in lines)


def test_a_table_fits_its_width_and_says_if_there_is_nothing() -> None:
    row = top.Row("loader", 7, "python train.py", "Images", 2, 1, 1234.5, 0.5, 0.25, 0.2, 1.5)
    text = top.as_text([row])
    assert text.splitlines()[1].split() == [*top.cells(row)[:-1], "python", "train.py"]
    assert max(map(len, top.as_text([row], 30).splitlines())) == 30
    assert "no queue" in top.as_text([])


def test_without_proc_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(SystemExit, match="top needs Linux"):
        next(top.watch(0.01))
