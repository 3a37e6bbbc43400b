"""``python -m torchwq top`` sees queues and loaders of any process of this user."""

from __future__ import annotations

import itertools
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
from tests.conftest import wait_until
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
        (row,) = wait_until(lambda: [row for row in seen(name) if row.busy == 0.0])  # it may not have noted its answer
        assert (row.kind, row.workers, row.depth) == ("queue", 1, 7)
        assert row.command
        more = torchwq.map(1, take_some, queue, 7, gate)
        assert queue.read(timeout=40) == "taken"
        (row,) = seen(name)
        assert (row.workers, row.depth) == (2, 0)
        gate.write(None, None)
        workers.join(40)
        more.join(40)
        (row,) = wait_until(lambda: [row for row in seen(name) if row.workers == 0])
        assert row.depth == 0
    assert seen(name) == []


def open_and_wait(queue: torchwq.WorkQueue, gate: torchwq.WorkQueue) -> None:
    queue.write("open")
    gate.read()


def test_what_threads_take_beside_a_process_is_not_left() -> None:
    name = "of threads and a process"
    with torchwq.workqueue(name) as queue, torchwq.workqueue() as gate:
        idle = torchwq.map(1, open_and_wait, queue, gate)
        assert queue.read(timeout=40) == "open"
        taking = torchwq.map(1, take_some, queue, 6, gate, backend="thread")
        queue.write(*range(6))
        assert queue.read(timeout=40) == "taken"
        (row,) = seen(name)
        assert (row.workers, row.depth) == (1, 0)
        gate.write(None, None)
        idle.join(40)
        taking.join(40)


def test_to_look_takes_no_memory() -> None:
    with torchwq.workqueue("of which little is used") as queue:
        role: Any = queue._role
        assert os.fstat(role.counters.fd).st_blocks == 0
        next(top.watch(0.01))
        assert os.fstat(role.counters.fd).st_blocks == 0


class Slow(Samples):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        time.sleep(index * 100.0)
        return torch.tensor(index)


def test_a_worker_that_is_at_one_batch_for_long_is_busy_and_one_that_waits_is_not() -> None:
    batches = iter(torchwq.DataLoader(Slow(), 1, num_workers=2))
    next(batches)
    looks = top.watch(0.3)
    next(looks)
    (row,) = [each for each in next(looks) if each.name == "Slow" and each.pid == os.getpid()]
    assert row.workers == 2
    assert 0.4 < row.busy < 0.6
    assert row.rate == 0.0
    for worker in batches._workers:  # type: ignore[attr-defined]
        worker.kill()
    batches._shutdown_workers()  # type: ignore[attr-defined]


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
    assert 0 <= row.depth <= 4 * 2
    list(itertools.islice(batches, 3))
    del batches
    wait_until(lambda: all(each.workers == 0 for each in seen("Samples")))


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
    row = top.Row("loader", 7, "python train.py", "Images", 2, 1, 1234.5, 0.5, 1.5)
    text = top.as_text([row])
    assert text.splitlines()[1].split() == [*top.cells(row)[:-1], "python", "train.py"]
    assert max(map(len, top.as_text([row], 30).splitlines())) == 30
    assert "no queue" in top.as_text([])


def test_odd_names_are_shown_as_they_are() -> None:
    pytest.importorskip("rich")
    from rich.console import Console

    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    row = top.Row("queue", 7, "python data=[/tmp/a,/tmp/b] [train]", "[bold]", 2, 1, 1.5, 0.5)
    console.print(top._rich_table([row]))
    console.file.close()
    text = console.export_text()
    assert "data=[/tmp/a,/tmp/b] [train]" in text
    assert "[bold]" in text


@pytest.mark.parametrize("name", ["two\nlines \x1b[31m", "ü" * 200, "\x00"])
def test_a_queue_of_any_name_has_one_line_that_can_be_printed(name: str) -> None:
    with torchwq.workqueue(name) as queue:
        worker = torchwq.map(1, open_and_wait, queue, queue)
        assert queue.read(timeout=40) == "open"
        shown = [row.name for row in next(top.watch(0.01)) if row.pid == os.getpid() and row.kind == "queue"]
        queue.write(None)
        worker.join(40)
    assert shown
    assert all(each.isprintable() and each.encode() for each in shown)


def test_an_interval_must_be_more_than_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["top", "--interval", "-1"])
    assert "more than 0" in capsys.readouterr().err


def test_without_proc_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(SystemExit, match="top needs Linux"):
        next(top.watch(0.01))
