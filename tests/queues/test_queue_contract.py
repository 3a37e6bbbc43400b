"""``WorkQueue`` as the contract has it: roles, order, close, timeouts, drain, capacity; for processes and threads."""

from __future__ import annotations

import os
import queue as stdqueue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import pytest
import torch

import torchwq
from tests.conftest import wait_until
from tests.queues import jobs
from torchwq.queues import owner
from torchwq.queues.worker import accept
from torchwq.transport.link import Link

T = TypeVar("T")


def in_thread(f: Callable[[], T]) -> T:
    """Run ``f`` in another thread; raises what it raises."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append((f(), None))
        except BaseException as error:
            results.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(20)
    assert results, "the thread hangs"
    value, error = results[0]
    if error is not None:
        raise error
    return value  # type: ignore[no-any-return]


def worker_handle(owner: torchwq.WorkQueue, backend: str) -> torchwq.WorkQueue:
    """A worker's handle as a worker of this kind would get it, in this process."""
    if backend == "thread":
        return in_thread(lambda: torchwq.workqueue(owner.name))
    fds = [ticket.detach() for ticket in owner._role.handle_descriptors()]
    return torchwq.WorkQueue(accept(fds[:-1], Link(fds[-1])), owner.name)


def test_questions_and_answers_through_a_named_queue(backend: str) -> None:
    with torchwq.workqueue("named") as queue:
        workers = torchwq.map(2, jobs.echo, "named", backend=backend)
        queue.write(1, "two", [3.0])
        queue.write({"four": (4, b"4")})
        queue.write(None, None)
        answers = [queue.read() for _ in range(4)]
        assert sorted(map(repr, answers)) == sorted(map(repr, [1, "two", [3.0], {"four": (4, b"4")}]))
        assert sum(workers.join(20)) == 4


def test_an_anonymous_queue_travels_as_argument_and_inside_a_message(backend: str) -> None:
    with torchwq.workqueue() as outer, torchwq.workqueue() as inner:
        torchwq.map(1, jobs.echo, outer, backend=backend)
        outer.write({"deep": [inner]})
        echoed = outer.read()["deep"][0]  # a worker passed its worker's handle on
        assert not echoed.creator
        inner.write("question")
        assert echoed.read() == "question"
        echoed.write("answer")
        assert inner.read() == "answer"
        echoed.close()


def test_a_worker_hands_its_handle_to_its_own_worker(backend: str) -> None:
    with torchwq.workqueue() as queue, torchwq.workqueue() as inner:
        workers = torchwq.map(1, jobs.pass_on, queue, inner, backend=backend)
        inner.write("a", "b", None)
        assert [inner.read(), inner.read()] == ["a", "b"]
        assert workers.join(30) == [[2]]


def test_roles_belong_to_handles(backend: str) -> None:
    with torchwq.workqueue("roles") as owner:
        assert owner.creator
        assert torchwq.workqueue("roles") is owner, "the creating thread gets its own handle again"
        worker = worker_handle(owner, backend)
        assert not worker.creator
        assert owner.name == worker.name == "roles"
        owner.write("q")
        assert in_thread(lambda: worker.read()) == "q"
        worker.write("a")
        assert in_thread(owner.read) == "a"
        with pytest.raises(TypeError, match="owner"):
            worker.drain()
        worker.close()


def test_first_in_first_out_and_multi_write(backend: str) -> None:
    with torchwq.workqueue("fifo") as owner:
        worker = worker_handle(owner, backend)
        owner.write(*range(100))
        owner.write()
        owner.write(100, 101)
        assert [worker.read() for _ in range(102)] == list(range(102))
        assert worker.read(True) is None


def test_a_failing_multi_write_leaves_the_queue_as_it_was(backend: str) -> None:
    with torchwq.workqueue("atomic") as owner:
        worker = worker_handle(owner, backend)
        with pytest.raises(torchwq.MarshalError, match=r"args\[1\]\['lock'\]"):
            owner.write(1, {"lock": threading.Lock()}, 3)
        assert worker.read(nonblocking=True) is None
        assert owner.statistics().written == 0
        with pytest.raises(torchwq.ClosureError):
            owner.write(1, lambda: worker)
        owner.writeup(lambda n=3: n)
        assert worker.read()() == 3
        assert worker.read(True) is None


