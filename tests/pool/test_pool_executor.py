"""BackgroundTaskPool behaves as the executors of concurrent.futures do."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import os
import random
import signal
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import torchwq
from tests.conftest import wait_until
from tests.pool import jobs
from torchwq import pool as pool_module


def flags(n: int = 1) -> torch.Tensor:
    return torch.zeros(n, dtype=torch.int64).share_memory_()


Make = Callable[[int], torchwq.BackgroundTaskPool]


@pytest.fixture(params=["process", "thread"])
def make(request: pytest.FixtureRequest) -> Make:
    return functools.partial(torchwq.BackgroundTaskPool, backend=request.param)


@pytest.fixture
def pool(make: Make) -> Iterator[torchwq.BackgroundTaskPool]:
    with make(2) as made:
        yield made


def test_it_is_an_executor(pool: torchwq.BackgroundTaskPool) -> None:
    assert isinstance(pool, concurrent.futures.Executor)
    future = pool.submit(jobs.take_all, 1, "b", fn=2, self=3)  # no mapid; all names are free for keywords
    assert isinstance(future, concurrent.futures.Future)
    assert future.result(timeout=30) == ((1, "b"), {"fn": 2, "self": 3})


def test_two_hundred_small_tasks(pool: torchwq.BackgroundTaskPool) -> None:
    futures = [pool.submit(jobs.square, number) for number in range(200)]
    assert [future.result(timeout=30) for future in futures] == [number**2 for number in range(200)]


def test_map_is_in_order(pool: torchwq.BackgroundTaskPool) -> None:
    assert list(pool.map(jobs.square, range(50))) == [number**2 for number in range(50)]
    assert list(pool.map(pow, [2, 3], [3, 2])) == [8, 9]


def test_map_raises_at_its_place_and_times_out(pool: torchwq.BackgroundTaskPool) -> None:
    results = pool.map(divmod, [6, 1, 8], [2, 0, 4])
    assert next(results) == (3, 0)
    with pytest.raises(ZeroDivisionError):
        next(results)
    gate = flags()
    slow = pool.map(jobs.gated, [gate], timeout=0.05)
    with pytest.raises(TimeoutError):
        next(slow)
    gate[0] = 1


def test_the_workers_work_at_the_same_time(pool: torchwq.BackgroundTaskPool) -> None:
    here = flags(2)
    futures = [pool.submit(jobs.meet, here, place) for place in range(2)]
    assert len({(os.getpid(), threading.get_ident()), *(future.result(timeout=30) for future in futures)}) == 3


def test_wait_and_as_completed(pool: torchwq.BackgroundTaskPool) -> None:
    gates = flags(), flags()
    futures = [pool.submit(jobs.gated, gate, number) for number, gate in enumerate(gates)]
    assert concurrent.futures.wait(futures, timeout=0.02) == (set(), set(futures))
    gates[1][0] = 1
    done, _ = concurrent.futures.wait(futures, 30, concurrent.futures.FIRST_COMPLETED)
    assert done == {futures[1]}
    ended = concurrent.futures.as_completed(futures, timeout=30)
    assert next(ended) is futures[1]
    gates[0][0] = 1
    assert next(ended).result() == 0


def test_result_times_out_and_can_be_called_again(pool: torchwq.BackgroundTaskPool) -> None:
    gate = flags()
    future = pool.submit(jobs.gated, gate)
    for _ in range(2):
        with pytest.raises(TimeoutError):
            future.result(timeout=0.02)
    gate[0] = 1
    assert future.result(timeout=30) == "done"


def test_an_exception_keeps_its_type_and_brings_the_traceback(pool: torchwq.BackgroundTaskPool) -> None:
    with pytest.raises(ZeroDivisionError, match="by zero") as caught:
        pool.submit(jobs.fail, "by zero").result()
    if not pool._backend.peer.same_process:
        assert isinstance(caught.value.__cause__, torchwq.RemoteTraceback)
    assert "in fail" in "".join(traceback.format_exception(caught.value))


def test_callbacks(pool: torchwq.BackgroundTaskPool) -> None:
    called, all_called = [], threading.Event()
    future = pool.submit(jobs.square, 3)
    future.add_done_callback(called.append)
    future.add_done_callback(lambda _: all_called.set())
    assert all_called.wait(30)
    assert called == [future]


def test_a_callback_may_submit(pool: torchwq.BackgroundTaskPool) -> None:
    chained: concurrent.futures.Future[int] = concurrent.futures.Future()

    def go_on(first: concurrent.futures.Future[int]) -> None:
        second = pool.submit(jobs.square, first.result())
        second.add_done_callback(lambda done: chained.set_result(done.result()))

    pool.submit(jobs.square, 3).add_done_callback(go_on)
    assert chained.result(timeout=30) == 81


def test_asyncio_runs_in_it(pool: torchwq.BackgroundTaskPool) -> None:
    async def main() -> list[int]:
        loop = asyncio.get_running_loop()
        tasks = [loop.run_in_executor(pool, jobs.square, number) for number in range(5)]
        return await asyncio.wait_for(asyncio.gather(*tasks), 30)

    assert asyncio.run(main()) == [0, 1, 4, 9, 16]


def test_submit_from_several_threads(pool: torchwq.BackgroundTaskPool) -> None:
    results: dict[int, list[int]] = {}

    def work(start: int) -> None:
        results[start] = list(pool.map(jobs.square, range(start, start + 20)))

    threads = [threading.Thread(target=work, args=(20 * number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {s: [n * n for n in range(s, s + 20)] for s in range(0, 100, 20)}


def test_callbacks_do_not_run_in_a_worker(pool: torchwq.BackgroundTaskPool) -> None:
    for job in (functools.partial(jobs.square, 3), functools.partial(jobs.fail, "on purpose")):
        found: list[object] = []
        gate, called = flags(), threading.Event()
        pool.submit(jobs.gated, gate)
        future = pool.submit(job)
        future.add_done_callback(lambda _, found=found: found.append(torchwq.worker_info()))  # type: ignore[misc]
        future.add_done_callback(lambda _, called=called: called.set())  # type: ignore[misc]
        gate[0] = 1
        assert called.wait(30)
        assert found == [None]
        assert future.done()
        future.exception()


def test_a_callback_that_takes_long_holds_up_no_worker() -> None:
    go_on, gate = threading.Event(), flags()
    with torchwq.BackgroundTaskPool(1, backend="thread") as pool:
        first = pool.submit(jobs.gated, gate)
        first.add_done_callback(lambda _: go_on.wait(30))
        done = flags()
        pool.submit(jobs.fill, done, 1)
        gate[0] = 1
        wait_until(lambda: bool(done[0]))
        for number in range(2, 5):  # those before are not completed yet
            wait_until(lambda: bool(pool._pool.idle))
            pool.submit(jobs.fill, done, number)
            wait_until(lambda number=number: int(done[0]) == number)  # type: ignore[misc]
        go_on.set()


def test_arguments_and_results_are_copies(make: Make) -> None:
    gate, argument = flags(), [1]
    with make(1) as pool:
        pool.submit(jobs.gated, gate)
        future = pool.submit(jobs.keep, argument)
        argument.append(2)  # after the call, before the task
        gate[0] = 1
        result = future.result(timeout=30)
        result.append(3)
        assert pool.submit(jobs.kept).result(timeout=30) == [[1]]
        assert (argument, result) == ([1, 2], [1, 3])


def test_an_object_that_is_two_arguments_stays_one(pool: torchwq.BackgroundTaskPool) -> None:
    one = [1]
    assert pool.submit(jobs.are_same, one, second=one).result(timeout=30)
    assert not pool.submit(jobs.are_same, one, second=[1]).result(timeout=30)


def test_closures_are_refused_by_submit_also_after_the_function_was_sent(pool: torchwq.BackgroundTaskPool) -> None:
    data = [1]

    def total(number: int) -> int:
        return number + len(data)

    assert pool.submit(jobs.square, 3).result(timeout=30) == 9
    original = jobs.square
    try:
        jobs.square = total
        total.__module__, total.__qualname__ = jobs.__name__, "square"  # it has the name: it goes by name
        pool.submit(total, 3).cancel()
        jobs.square = original
        with pytest.raises(torchwq.ClosureError, match="data"):
            pool.submit(total, 3)
    finally:
        jobs.square = original
    with pytest.raises(torchwq.ClosureError, match="data"):
        pool.submit(lambda: data)


def test_a_users_code_runs_without_the_pools_lock(
    pool: torchwq.BackgroundTaskPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Waiting for another task needs the lock: workers that are threads take tasks with it.
    monkeypatch.setattr(jobs, "on_name", lambda: pool.submit(jobs.square, 3).result(timeout=10))
    assert pool.submit(jobs.Named()).result(timeout=30) == "called"


# --- cancel and shutdown ---


def test_what_has_not_started_can_be_cancelled(make: Make) -> None:
    gate = flags()
    with make(1) as pool:
        running = pool.submit(jobs.gated, gate)
        wait_until(running.running)
        waiting, last = pool.submit(jobs.square, 2), pool.submit(jobs.square, 3)
        assert running.cancel() is False
        assert waiting.cancel() is True
        assert waiting.cancelled()
        with pytest.raises(concurrent.futures.CancelledError):
            waiting.result(timeout=0)
        gate[0] = 1
        assert running.result(timeout=30) == "done"
        assert last.result(timeout=30) == 9
        done, _ = concurrent.futures.wait([waiting], timeout=30)
        assert done == {waiting}


def test_shutdown_waits_for_what_was_submitted(make: Make) -> None:
    pool = make(2)
    futures = [pool.submit(jobs.square, number) for number in range(20)]
    pool.shutdown()
    assert all(future.done() for future in futures)
    assert [future.result() for future in futures] == [number**2 for number in range(20)]
    pool.shutdown()  # once more is fine
    with pytest.raises(RuntimeError, match="shutdown"):
        pool.submit(jobs.square, 1)
    with pytest.raises(RuntimeError):
        pool.map(jobs.square, [1])


def test_shutdown_without_waiting(make: Make) -> None:
    gate = flags()
    pool = make(1)
    futures = [pool.submit(jobs.gated, gate, number) for number in range(3)]
    pool.shutdown(wait=False)
    with pytest.raises(RuntimeError):
        pool.submit(jobs.square, 1)
    assert not any(future.done() for future in futures)
    gate[0] = 1
    assert [future.result(timeout=30) for future in futures] == [0, 1, 2]


@pytest.mark.parametrize("wait", [False, True])
def test_shutdown_cancels_what_has_not_started(make: Make, wait: bool) -> None:
    gate = flags()
    pool = make(1)
    running = pool.submit(jobs.gated, gate)
    wait_until(running.running)
    waiting = [pool.submit(jobs.square, number) for number in range(5)]
    cancelled = threading.Event()
    waiting[-1].add_done_callback(lambda _: cancelled.set())
    thread = threading.Thread(target=pool.shutdown, kwargs={"wait": wait, "cancel_futures": True})
    thread.start()
    assert cancelled.wait(30)
    assert all(future.cancelled() for future in waiting)
    assert not running.done()
    assert concurrent.futures.wait(waiting, timeout=30).done == set(waiting)
    gate[0] = 1
    assert running.result(timeout=30) == "done"
    thread.join(30)
    assert not thread.is_alive()


def test_leaving_with_waits(make: Make) -> None:
    with make(1) as pool:
        futures = [pool.submit(jobs.square, number) for number in range(5)]
    assert all(future.done() for future in futures)


def test_an_error_in_with_waits_for_what_was_submitted(make: Make) -> None:
    pool = make(1)
    future = pool.submit(jobs.square, 5)
    with pytest.raises(KeyError), pool:
        raise KeyError
    assert future.done()


# --- threads, which take tasks by themselves ---


def test_each_task_is_done_once_or_cancelled() -> None:
    done: Counter[int] = Counter()
    jobs.note_done = done.update
    futures: dict[int, concurrent.futures.Future[int]] = {}
    with torchwq.BackgroundTaskPool(3, backend="thread") as pool:

        def submit(start: int) -> None:
            chance = random.Random(start)
            for number in range(start, start + 500):
                futures[number] = pool.submit(jobs.note, number)
                if chance.random() < 0.3:
                    futures[chance.randrange(start, number + 1)].cancel()

        threads = [threading.Thread(target=submit, args=(500 * number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert all(future.done() for future in futures.values())
    assert done == Counter(number for number, future in futures.items() if not future.cancelled())
    assert all(future.cancelled() or future.result() == number for number, future in futures.items())


def test_a_worker_that_looks_for_a_cancelled_task_lets_the_pool_end() -> None:
    pool = torchwq.BackgroundTaskPool(1, backend="thread")
    assert pool.submit(jobs.square, 3).result(timeout=30) == 9
    wait_until(lambda: bool(pool._pool.idle))
    with pool._pool.lock:  # the worker takes no task meanwhile
        future = pool.submit(jobs.square, 4)
        assert future.cancel()
        pool.shutdown(wait=False)
    pool._pool.join(30)
    assert not pool._pool.is_alive()


def test_a_worker_that_looks_too_often_does_each_task_once() -> None:
    done: Counter[int] = Counter()
    jobs.note_done = done.update
    with torchwq.BackgroundTaskPool(1, backend="thread") as pool:
        assert pool.submit(jobs.square, 3).result(timeout=30) == 9
        (looker,) = pool._pool._workers.values()
        for start in range(0, 100, 10):
            with pool._pool.lock:
                looker.send(())
                futures = [pool.submit(jobs.note, number) for number in range(start, start + 10)]
                looker.send(())
            assert [future.result(timeout=30) for future in futures] == list(range(start, start + 10))
    assert done == Counter(range(100))


def test_an_interrupted_submit_loses_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    with torchwq.BackgroundTaskPool(1, backend="thread") as pool:
        assert pool.submit(jobs.square, 3).result(timeout=30) == 9
        (process,) = pool._pool._workers.values()
        wait_until(lambda: bool(pool._pool.idle))

        def interrupted(payload: object) -> bool:
            raise KeyboardInterrupt

        monkeypatch.setattr(process, "send", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.submit(jobs.square, 4)
        monkeypatch.undo()
        assert pool.submit(jobs.square, 5).result(timeout=30) == 25


@pytest.mark.parametrize("is_sent", [False, True])
def test_no_task_waits_behind_that_of_an_interrupted_submit(monkeypatch: pytest.MonkeyPatch, is_sent: bool) -> None:
    with torchwq.BackgroundTaskPool(2, backend="thread") as pool:
        here, gate, started = flags(2), flags(), flags()
        for future in [pool.submit(jobs.meet, here, place) for place in range(2)]:
            future.result(timeout=30)
        wait_until(lambda: len(pool._pool.idle) == 2)
        process = pool._pool.idle[-1]
        send = process.send

        def interrupted(payload: object) -> bool:
            if is_sent:
                send(payload)
            raise KeyboardInterrupt

        monkeypatch.setattr(process, "send", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.submit(jobs.gated, gate, None, started)
        monkeypatch.undo()
        if is_sent:
            wait_until(lambda: bool(started[0]))
        try:
            assert pool.submit(jobs.square, 5).result(timeout=10) == 25
        finally:
            gate[0] = 1


def test_tasks_of_a_worker_that_looks_too_often_get_their_own_results(monkeypatch: pytest.MonkeyPatch) -> None:
    with torchwq.BackgroundTaskPool(1, backend="thread") as pool:
        assert pool.submit(jobs.square, 3).result(timeout=30) == 9
        thread = pool._pool
        wait_until(lambda: bool(thread.idle))
        process = thread.idle[-1]
        send, start = process.send, pool_module._Task.start
        is_interrupted, both_start, pool_has_sent = True, threading.Event(), threading.Event()

        def interruptible_send(payload: object) -> bool:
            result = send(payload)
            if is_interrupted:
                raise KeyboardInterrupt
            if threading.current_thread() is thread:
                pool_has_sent.set()
            return result

        def slow_start(task: Any) -> bool:
            if threading.current_thread() is thread:
                both_start.wait(1)
            else:
                both_start.set()
                pool_has_sent.wait(1)
            return start(task)

        monkeypatch.setattr(process, "send", interruptible_send)
        monkeypatch.setattr(pool_module._Task, "start", slow_start)
        with thread.lock:
            for number in (4, 5):
                with pytest.raises(KeyboardInterrupt):
                    pool.submit(jobs.square, number)
            futures = [task.future for task in thread.waiting]
            is_interrupted = False
            thread.events.put(("wake", None, None))
        assert [future.result(timeout=30) for future in futures] == [16, 25]


@pytest.mark.parametrize("waits", [True, False])
def test_a_future_that_a_user_has_completed_harms_no_other(make: Make, waits: bool) -> None:
    gate, started = flags(), flags()
    with make(1) as pool:
        first = pool.submit(jobs.gated, gate, "done", started)
        wait_until(lambda: bool(started[0]))
        completed = pool.submit(jobs.square, 3)
        completed.set_result(5)
        last = pool.submit(jobs.square, 4)
        if not waits:
            pool.shutdown(wait=False, cancel_futures=True)
        gate[0] = 1
        assert first.result(timeout=30) == "done"
        assert completed.result(timeout=30) == 5
        assert last.result(timeout=30) == 16 if waits else last.cancelled()


@pytest.fixture
def threads_take_turns_all_the_time() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("threads_take_turns_all_the_time")
def test_tasks_that_end_their_thread_are_lost_alone() -> None:
    for _ in range(150):
        with torchwq.BackgroundTaskPool(2, backend="thread") as pool:
            futures = [pool.submit(jobs.leave if number % 5 == 4 else jobs.square, number) for number in range(40)]
        for number, future in enumerate(futures):
            error = future.exception(timeout=0)
            assert isinstance(error, torchwq.WorkerDied) if number % 5 == 4 else future.result() == number**2


@pytest.mark.usefixtures("threads_take_turns_all_the_time")
def test_every_future_ends_when_threads_are_interrupted() -> None:
    interrupted = set()
    with torchwq.BackgroundTaskPool(2, backend="thread") as pool:
        workers = pool._pool._workers

        def interrupt() -> None:
            for mapid, worker in list(workers.items()):
                if mapid not in pool._pool._starting and worker not in interrupted:
                    interrupted.add(worker)  # once: as Ctrl-C does
                    worker.terminate(signal.SIGKILL)

        for _ in range(100):
            futures = [pool.submit(jobs.count_up, 200) for _ in range(50)]
            futures[0].exception(timeout=30)
            interrupt()
            concurrent.futures.wait(futures[25:], timeout=30, return_when=concurrent.futures.FIRST_COMPLETED)
            interrupt()
            for future in futures:
                error = future.exception(timeout=30)
                assert error is None or isinstance(error, torchwq.WorkerDied)
        # One that waited is interrupted when it goes on.
        wait_until(lambda: pool.submit(jobs.square, 3).exception(timeout=30) is None)
    assert len(interrupted) > 100
