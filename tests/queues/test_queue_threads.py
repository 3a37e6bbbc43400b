"""What a queue does between threads, and when processes come to it."""

from __future__ import annotations

import gc
import select
import threading
import time

import pytest
import torch

import torchwq
from tests.conftest import wait_until
from tests.queues import jobs
from tests.queues.handles import worker_handle


def test_tensors_stay_where_they_are() -> None:
    with torchwq.workqueue() as q:
        workers = torchwq.map(2, jobs.echo, q, backend="thread")
        tensor = torch.zeros(4)
        q.write(tensor)
        assert q.read(timeout=20).data_ptr() == tensor.data_ptr()
        assert not tensor.is_shared()
        q.write(None, None)
        workers.join(20)


def test_processes_and_threads_share_a_queue() -> None:
    with torchwq.workqueue() as q:
        threads = torchwq.map(2, jobs.echo, q, backend="thread")
        q.write(*range(100))
        q.drain(20)
        processes = torchwq.map(2, jobs.echo, q)
        q.write(*range(100, 1_000))
        q.drain(20)
        assert sorted(q.read(True) for _ in range(1_000)) == list(range(1_000))
        q.write(*[None] * 4)
        assert sum(threads.join(20)) + sum(processes.join(20)) == 1_000


def test_a_descriptor_taken_just_as_questions_move_tells_of_them() -> None:
    with torchwq.workqueue("moves while watched") as q:
        handles: list[torchwq.WorkQueue] = []
        opening = threading.Thread(target=lambda: handles.append(torchwq.workqueue("moves while watched")))
        opening.start()
        opening.join()
        handle = handles.pop()
        watch = handle._role._readiness.set
        moving = threading.Thread(target=q._role.open_to_processes)

        def move_and_watch(*fds: int) -> None:
            if moving.ident is None:
                moving.start()
                moving.join(0.5)  # which it does unless it has to wait for this thread
            watch(*fds)

        handle._role._readiness.set = move_and_watch  # type: ignore[method-assign]
        fd = handle.fileno()
        moving.join(20)
        q.write(1)
        assert select.select([fd], [], [], 20)[0]
        assert handle.read(True) == 1
        handle.close()


def test_questions_that_wait_move_in_order_when_a_process_comes() -> None:
    with torchwq.workqueue("moves") as q:
        tensor = torch.zeros(2)
        q.write(1, tensor, [3], lambda: 4)
        assert not tensor.is_shared()
        worker = torchwq.map(1, jobs.echo, "moves")
        q.write(None)
        one, same, three, four = (q.read(timeout=20) for _ in range(4))
        assert (one, same.data_ptr(), three, four()) == (1, tensor.data_ptr(), [3], 4)
        assert worker.join(20) == [4]


VALUES = [(1, "a"), {"b": [2, (3.5, [None])]}, [], [b"c"], {}, (), "d" * 10_000, b"e" * 100_000, ("f" * 100_000,), 4]


def test_values_that_wait_are_copies_and_move_as_they_are_when_a_process_comes() -> None:
    with torchwq.workqueue() as q:
        changed: dict[str, list[object]] = {"list": [1, [2]]}
        q.write(changed)
        for value in VALUES:
            q.write(value)
        changed["list"][0] = changed["more"] = [0]
        worker = torchwq.map(1, jobs.echo, q)
        assert [q.read(timeout=20) for _ in range(11)] == [{"list": [1, [2]]}, *VALUES]
        q.write(None)
        worker.join(20)


def test_threads_answer_with_copies() -> None:
    with torchwq.workqueue() as q:
        workers = torchwq.map(1, answer_and_change, q, backend="thread")
        for value in VALUES:
            q.write(value)
            assert q.read(timeout=20) == value
        question: dict[str, object] = {"inner": [1]}
        for nested in (False, True):
            q.write([question] if nested else question)
            question["inner"].append(2)  # type: ignore[attr-defined]
            answer = q.read(timeout=20)
            assert (answer[0] if nested else answer) == {"inner": [1, 2] if nested else [1]}
        q.write(None)
        workers.join(20)


def answer_and_change(q: torchwq.WorkQueue) -> None:
    for question in q:
        q.write(question)
        if type(question) in (dict, list):
            question.clear()


def test_blocked_threads_follow_the_questions() -> None:
    with torchwq.workqueue() as q:
        threads = torchwq.map(3, jobs.echo, q, backend="thread")
        wait_until(lambda: q.statistics().handles == 3)
        for ticket in q._role.handle_descriptors():  # type: ignore[union-attr]
            ticket.close()
        q.write(*range(30))
        assert sorted(q.read(timeout=20) for _ in range(30)) == list(range(30))
        q.write(None, None, None)
        threads.join(20)


def test_roles_go_by_handle_and_not_by_a_threads_number() -> None:
    made: list[torchwq.WorkQueue] = []
    thread = threading.Thread(target=lambda: made.append(torchwq.workqueue("by thread")))
    thread.start()
    thread.join()
    with made[0]:
        assert torchwq.map(4, creates, "by thread", backend="thread").join(20) == [False] * 4
    made.clear()


def creates(name: str) -> bool:
    return torchwq.workqueue(name).creator


