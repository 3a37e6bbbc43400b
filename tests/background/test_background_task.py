"""A BackgroundTask that runs a function is a concurrent.futures.Future in every respect."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import multiprocessing
import os
import signal
import threading
from typing import Any

import pytest
import torch

import torchwq
from tests.background import jobs
from tests.conftest import wait_until
from tests.interpreter import Interpreter
from tests.mapping.programs import Program
from torchwq import background
from torchwq.workers import worker


def flags(n: int = 1) -> torch.Tensor:
    return torch.zeros(n, dtype=torch.int64).share_memory_()


def test_it_is_a_future_with_a_result() -> None:
    task = torchwq.BackgroundTask(jobs.take_all, "a", 2)
    assert isinstance(task, concurrent.futures.Future)
    assert task.result(timeout=30) == ("a", 2)  # no mapid
    assert task.done()
    assert not task.running()
    assert task.exception() is None
    assert task.result(0) == ("a", 2)


def test_it_starts_at_once_and_runs_beside_its_owner() -> None:
    gate = flags()
    task = torchwq.BackgroundTask(jobs.gated, gate)
    assert task.running()
    assert not task.done()
    gate[0] = 1
    assert task.result() == "done"


def test_result_times_out_and_can_be_called_again() -> None:
    gate = flags()
    task = torchwq.BackgroundTask(jobs.gated, gate)
    for error in (TimeoutError, concurrent.futures.TimeoutError, asyncio.TimeoutError):
        with pytest.raises(error):
            task.result(timeout=0.02)
    with pytest.raises(TimeoutError):
        task.exception(timeout=0)
    gate[0] = 1
    assert task.result(timeout=30) == "done"


def test_what_has_started_cannot_be_cancelled() -> None:
    gate = flags()
    task = torchwq.BackgroundTask(jobs.gated, gate)
    assert task.cancel() is False
    assert not task.cancelled()
    gate[0] = 1
    assert task.result() == "done"
    assert task.cancel() is False


def test_an_exception_keeps_its_type_and_brings_the_traceback() -> None:
    task = torchwq.BackgroundTask(jobs.fail, "by zero")
    with pytest.raises(ZeroDivisionError, match="by zero") as caught:
        task.result()
    assert isinstance(caught.value.__cause__, torchwq.RemoteTraceback)
    assert "in fail" in caught.value.__cause__.text
    assert task.exception() is caught.value


def test_callbacks_get_the_task_once() -> None:
    gate, called, all_called = flags(), [], threading.Event()
    task = torchwq.BackgroundTask(jobs.gated, gate)
    task.add_done_callback(called.append)
    task.add_done_callback(lambda _: all_called.set())
    assert called == []
    gate[0] = 1
    assert all_called.wait(30)
    assert called == [task]
    task.add_done_callback(called.append)  # called at once, since the task is done
    assert called == [task, task]


def test_wait_and_as_completed() -> None:
    gates = flags(), flags()
    tasks = [torchwq.BackgroundTask(jobs.gated, gate, number) for number, gate in enumerate(gates)]
    done, pending = concurrent.futures.wait(tasks, timeout=0.02)
    assert (done, pending) == (set(), set(tasks))
    gates[1][0] = 1
    done, pending = concurrent.futures.wait(tasks, 30, concurrent.futures.FIRST_COMPLETED)
    assert (done, pending) == ({tasks[1]}, {tasks[0]})
    ended = concurrent.futures.as_completed(tasks, timeout=30)
    assert next(ended) is tasks[1]
    gates[0][0] = 1
    assert next(ended) is tasks[0]
    assert [task.result() for task in tasks] == [0, 1]


def test_asyncio_awaits_it() -> None:
    gate = flags()

    async def main() -> list[Any]:
        waiting = [
            asyncio.wrap_future(torchwq.BackgroundTask(jobs.gated, gate, "first")),
            asyncio.wrap_future(torchwq.BackgroundTask(jobs.fail, "second")),
        ]
        asyncio.get_running_loop().call_later(0.01, lambda: gate.fill_(1))
        return await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 30)

    first, second = asyncio.run(main())
    assert first == "first"
    assert isinstance(second, ZeroDivisionError)


def test_a_killed_worker_is_worker_died() -> None:
    gate = flags()
    task = torchwq.BackgroundTask(jobs.die, gate)
    gate[0] = 1
    with pytest.raises(torchwq.WorkerDied, match="memory") as caught:
        task.result(timeout=30)
    error = caught.value
    assert (error.signal, error.exitcode) == (signal.SIGKILL, -signal.SIGKILL)
    assert error.pid is not None
    assert "die" in str(error)  # the task that the worker had in hand


def test_a_result_that_cannot_be_sent_names_the_place() -> None:
    with pytest.raises(torchwq.MarshalError, match="lock") as caught:
        torchwq.BackgroundTask(jobs.give_lock).result()
    assert "result[0] cannot" in str(caught.value)


def test_a_result_that_exits_where_it_is_read_is_an_error_of_the_task() -> None:
    task = torchwq.BackgroundTask(jobs.exits_where_it_is_read)
    with pytest.raises(SystemExit):
        task.result(20)
    with torchwq.BackgroundTaskPool(1) as pool:
        with pytest.raises(SystemExit):
            pool.submit(jobs.exits_where_it_is_read).result(20)
        assert pool.submit(jobs.take_all, 1).result(20) == (1,)


def test_a_task_without_a_thread_to_wait_for_it_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def no_more(thread: threading.Thread) -> None:
        if thread.name == "torchwq-task":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", no_more)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        torchwq.BackgroundTask(jobs.take_all)
    assert not background._unfinished


def test_a_closure_is_refused_by_the_constructor() -> None:
    data = torch.ones(5)
    with pytest.raises(torchwq.ClosureError, match="data"):
        torchwq.BackgroundTask(lambda: data.sum())
    assert not worker.active_workers()
    task = torchwq.BackgroundTask(lambda: float(data.sum()), upvalues=True)
    assert task.result() == 5.0


@pytest.mark.parametrize(
    ("f", "args", "keywords", "error"),
    [
        pytest.param(7, (), {}, TypeError, id="neither a function nor iterable"),
        pytest.param(None, (), {}, TypeError, id="None"),
        pytest.param([1], (2,), {}, TypeError, id="arguments for a list"),
        pytest.param(jobs.Letters("abc"), (2,), {}, TypeError, id="arguments for a dataset"),
        pytest.param(jobs.count, (3,), {"prefetch": 0}, ValueError, id="prefetch of 0"),
        pytest.param(jobs.count, (3,), {"prefetch": -1}, ValueError, id="prefetch below 0"),
        pytest.param(jobs.count, (3,), {"backend": "fibre"}, ValueError, id="no such backend"),
        pytest.param(jobs.take_all, (threading.Lock(),), {}, torchwq.MarshalError, id="argument that cannot travel"),
    ],
)
def test_bad_calls_are_refused_by_the_constructor(f: Any, args: Any, keywords: Any, error: Any) -> None:
    with pytest.raises(error):
        torchwq.BackgroundTask(f, *args, **keywords)
    assert not worker.active_workers()


def test_a_generator_object_is_refused_with_the_way_out() -> None:
    with pytest.raises(torchwq.MarshalError, match="generator function"):
        torchwq.BackgroundTask(jobs.count(3))
    assert not worker.active_workers()


def test_a_plain_task_is_no_iterator() -> None:
    task = torchwq.BackgroundTask(jobs.give_list)
    for _ in range(2):  # and does not look like an empty one the second time
        with pytest.raises(TypeError, match="not an iterator"):
            list(task)
    with pytest.raises(TypeError):
        len(task)
    assert task.result() == [1, 2, 3]


@pytest.mark.timeout(60)
def test_closing_a_plain_task_lets_it_run_to_its_end() -> None:
    task = torchwq.BackgroundTask(jobs.sleep_and_tell, 6)  # longer than a producer is given
    task.close()
    assert task.result(timeout=30) == "slept"


def test_a_dropped_plain_task_runs_to_its_end() -> None:
    gate, ended = flags(), threading.Event()
    torchwq.BackgroundTask(jobs.gated, gate).add_done_callback(lambda _: ended.set())
    gc.collect()
    gate[0] = 1
    assert ended.wait(30)


def test_it_does_not_keep_its_result_alive() -> None:
    task = torchwq.BackgroundTask(jobs.take_all, flags())
    result = task.result()
    del task, result
    # A fixture checks that nothing is left behind: the result held a descriptor


def test_repr_tells_the_function_and_the_state() -> None:
    gate = flags()
    task = torchwq.BackgroundTask(jobs.gated, gate)
    assert "gated, running" in repr(task)
    gate[0] = 1
    task.result()
    assert "gated, finished" in repr(task)
    failed = torchwq.BackgroundTask(jobs.fail, "x")
    assert failed.exception() is not None
    assert "ZeroDivisionError" in repr(failed)


def test_worker_info_in_a_task() -> None:
    first, second = (torchwq.BackgroundTask(jobs.info).result() for _ in range(2))
    assert (first.mapid, first.num_workers) == (0, 1)
    assert first.seed != second.seed


def test_it_runs_in_a_process_of_its_own() -> None:
    tasks = [torchwq.BackgroundTask(os.getpid) for _ in range(2)]
    assert len({os.getpid(), *(task.result() for task in tasks)}) == 3


def test_a_forked_process_ends_while_a_task_runs() -> None:
    """As the workers of torch's own DataLoader are."""
    gate = flags()
    task = torchwq.BackgroundTask(jobs.gated, gate)
    child = multiprocessing.get_context("fork").Process(target=abs, args=(1,))
    child.start()
    child.join(10)
    exitcode = child.exitcode
    child.kill()
    child.join()
    gate[0] = 1
    assert exitcode == 0
    assert task.result(timeout=30) == "done"


