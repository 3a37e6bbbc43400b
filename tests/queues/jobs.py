"""What workers run in the tests of queues. Importable, so it travels by name."""

from __future__ import annotations

import os
import signal
import sys
import time
from queue import Empty
from typing import Any

import torchwq
from torchwq.queues.protocol import ADOPT
from torchwq.queues.worker import WorkerSide


def echo(name_or_queue: Any) -> int:
    """Answer every question with itself until None; returns how many there were."""
    queue = torchwq.workqueue(name_or_queue) if isinstance(name_or_queue, str) else name_or_queue
    count = 0
    for question in queue:
        queue.write(question)
        count += 1
    return count


def consume(queue: torchwq.WorkQueue) -> int:
    """Read until None or close, never answer."""
    return sum(1 for _ in queue)


def read_one_and_die(queue: torchwq.WorkQueue, number: int) -> None:
    queue.read()
    os.kill(os.getpid(), number)


def die_while_reading(queue: torchwq.WorkQueue) -> None:
    queue.write(os.getpid())
    queue.read()


def die_while_writing(queue: torchwq.WorkQueue) -> None:
    queue.write(os.getpid())
    while True:
        queue.write(b"x" * 1000)


def answer_many(queue: torchwq.WorkQueue, count: int) -> str:
    for number in range(count):
        queue.write(number)
    return "written"


def answer_after(queue: torchwq.WorkQueue) -> None:
    """Answer each number, after so many seconds, with the time."""
    for seconds in queue:
        time.sleep(seconds)
        queue.write(time.monotonic())


def take_and_wait(queue: torchwq.WorkQueue, gate: torchwq.WorkQueue) -> None:
    question = queue.read()
    gate.read()
    queue.write(question)


def take_two_answer_one(queue: torchwq.WorkQueue) -> None:
    queue.read()
    queue.write(queue.read())
    queue.read()


def stop_self(queue: torchwq.WorkQueue) -> None:
    queue.write(os.getpid())
    os.kill(os.getpid(), signal.SIGSTOP)


def open_by_name_late(name: str, seconds: float) -> Any:
    time.sleep(seconds)  # the point of the test is to come late
    queue = torchwq.workqueue(name)
    return queue.creator, list(queue)


def create_and_die(name: str) -> None:
    queue = torchwq.workqueue(name)
    assert queue.creator
    os.kill(os.getpid(), signal.SIGKILL)


def fail(text: str) -> None:
    raise ValueError(text)


def pass_on(queue: torchwq.WorkQueue, inner: torchwq.WorkQueue) -> list[Any]:
    """Give a worker's handle on ``inner`` to a worker of this worker."""
    return torchwq.map(1, echo, inner).join(30)


class Unfit(ValueError):
    """What these workers raise."""


def square_or_fail(where: torchwq.WorkQueue | str, how: str) -> None:
    """Answer with squares; at a 3, fail: as the function ends, or out of a ``with`` block, or after a clean-up."""
    queue = torchwq.workqueue(where) if isinstance(where, str) else where
    if how == "with":
        with queue:
            _square_or_fail(queue)
    try:
        _square_or_fail(queue)
    finally:
        if how == "other handle":
            time.sleep(0.6)


def _square_or_fail(queue: torchwq.WorkQueue) -> None:
    for number in queue:
        if number == 3:
            raise Unfit("three")
        queue.write(number * number)


def fail_and_go_on(queue: torchwq.WorkQueue) -> str:
    """An error leaves a ``with`` block, and the function ends well."""
    try:
        with queue:
            raise Unfit("caught")
    except Unfit:
        return "went on"


def exit_with(status: int, queue: torchwq.WorkQueue, hard: bool = False) -> None:
    """End without an answer."""
    queue.read()
    if hard:
        os._exit(status)
    sys.exit(status)


def leave_by_a_full_link(queue: torchwq.WorkQueue, signals: torchwq.Channel) -> None:
    """Leave when as much has been said over the link as it takes."""
    side = queue._role
    assert isinstance(side, WorkerSide)
    signals.read()
    while not side._link.unsent:
        side._link.send(ADOPT)  # which says nothing without a descriptor
    queue.close()


def be_slow_to_leave(queue: torchwq.WorkQueue) -> None:
    """Leave with more answers than the socket takes; the goodbye comes a moment after the last."""
    leave = WorkerSide._leave

    def leave_later(side: WorkerSide) -> None:
        for _ in range(120):  # a callback that sleeps for long would be told of
            time.sleep(0.01)
        leave(side)

    WorkerSide._leave = leave_later  # type: ignore[method-assign]
    for _ in range(1000):
        queue.write("x" * 2000)


def fail_in_a_forked_process(name: str) -> None:
    pid = os.fork()
    if not pid:
        queue = torchwq.workqueue(name)
        queue.write("opened")
        raise Unfit("forked")
    os.waitpid(pid, 0)


def open_again_and_again(name: str) -> None:
    """Answer questions until None; whenever there is none for a while, an error closes the handle, and is caught."""
    while True:
        try:
            with torchwq.workqueue(name) as queue:
                while (question := queue.read(timeout=0.3)) is not None:
                    queue.write(question)
                return
        except Empty:
            pass


def fail_and_be_killed(queue: torchwq.WorkQueue) -> None:
    try:
        with queue:
            queue.read()
            raise Unfit("in the block")
    finally:
        os.kill(os.getpid(), signal.SIGKILL)