def test_writeup_carries_what_a_closure_captures(backend: str) -> None:
    captured = {"weight": 42}
    with torchwq.workqueue("upvalues") as owner:
        worker = worker_handle(owner, backend)
        with pytest.raises(torchwq.ClosureError, match=r"captured.*dict.*\n.*writeup"):
            owner.write(lambda: captured["weight"])
        owner.writeup(lambda: captured["weight"])
        assert worker.read()() == 42


def test_values_are_copied_and_tensors_shared(backend: str) -> None:
    with torchwq.workqueue("values") as owner:
        worker = worker_handle(owner, backend)
        data = {"list": [1, 2], "tensor": torch.zeros(4), "array": np.zeros(4)}
        owner.write(data)
        got = worker.read()
        got["list"].append(3)
        got["tensor"][0] = 7
        got["array"][0] = 7
        assert data["list"] == [1, 2]
        assert data["tensor"][0] == 7
        assert data["array"][0] == 0
        data["tensor"][1] = 8
        assert got["tensor"][1] == 8


@pytest.mark.parametrize("size", [0, 1, 16_000, 17_000, 32_700, 33_000, 5_000_000])
def test_messages_of_any_size(size: int, backend: str) -> None:
    with torchwq.workqueue() as owner:
        torchwq.map(1, jobs.echo, owner, backend=backend)
        data, array = os.urandom(size), np.arange(size, dtype=np.uint8)
        owner.write((data, array))
        got, got_array = owner.read()
        assert got == data
        assert np.array_equal(got_array, array)
        assert got_array.flags.writeable


def test_reading_times_out_and_can_be_tried_again(backend: str) -> None:
    with torchwq.workqueue("slow") as owner:
        assert owner.read(True) is None
        started = time.monotonic()
        with pytest.raises(stdqueue.Empty):
            owner.read(timeout=0.05)
        assert 0.05 <= time.monotonic() - started < 5
        worker = worker_handle(owner, backend)
        with pytest.raises(stdqueue.Empty):
            worker.read(timeout=0)
        worker.write(1)
        assert owner.read(timeout=5) == 1


def test_what_was_written_before_closing_is_still_read(backend: str) -> None:
    with torchwq.workqueue("closing") as owner:
        worker = worker_handle(owner, backend)
        owner.write("last")
        worker.write("unread answer")
        owner.close()
        owner.close()
        assert worker.read() == "last"
        with pytest.raises(torchwq.QueueClosed):
            worker.read()
        with pytest.raises(torchwq.QueueClosed):
            worker.write("too late")
        for use in (owner.read, lambda: owner.write(1), owner.drain, lambda: owner.read(True)):
            with pytest.raises(torchwq.QueueClosed):
                use()


def test_closing_wakes_blocked_readers_on_both_sides(backend: str) -> None:
    owner = torchwq.workqueue("wake")
    worker = worker_handle(owner, backend)
    errors: list[BaseException] = []

    def read(handle: torchwq.WorkQueue) -> None:
        try:
            handle.read()
        except torchwq.QueueClosed as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(handle,)) for handle in (owner, owner, worker)]
    for thread in threads:
        thread.start()
    owner.close()
    for thread in threads:
        thread.join(5)
    assert len(errors) == 3


def test_a_closed_worker_handle_is_closed_for_itself_only(backend: str) -> None:
    with torchwq.workqueue("one of two") as owner:
        first, second = worker_handle(owner, backend), worker_handle(owner, backend)
        first.close()
        with pytest.raises(torchwq.QueueClosed):
            first.read()
        owner.write(1)
        assert second.read() == 1
        wait_until(lambda: owner.statistics().handles == 1)


