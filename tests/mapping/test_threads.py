"""``backend="thread"`` for map, BackgroundTask and BackgroundTaskPool: the contract is that of processes."""

from __future__ import annotations

import concurrent.futures
import gc
import sys
import threading
import time
import warnings
from typing import Any

import pytest
import torch

import torchwq
from tests.conftest import wait_until


def square(x: Any, mapid: int) -> Any:
    return x * mapid


def info() -> torchwq.WorkerInfo | None:
    return torchwq.worker_info()


def change(data: dict[str, Any]) -> dict[str, Any]:
    data["list"].append("changed")
    data["tensor"] += 1
    return data


def fail(text: str, mapid: int) -> None:
    if mapid:
        raise ValueError(f"{text} {mapid}")


def leave(code: Any) -> None:
    sys.exit(code)


def numbers(n: int) -> Any:
    for number in range(n):
        yield torch.full((2,), number)
    return "returned"


def bad_numbers() -> Any:
    yield 1
    raise KeyError("at the second")


class Local:
    """Goes by name: this module can be imported."""


def test_map_returns_in_order_and_passes_mapid() -> None:
    workers = torchwq.map(5, square, 3, backend="thread")
    assert workers.join(20) == [0, 3, 6, 9, 12]
    assert workers.pids == [None] * 5
    assert len(workers) == 5


def test_a_thousand_workers_start_and_end() -> None:
    before = threading.active_count()
    assert sum(torchwq.map(1_000, square, 1, backend="thread").join(60)) == 499_500
    wait_until(lambda: threading.active_count() <= before)


def test_arguments_and_results_are_copies_but_for_tensors() -> None:
    data = {"list": [1], "tensor": torch.zeros(2)}
    (result,) = torchwq.map(1, change, data, backend="thread").join(20)
    assert data["list"] == [1]
    assert result["list"] == [1, "changed"]
    assert result["tensor"].data_ptr() == data["tensor"].data_ptr()  # type: ignore[attr-defined]
    assert data["tensor"].tolist() == [1.0, 1.0]  # type: ignore[attr-defined]
    assert not data["tensor"].is_shared()  # type: ignore[attr-defined]


def test_errors_keep_their_type_and_traceback() -> None:
    workers = torchwq.map(3, fail, "number", backend="thread")
    with pytest.raises(ValueError, match="number 1") as caught:
        workers.join(20)
    assert "worker 2 failed as well" in str(caught.value.__notes__)
    assert any(entry.name == "fail" for entry in caught.traceback)
    workers = torchwq.map(2, fail, "number", backend="thread")
    while True:
        try:
            workers.check_errors()
        except ValueError:
            break
    assert workers.join(20) == [None]


def test_sys_exit_ends_a_worker_as_it_ends_a_process() -> None:
    with pytest.raises(torchwq.WorkerDied, match="exit status 3") as caught:
        torchwq.map(1, leave, 3, backend="thread").join(20)
    assert caught.value.exitcode == 3
    assert torchwq.map(1, leave, 0, backend="thread").join(20) == [None]


def test_closures_are_refused_in_the_same_way() -> None:
    captured = [1]
    with pytest.raises(torchwq.ClosureError, match="captured"):
        torchwq.map(1, lambda: captured, backend="thread")
    assert torchwq.map(1, lambda: captured, backend="thread", upvalues=True).join(20) == [[1]]
    with pytest.raises(torchwq.MarshalError, match=r"args\[0\]"):
        torchwq.map(1, square, threading.Lock(), backend="thread")
    with pytest.raises(ValueError, match="'process', 'thread' or 'ray'"):
        torchwq.map(1, square, 1, backend="fiber")


def test_classes_that_go_by_value_stay_themselves(run_script: Any) -> None:
    done = run_script(
        """
        import torchwq

        class Point:
            count = 0
            def __init__(self, x):
                self.x = x

        def moved(point):
            point.x += 1
            return point, type(point)

        point = Point(1)
        worker = torchwq.map(1, moved, point, backend="thread")
        Point.count = 5
        (other, cls), = worker.join()
        print(other.x, point.x, cls is Point, Point.count)
        """
    )
    assert done.stdout == "2 1 True 5\n"


