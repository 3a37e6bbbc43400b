"""A finalizer or a signal handler uses the queue that its thread is just using: neither hangs, and nothing is lost."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

import torchwq
from tests.injection import FEWEST_PLACES, KINDS, in_the_middle, loses_nothing
from tests.queues.handles import worker_handle
from torchwq import QueueClosed, WorkQueue


@dataclass
class Direction:
    """One of a queue's directions: what is written here is read there."""

    write: Callable[[Any], object]
    read: Callable[..., Any]


def open_direction(which: str, capacity: int | None) -> tuple[Direction, list[WorkQueue]]:
    queue = torchwq.workqueue(capacity=capacity)
    worker = worker_handle(queue)
    ends = (queue, worker) if which == "questions" else (worker, queue)
    return Direction(ends[0].write, ends[1].read), [worker, queue]


@pytest.fixture(params=["questions", "answers", "questions, capacity"])
def direction(request: pytest.FixtureRequest) -> Iterator[Direction]:
    which, _, limited = request.param.partition(", ")
    found, handles = open_direction(which, 8 if limited else None)
    yield found
    for handle in handles:
        handle.close()


@pytest.mark.parametrize("nested", ["write", "read"])
@pytest.mark.parametrize("outer", ["write", "read"])
@pytest.mark.parametrize("kind", KINDS)
def test_writing_and_reading_in_the_middle_of_either_loses_nothing(
    direction: Direction, kind: str, outer: str, nested: str
) -> None:
    def read(nonblocking: bool) -> Any:
        return direction.read(True) if nonblocking else direction.read(timeout=10)

    assert loses_nothing(direction.write, read, kind, outer, nested) > FEWEST_PLACES


@pytest.mark.parametrize("outer", ["write", "read"])
@pytest.mark.parametrize("which", ["questions", "answers"])
def test_closing_in_the_middle_of_writing_or_reading_closes(which: str, outer: str) -> None:
    for at in itertools.count():
        direction, (worker, queue) = open_direction(which, None)
        written = queue if which == "questions" else worker
        writes = outer == "write"
        handle = written if writes else (worker if written is queue else queue)
        direction.write(1)
        operation = (lambda d: lambda: d.write(2))(direction) if writes else (lambda d: lambda: d.read())(direction)
        try:
            more = in_the_middle(operation, handle.close, at)
        except QueueClosed:
            more = True
        assert handle.closed or not more, f"at place {at}"
        worker.close()
        queue.close()
        if not more:
            break
    assert at > FEWEST_PLACES


@pytest.mark.parametrize("outer", ["write", "drain"])
def test_what_is_counted_stays_right_when_answers_are_given_in_the_middle(outer: str) -> None:
    with torchwq.workqueue() as queue, worker_handle(queue) as worker:

        def work() -> None:
            question = worker.read(True)
            if question is not None:
                worker.write(question)

        for at in itertools.count():
            queue.write(1)
            more = in_the_middle(lambda: queue.write(2) if outer == "write" else queue.drain(10), work, at) or at < 3
            while queue.statistics().taken < queue.statistics().written:
                work()
            queue.drain(10)
            while queue.read(True) is not None:
                pass
            if not more or at > 150:
                break


@pytest.mark.parametrize("outer", ["write", "read"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["owner", "worker"])
def test_one_handle_may_be_used_both_ways_in_the_middle_of_either(side: str, kind: str, outer: str) -> None:
    make, number_of = KINDS[kind]
    with torchwq.workqueue() as queue, worker_handle(queue) as worker:
        handle, other = (queue, worker) if side == "owner" else (worker, queue)
        numbers = itertools.count()
        written: list[int] = []
        got: list[int] = []

        def write() -> None:
            number = next(numbers)
            handle.write(make(number))
            written.append(number)

        def read() -> None:
            got.append(number_of(handle.read(timeout=10)))

        for at in itertools.count():
            other.write(make(-1))
            operation, nested = (write, read) if outer == "write" else (read, write)
            more = in_the_middle(operation, nested, at)
            if not more:
                nested()
            arrived = [number_of(other.read(timeout=10)) for _ in written]
            assert arrived == written, f"at place {at}"
            assert got == [-1]
            assert other.read(True) is None
            written.clear()
            got.clear()
            if not more:
                break
        assert at > FEWEST_PLACES
