"""BackgroundTaskPool beyond an executor: deaths, closures, tensors, worker_info, garbage pools."""

from __future__ import annotations

import concurrent.futures
import gc
import multiprocessing
import os
import signal
import threading
import time
import weakref
from typing import Any

import psutil
import pytest
import torch

import torchwq
from tests.conftest import wait_until
from tests.pool import jobs
from torchwq.workers import worker


def flags(n: int = 1) -> torch.Tensor:
    return torch.zeros(n, dtype=torch.int64).share_memory_()


# --- bad calls ---


@pytest.mark.parametrize(
    ("n", "keywords", "error"),
    [
        pytest.param(0, {}, ValueError, id="no workers"),
        pytest.param(-1, {}, ValueError, id="fewer than none"),
        pytest.param(1, {"backend": "fibre"}, ValueError, id="no such backend"),
        pytest.param(1, {"initializer": 7}, TypeError, id="initializer is no function"),
        pytest.param(
            1,
            {"initializer": jobs.take_all, "initargs": (threading.Lock(),)},
            torchwq.MarshalError,
            id="initargs that cannot travel",
        ),
    ],
)
def test_bad_calls_are_refused_by_the_constructor(n: int, keywords: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        torchwq.BackgroundTaskPool(n, **keywords)
    assert not worker.active_workers()


def test_a_closure_is_refused_by_submit() -> None:
    data = torch.ones(4)
    with torchwq.BackgroundTaskPool(1) as pool:
        with pytest.raises(torchwq.ClosureError, match="data"):
            pool.submit(lambda: data.sum())
        with pytest.raises(torchwq.MarshalError, match=r"args\[1\]"):
            pool.submit(jobs.take_all, 0, threading.Lock())
        assert not worker.active_workers()
        assert pool.submit(jobs.square, 3).result() == 9


def test_a_keyword_argument_that_cannot_travel_is_named() -> None:
    with torchwq.BackgroundTaskPool(1) as pool, pytest.raises(torchwq.MarshalError, match="model"):
        pool.submit(jobs.take_all, model=threading.Lock())


def test_upvalues_take_closures_along() -> None:
    data = torch.ones(4)
    with torchwq.BackgroundTaskPool(1, upvalues=True) as pool:
        assert pool.submit(lambda: float(data.sum())).result() == 4.0


def test_a_closure_as_initializer_is_refused() -> None:
    data = [1]
    with pytest.raises(torchwq.ClosureError, match="data"):
        torchwq.BackgroundTaskPool(1, initializer=lambda: data.append(2))


# --- results ---


def test_tensors_are_shared() -> None:
    tensor = torch.zeros(3)
    with torchwq.BackgroundTaskPool(1) as pool:
        result = pool.submit(jobs.fill, tensor, 5).result()
        assert tensor.tolist() == [5, 5, 5]
        tensor[0] = 1
        assert result.tolist() == [1, 5, 5]


def test_a_result_that_cannot_be_sent_names_the_place() -> None:
    with torchwq.BackgroundTaskPool(1) as pool:
        with pytest.raises(torchwq.MarshalError, match="lock") as caught:
            pool.submit(jobs.give_lock).result()
        assert "result['held'] cannot" in str(caught.value)
        assert pool.submit(jobs.square, 2).result() == 4


def test_a_result_that_cannot_be_read_fails_its_task_only() -> None:
    with torchwq.BackgroundTaskPool(1) as pool:
        assert isinstance(pool.submit(jobs.give_unreadable).exception(), LookupError)
        assert pool.submit(jobs.square, 2).result() == 4


# --- deaths ---


def test_a_death_fails_only_the_task_in_hand() -> None:
    gate = flags()
    with torchwq.BackgroundTaskPool(2) as pool:
        doomed, other = pool.submit(jobs.die, gate), pool.submit(jobs.gated, gate, "other")
        waiting = [pool.submit(jobs.square, number) for number in range(20)]
        gate[0] = 1
        with pytest.raises(torchwq.WorkerDied, match="memory") as caught:
            doomed.result(timeout=30)
        assert (caught.value.signal, caught.value.exitcode) == (signal.SIGKILL, -signal.SIGKILL)
        assert caught.value.pid is not None
        assert "the task die" in str(caught.value)
        assert other.result(timeout=30) == "other"
        assert [future.result(timeout=30) for future in waiting] == [n * n for n in range(20)]


def test_a_worker_that_died_is_replaced() -> None:
    with torchwq.BackgroundTaskPool(2) as pool:
        for future in [pool.submit(jobs.die) for _ in range(4)]:
            assert isinstance(future.exception(timeout=30), torchwq.WorkerDied)
        here = flags(2)
        pids = [pool.submit(jobs.meet, here, place) for place in range(2)]
        assert len({future.result(timeout=30) for future in pids}) == 2


def test_the_death_of_an_idle_worker_harms_no_task() -> None:
    with torchwq.BackgroundTaskPool(1) as pool:
        for _ in range(10):
            pid = pool.submit(os.getpid).result()
            os.kill(pid, signal.SIGKILL)
            while psutil.pid_exists(pid):  # without a pause: the pool may not have received the end event
                pass
            assert pool.submit(jobs.square, 4).result(timeout=30) == 16


@pytest.mark.parametrize("status", [0, 3])
def test_a_task_that_exits_is_a_death(status: int) -> None:
    with torchwq.BackgroundTaskPool(1) as pool:
        error = pool.submit(jobs.leave, status).exception(timeout=30)
        assert isinstance(error, torchwq.WorkerDied)
        assert (error.exitcode, error.signal) == (status, None)
        assert pool.submit(jobs.square, 4).result(timeout=30) == 16


# --- the initializer ---


def test_the_initializer_runs_once_in_each_worker() -> None:
    runs, here = flags(2), flags(2)
    with torchwq.BackgroundTaskPool(2, initializer=jobs.set_up, initargs=(runs, "set up")) as pool:
        for future in [pool.submit(jobs.meet, here, place) for place in range(2)]:
            future.result(timeout=30)
        assert {pool.submit(jobs.state).result() for _ in range(10)} == {"set up"}
    assert runs.tolist() == [1, 1]


def test_the_initializer_runs_in_a_replacement() -> None:
    runs = flags(1)
    with torchwq.BackgroundTaskPool(1, initializer=jobs.set_up, initargs=(runs, "set up")) as pool:
        assert pool.submit(jobs.die).exception(timeout=30) is not None
        assert pool.submit(jobs.state).result(timeout=30) == "set up"
    assert runs.tolist() == [2]


def test_without_an_initializer_workers_are_as_imported() -> None:
    with torchwq.BackgroundTaskPool(1) as pool:
        assert pool.submit(jobs.state).result() == "as imported"


@pytest.mark.parametrize(
    ("initializer", "cause"), [(jobs.fail_to_set_up, LookupError), (jobs.die_in_set_up, torchwq.WorkerDied)]
)
def test_an_initializer_that_fails_breaks_the_pool(initializer: Any, cause: type[Exception]) -> None:
    with torchwq.BackgroundTaskPool(2, initializer=initializer) as pool:
        futures = [pool.submit(jobs.square, number) for number in range(3)]
        for future in futures:
            error = future.exception(timeout=30)
            assert isinstance(error, concurrent.futures.BrokenExecutor)
            assert isinstance(error.__cause__, cause)
        with pytest.raises(concurrent.futures.BrokenExecutor):
            pool.submit(jobs.square, 1)
        assert "broken" in repr(pool)


# --- worker_info ---


def test_worker_info() -> None:
    here = flags(3)
    with torchwq.BackgroundTaskPool(3) as pool:
        tasks = [pool.submit(jobs.info_and_meet, here, place) for place in range(3)]
        infos = [task.result(timeout=30) for task in tasks]
    assert sorted(info.mapid for info in infos) == [0, 1, 2]
    assert {info.num_workers for info in infos} == {3}
    assert len({info.seed for info in infos}) == 3


def test_workers_start_when_tasks_need_them() -> None:
    gate, started = flags(), flags()
    with torchwq.BackgroundTaskPool(8) as pool:
        assert not worker.active_workers()
        future = pool.submit(jobs.gated, gate, "done", started)
        wait_until(lambda: bool(started[0]))
        assert len(worker.active_workers()) == 1
        gate[0] = 1
        assert future.result() == "done"


def test_a_pool_in_a_workers_task() -> None:
    with torchwq.BackgroundTaskPool(2) as pool:
        assert list(pool.map(jobs.square_in_a_pool, range(3))) == [0, 1, 4]


def test_all_workers_start_for_as_many_tasks() -> None:
    gate, started = flags(), flags()
    with torchwq.BackgroundTaskPool(2) as pool:
        first = pool.submit(jobs.gated, gate, "first", started)
        wait_until(lambda: len(worker.active_workers()) == 1)
        second = pool.submit(jobs.gated, gate, "second", started)
        wait_until(lambda: int(started[0]) == 2)
        gate[0] = 1
        assert (first.result(), second.result()) == ("first", "second")


@pytest.mark.parametrize("backend", ["process", "thread"])
def test_a_worker_may_take_the_tasks_for_which_others_are_starting(backend: str) -> None:
    with torchwq.BackgroundTaskPool(8, backend=backend, initializer=time.sleep, initargs=(0.3,)) as pool:
        assert pool.submit(jobs.square, 2).result(timeout=30) == 4
        futures = [pool.submit(jobs.square, number) for number in range(5)]
        assert [future.result(timeout=30) for future in futures] == [0, 1, 4, 9, 16]
        assert len(worker.active_workers()) <= 6


def test_a_forked_process_ends_while_the_pool_works() -> None:
    gate = flags()
    with torchwq.BackgroundTaskPool(1) as pool:
        future = pool.submit(jobs.gated, gate)
        child = multiprocessing.get_context("fork").Process(target=abs, args=(1,))
        child.start()
        child.join(10)
        exitcode = child.exitcode
        child.kill()
        child.join()
        gate[0] = 1
        assert exitcode == 0
        assert future.result(timeout=30) == "done"


@pytest.mark.parametrize("backend", ["process", "thread"])
def test_the_child_of_a_fork_has_no_pool_and_does_not_wait_for_its_lock(backend: str) -> None:
    with torchwq.BackgroundTaskPool(1, backend=backend) as pool:
        assert pool.submit(jobs.square, 2).result(timeout=30) == 4
        is_held, can_go_on = threading.Event(), threading.Event()

        def hold() -> None:
            with pool._pool.lock:
                is_held.set()
                can_go_on.wait(30)

        holder = threading.Thread(target=hold)
        holder.start()
        assert is_held.wait(30)

        def use_in_child() -> None:
            with pytest.raises(concurrent.futures.BrokenExecutor, match="forked"):
                pool.submit(jobs.square, 3)
            pool.shutdown()

        child = multiprocessing.get_context("fork").Process(target=use_in_child)
        child.start()
        child.join(10)
        exitcode = child.exitcode
        child.kill()
        child.join()
        can_go_on.set()
        holder.join(30)
        assert exitcode == 0
        assert pool.submit(jobs.square, 3).result(timeout=30) == 9


# --- a pool that is dropped ---


def test_a_dropped_pool_finishes_what_it_has_and_ends() -> None:
    gate = flags()
    pool = torchwq.BackgroundTaskPool(1)
    futures = [pool.submit(jobs.gated, gate, number) for number in range(3)]
    del pool
    gc.collect()
    gate[0] = 1
    assert [future.result(timeout=30) for future in futures] == [0, 1, 2]
    wait_until(lambda: not worker.active_workers(), what="the end of the workers")


def test_a_dropped_pool_that_was_never_used_ends() -> None:
    pool = torchwq.BackgroundTaskPool(2)
    del pool
    gc.collect()
    wait_until(lambda: not [t for t in threading.enumerate() if t.name == "torchwq-pool"])


def test_a_pool_in_a_cycle_ends() -> None:
    pool: Any = torchwq.BackgroundTaskPool(1)
    assert pool.submit(jobs.square, 2).result() == 4
    pool.itself = pool
    del pool
    gc.collect()
    wait_until(lambda: not worker.active_workers(), what="the end of the workers")


@pytest.mark.parametrize("backend", ["process", "thread"])
def test_results_do_not_stay_alive(backend: str) -> None:
    with torchwq.BackgroundTaskPool(1, backend=backend) as pool:
        result = weakref.ref(pool.submit(jobs.fill, torch.zeros(3), 1).result())
        pool.submit(jobs.square, 2).result()
        wait_until(lambda: gc.collect() >= 0 and result() is None)


def test_nothing_stays_alive_with_an_idle_thread() -> None:
    tensor = torch.zeros(3)
    argument = weakref.ref(tensor)
    with torchwq.BackgroundTaskPool(1, backend="thread") as pool:
        pool.submit(jobs.fill, tensor, 1).result(timeout=30)
        del tensor
        wait_until(lambda: gc.collect() >= 0 and argument() is None)
        pool.submit(jobs.give_watched).result(timeout=30)
        wait_until(lambda: gc.collect() >= 0 and jobs.watched[-1]() is None)


def test_repr() -> None:
    gate = flags()
    pool = torchwq.BackgroundTaskPool(1)
    first = pool.submit(jobs.gated, gate)
    wait_until(first.running)
    pool.submit(jobs.square, 2)
    assert "1 workers, open, 1 tasks waiting" in repr(pool)
    gate[0] = 1
    pool.shutdown()
    assert "shut down" in repr(pool)