def test_iterating_reads_until_none_or_close(backend: str) -> None:
    with torchwq.workqueue("iterate") as owner:
        worker = worker_handle(owner, backend)
        owner.write(1, 2, None, 3)
        assert list(worker) == [1, 2]
        owner.close()
        assert list(worker) == [3]


def test_a_name_can_be_created_again_after_closing(backend: str) -> None:
    for _ in range(3):
        with torchwq.workqueue("again") as owner:
            assert owner.creator
            worker = worker_handle(owner, backend)
            owner.write(1)
            assert worker.read() == 1


def test_a_dropped_owner_closes_its_queue() -> None:
    torchwq.workqueue("dropped")
    assert torchwq.workqueue("dropped").creator


def test_bad_arguments() -> None:
    for call in (lambda: torchwq.workqueue(capacity=0), lambda: torchwq.workqueue("")):
        with pytest.raises(ValueError):  # noqa: PT011 - which of the two does not matter
            call()
    with pytest.raises(TypeError):
        torchwq.workqueue(3)  # type: ignore[arg-type]
    with torchwq.workqueue("capacity", capacity=2) as queue:
        assert queue.capacity == 2
        with pytest.raises(ValueError, match="capacity"):
            in_thread(lambda: torchwq.workqueue("capacity", capacity=3))
    import pickle

    with torchwq.workqueue() as queue, pytest.raises(TypeError, match="torchwq"):
        pickle.dumps(queue)
    with torchwq.workqueue() as queue:
        queue.close()
        with torchwq.workqueue() as other, pytest.raises(torchwq.MarshalError, match="closed"):
            other.write(queue)


def test_an_owner_that_writes_much_before_it_reads_does_not_block(backend: str) -> None:
    with torchwq.workqueue() as owner:
        workers = torchwq.map(2, jobs.echo, owner, backend=backend)
        owner.write(*range(30_000))
        owner.write(None, None)
        assert sorted(owner.read() for _ in range(30_000)) == list(range(30_000))
        assert sum(workers.join(20)) == 30_000


def test_questions_flow_while_the_owner_does_something_else(backend: str) -> None:
    with torchwq.workqueue() as owner:
        workers = torchwq.map(1, jobs.consume, owner, backend=backend)
        owner.write(*range(20_000))
        owner.write(None)
        assert workers.join(20) == [20_000]


def test_a_worker_ends_though_nobody_reads_its_answers(backend: str) -> None:
    with torchwq.workqueue() as owner:
        workers = torchwq.map(2, jobs.answer_many, owner, 20_000, backend=backend)
        assert workers.join(30) == ["written", "written"]
        answers = [owner.read() for _ in range(40_000)]
        assert sorted(answers) == sorted([*range(20_000)] * 2)
        with pytest.raises(torchwq.WorkerDied, match="no worker is left"):
            owner.read()


def test_drain_waits_for_every_answer(backend: str) -> None:
    with torchwq.workqueue() as owner:
        torchwq.map(2, jobs.echo, owner, backend=backend)
        for _ in range(5):
            owner.write(*range(200))
            owner.drain(20)
            assert sorted(owner.read(True) for _ in range(200)) == list(range(200))
            assert owner.read(True) is None
        owner.drain(1)


def test_a_thread_reads_answers_while_another_one_drains(backend: str) -> None:
    with torchwq.workqueue() as owner:
        torchwq.map(1, jobs.answer_after, owner, backend=backend)
        owner.write(0)
        owner.read()
        owner.write(0.2, 0.2, 0.2, 3)
        delays: list[float] = []

        def read() -> None:
            for _ in range(3):
                delays.append(-owner.read(timeout=20) + time.monotonic())

        reader = threading.Thread(target=read)
        reader.start()
        owner.drain(20)
        reader.join(20)
        assert max(delays) < 1.5
        assert owner.read(timeout=20)