def test_worker_info_and_threads_of_torch() -> None:
    before = torch.get_num_threads()
    assert torchwq.worker_info() is None
    infos = torchwq.map(3, info, backend="thread").join(20)
    assert [each.mapid for each in infos] == [0, 1, 2]
    assert {each.num_workers for each in infos} == {3}
    assert len({each.seed for each in infos}) == 3
    assert torch.get_num_threads() == before


def test_maps_within_maps() -> None:
    assert torchwq.map(2, nested, "process", backend="thread").join(60) == [[0, 1], [0, 1]]
    assert torchwq.map(2, nested, "thread").join(60) == [[0, 1], [0, 1]]


def nested(backend: str) -> list[Any]:
    return torchwq.map(2, square, 1, backend=backend).join(30)


def test_a_background_task_is_a_future_and_an_iterator() -> None:
    task = torchwq.BackgroundTask(square, 3, 4, backend="thread")
    assert task.result(20) == 12
    items = torchwq.BackgroundTask(numbers, 4, prefetch=2, backend="thread")
    assert [item.tolist() for item in items] == [[n, n] for n in range(4)]
    assert items.result(20) == "returned"
    data = [1, 2, 3]
    assert list(torchwq.BackgroundTask(data, backend="thread")) == data
    failing = torchwq.BackgroundTask(bad_numbers, backend="thread")
    assert next(failing) == 1
    with pytest.raises(KeyError, match="at the second"):
        next(failing)


def test_a_producer_stops_when_its_consumer_leaves() -> None:
    for _ in torchwq.BackgroundTask(numbers, 1_000_000, backend="thread"):
        break
    task = torchwq.BackgroundTask(numbers, 1_000_000, backend="thread")
    next(task)
    del task
    gc.collect()


def test_a_pool_of_threads() -> None:
    with torchwq.BackgroundTaskPool(3, backend="thread", initializer=square, initargs=(1, 2)) as pool:
        futures = [pool.submit(square, n, n) for n in range(20)]
        assert [f.result(20) for f in concurrent.futures.as_completed(futures)] != []
        assert list(pool.map(square, range(5), [2] * 5)) == [0, 2, 4, 6, 8]
        with pytest.raises(ValueError, match="x 1"):
            pool.submit(fail, "x", 1).result(20)
        with pytest.raises(torchwq.WorkerDied):
            pool.submit(leave, 3).result(20)
        assert pool.submit(square, 2, 3).result(20) == 6
        with pytest.raises(torchwq.ClosureError):
            pool.submit(lambda: futures)
    with (
        torchwq.BackgroundTaskPool(1, backend="thread", initializer=leave, initargs=(1,)) as pool,
        pytest.raises(concurrent.futures.BrokenExecutor),
    ):
        pool.submit(square, 1, 1).result(20)


@pytest.mark.parametrize("work", ["compute", "sleep", "read", "load"])
def test_a_program_ends_while_its_threads_work(run_script: Any, work: str) -> None:
    started = time.monotonic()
    done = run_script(
        """
        import sys, time, torch, torchwq
        from torch.utils.data import TensorDataset

        def compute():
            x = torch.ones(200, 200)
            while True:
                x = (x @ x).clamp(0, 1)

        def sleep():
            time.sleep(1000)

        def read(q):
            q.read()

        work = sys.argv[1]
        if work == "load":
            data = torchwq.DataLoader(TensorDataset(torch.zeros(10_000, 100)), num_workers=2, backend="thread")
            iterator = iter(data)
            next(iterator)
        else:
            q = torchwq.workqueue()
            args = [q] if work == "read" else []
            workers = torchwq.map(3, {"compute": compute, "sleep": sleep, "read": read}[work], *args, backend="thread")
            time.sleep(0.3)
        print("end")
        sys.exit(3)
        """,
        work,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "end\n", "")
    assert time.monotonic() - started < 20


def test_nothing_is_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torchwq.map(2, square, torch.zeros(2), backend="thread").join(20)