@pytest.mark.parametrize("backend", ["process", "thread"])
def test_a_late_worker_still_gets_what_is_left(backend: str) -> None:
    q = torchwq.workqueue("left")
    workers = torchwq.map(1, jobs.open_by_name_late, "left", 0.4, backend=backend)
    q.write("a", "b")
    q.close()
    assert workers.join(20) == [(False, ["a", "b"])]
    q = torchwq.workqueue("left")
    workers = torchwq.map(1, jobs.open_by_name_late, "left", 0.4, backend=backend)
    q.close()
    assert workers.join(20) == [None], "QueueClosed ends the worker, not as an error"


@pytest.mark.parametrize("backend", ["process", "thread"])
def test_a_handle_in_a_message_outlives_the_closing(backend: str) -> None:
    with torchwq.workqueue() as outer:
        inner = torchwq.workqueue()
        inner.write("left")
        outer.write(inner)
        inner.close()
        torchwq.map(1, read_inner, outer, backend=backend)
        assert outer.read(timeout=20) == ["left"]


def read_inner(outer: torchwq.WorkQueue) -> None:
    outer.write(list(outer.read()))


def test_a_thread_that_fails_ends_the_owners_wait() -> None:
    with torchwq.workqueue() as q:
        workers = torchwq.map(2, take_and_fail, q, backend="thread")
        q.write(1, 2)
        for _ in range(2):
            with pytest.raises(torchwq.WorkerDied, match=r"ended with an error, with question .* in hand: .*taken"):
                q.read(timeout=20)
        with pytest.raises(torchwq.WorkerDied, match="no worker is left"):
            q.read(timeout=20)
        with pytest.raises(ValueError, match="taken"):
            workers.join(20)
        q.drain(20)


def take_and_fail(q: torchwq.WorkQueue) -> None:
    raise ValueError(f"taken {q.read()}")


def test_owner_and_threads_never_miss_a_closing_or_an_end() -> None:
    for _ in range(100):
        with torchwq.workqueue() as q:
            workers = torchwq.map(3, jobs.consume, q, backend="thread")
        assert workers.join(20) == [0, 0, 0]
    for _ in range(100):
        with torchwq.workqueue() as q:
            torchwq.map(1, jobs.answer_many, q, 1, backend="thread")
            assert q.read(timeout=20) == 0
            with pytest.raises(torchwq.WorkerDied):
                q.read(timeout=20)


def test_a_reader_beside_a_drain_misses_nothing() -> None:
    with torchwq.workqueue() as q:
        workers = torchwq.map(2, jobs.echo, q, backend="thread")
        got: list[int] = []
        reader = threading.Thread(target=lambda: got.extend(q.read(timeout=20) for _ in range(2_000)))
        reader.start()
        for number in range(2_000):
            q.write(number)
            if number % 50 == 0:
                q.drain(20)
        reader.join(20)
        assert sorted(got) == list(range(2_000))
        q.write(None, None)
        workers.join(20)


def test_memory_does_not_grow_with_workers_that_have_left() -> None:
    with torchwq.workqueue() as q:
        for _ in range(20):
            torchwq.map(5, jobs.answer_many, q, 0, backend="thread").join(20)
        gc.collect()
        owner = q._role
        wait_until(lambda: not owner.members._identities)  # type: ignore[union-attr]
        assert not len(owner.members)  # type: ignore[union-attr]


def test_between_threads_a_change_of_shape_after_writing_is_not_seen() -> None:
    with torchwq.workqueue() as q:
        tensor = torch.zeros(4)
        q.write(tensor)
        tensor.unsqueeze_(0)
        torchwq.map(1, jobs.echo, q, backend="thread")
        assert q.read(timeout=20).shape == (4,)


def test_a_timeout_may_be_as_long_as_one_likes() -> None:
    with torchwq.workqueue() as q:
        torchwq.map(1, jobs.answer_many, q, 1, backend="thread")
        assert q.read(timeout=float("inf")) == 0


def test_a_queue_dropped_by_all_threads_leaves_nothing() -> None:
    for _ in range(20):
        q = torchwq.workqueue()
        torchwq.map(1, jobs.take_and_wait, q, q, backend="thread")
        q.write(q, [1])
        time.sleep(0)
        q.close()
    del q
    gc.collect()


def test_questions_keep_their_order_when_one_of_them_has_the_queue_in_it() -> None:
    """It asks for what moves the questions, while they are being moved."""
    with torchwq.workqueue() as q:
        for question in (0, q, 2, 3):
            q.write(question)
        q._role.open_to_processes()  # type: ignore[union-attr]
        worker = worker_handle(q)
        got = [worker.read(timeout=20) for _ in range(4)]
        assert [got[0], got[2], got[3]] == [0, 2, 3]
        assert not got[1].creator
        got[1].close()
        worker.close()


def test_room_is_counted_on_when_a_bounded_queue_comes_to_processes() -> None:
    with torchwq.workqueue(capacity=2) as q:
        here = torchwq.marshal(q).read()
        for number in range(5):
            q.write(number)
            assert here.read(timeout=20) == number
        q._role.open_to_processes()  # type: ignore[union-attr]
        assert q.statistics() == torchwq.queues.QueueStatistics(5, 5, 0, 1)
        worker = worker_handle(q)
        q.write(5)
        q.write(6)
        for number in range(5, 20):
            assert (here if number % 2 else worker).read(timeout=20) == number
            q.write(number + 2)
        here.close()
        worker.close()