def test_drain_times_out_and_can_be_called_again(backend: str) -> None:
    with torchwq.workqueue() as owner, torchwq.workqueue() as gate:
        torchwq.map(1, jobs.take_and_wait, owner, gate, backend=backend)
        owner.write("question")
        with pytest.raises(TimeoutError):
            owner.drain(0.3)
        gate.write("go")
        owner.drain(10)
        assert owner.read(True) == "question"


def test_drain_does_not_wait_for_a_taker_that_has_taken_another(backend: str) -> None:
    with torchwq.workqueue() as owner:
        torchwq.map(1, jobs.take_two_answer_one, owner, backend=backend)
        owner.write("no answer", "answer")
        owner.drain(10)
        assert owner.read(True) == "answer"
        owner.write("the end")
        owner_saw = None
        try:
            owner.drain(10)
        except torchwq.WorkerDied as error:
            owner_saw = error
        assert owner.read(True) is None
        assert owner_saw is None or "no worker" in str(owner_saw)


def test_capacity_gives_back_pressure(backend: str) -> None:
    with torchwq.workqueue("tight", capacity=3) as owner:
        worker = worker_handle(owner, backend)
        owner.write(1, 2, 3)
        blocked = threading.Thread(target=owner.write, args=(4,))
        blocked.start()
        blocked.join(0.2)
        assert blocked.is_alive()
        assert worker.read() == 1
        blocked.join(5)
        assert not blocked.is_alive()
        assert [worker.read() for _ in range(3)] == [2, 3, 4]


def test_capacity_with_workers_loses_nothing(backend: str) -> None:
    with torchwq.workqueue(capacity=2) as owner:
        workers = torchwq.map(2, jobs.echo, owner, backend=backend)
        for number in range(500):
            owner.write(number)
        owner.write(None, None)
        assert sum(workers.join(20)) == 500
        assert sorted(owner.read() for _ in range(500)) == list(range(500))


def test_statistics_and_repr(backend: str) -> None:
    with torchwq.workqueue("seen") as owner:
        worker = worker_handle(owner, backend)
        owner.write(1, 2)
        worker.read()
        worker.write("x")
        assert owner.statistics() == torchwq.QueueStatistics(2, 1, 0, 1)
        assert worker.statistics().written == 1
        assert repr(owner) == "<torchwq.WorkQueue 'seen', owner, written=2, taken=1>"
        assert "worker" in repr(worker)
        owner.close()
        assert "closed" in repr(owner)


def test_many_threads_share_one_handle(backend: str) -> None:
    with torchwq.workqueue("shared") as owner:
        worker = worker_handle(owner, backend)
        got: list[int] = []

        def work() -> None:
            for question in worker:
                worker.write(question)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        owner.write(*range(1_000))
        owner.drain(20)
        got = [owner.read() for _ in range(1_000)]
        assert sorted(got) == list(range(1_000))
        owner.write(*[None] * 4)
        for thread in threads:
            thread.join(5)


def test_two_thousand_queues_opened_and_closed() -> None:
    for number in range(1_000):
        with torchwq.workqueue(f"many {number}"), torchwq.workqueue():
            pass


def test_memory_of_waiting_questions_is_small_and_given_back() -> None:
    import tracemalloc

    with torchwq.workqueue() as owner:
        owner.write(0)
        tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        for number in range(100_000):
            owner.write(("question", number))
        held, _ = tracemalloc.get_traced_memory()
        assert (held - before) / 100_000 < 1000
        owner.close()
        after, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert after - before < (held - before) / 10


def answer_by_name(name: str) -> None:
    with torchwq.workqueue(name) as queue:
        queue.write("answer")


def test_an_answer_is_read_although_the_questions_have_not_moved_to_where_processes_find_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held: list[Callable[[], None]] = []
    monkeypatch.setattr(owner.cleanup, "call_soon", held.append)
    with torchwq.workqueue("opened slowly") as queue:
        torchwq.map(1, answer_by_name, "opened slowly").join(20)
        assert queue._role.peer.same_process
        assert queue.read(timeout=20) == "answer"
        monkeypatch.undo()
        for callback in held:
            callback()
        assert not queue._role.peer.same_process