def test_at_exit_plain_tasks_and_pools_finish_and_iterators_are_ended(interpreter: Interpreter) -> None:
    source = """
    import os, sys, time
    import torch, torchwq

    def save(name):
        import os, time
        while not os.path.exists("go"):
            time.sleep(0.001)
        open(name, "w").close()

    def endless():
        import itertools
        try:
            yield from itertools.count()
        finally:
            open("ended", "w").close()

    task = torchwq.BackgroundTask(save, "task")
    pool = torchwq.BackgroundTaskPool(1)
    futures = [pool.submit(save, f"pool{number}") for number in range(3)]
    iterator = torchwq.BackgroundTask(endless)
    next(iterator)
    print("leaving", flush=True)
    """
    with Program(source, interpreter=interpreter) as program:
        program.expect("leaving")
        assert not (program.folder / "task").exists()
        (program.folder / "go").touch()
        assert program.end() == (0, "", "")
        made = {path.name for path in program.folder.iterdir()}
        assert {"task", "pool0", "pool1", "pool2", "ended"} <= made
        program.assert_nothing_is_left()


def test_ctrl_c_while_exit_waits_for_a_task(interpreter: Interpreter) -> None:
    source = """
    import time
    import torch, torchwq

    def forever(ready, place):
        import time
        ready[place] = 1
        time.sleep(1000)

    ready = torch.zeros(2)
    task, pool = torchwq.BackgroundTask(forever, ready, 0), torchwq.BackgroundTaskPool(1)
    future = pool.submit(forever, ready, 1)
    while not ready.all():
        time.sleep(0.001)

    import atexit, threading
    def tell():
        print("leaving", flush=True)
    threading._register_atexit(tell)  # called before torchwq's, and so before exit waits
    """
    with Program(source, interpreter=interpreter) as program:
        program.expect("leaving")
        wait_until(lambda: program.process.poll() is None)
        program.interrupt()
        _, _, err = program.end(timeout=10)
        assert err.count("Traceback") <= 1, err
        program.assert_nothing_is_left()
