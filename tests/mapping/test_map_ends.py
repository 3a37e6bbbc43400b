"""However the owner ends, its workers end, and nothing stays behind."""

from __future__ import annotations

import signal
import time

import pytest

from tests.interpreter import Interpreter
from tests.mapping.programs import Program

#: Two workers that would go on for ever, one of them with a worker and a queue of its own. The program says "ready".
WORKERS = """
    import os, sys, time
    import torch, torchwq

    def work(ready, mapid):
        import time, torch, torchwq
        if mapid == 0:
            queue = torchwq.workqueue("of a worker")
            own = torchwq.map(1, time.sleep, 1000)
            while own.pids == [None]:
                time.sleep(0.001)
        ready[mapid] = 1
        while True:
            time.sleep(1000)

    queue = torchwq.workqueue("of the owner")
    ready = torch.zeros(2)
    workers = torchwq.map(2, work, ready)
    while not ready.all():
        time.sleep(0.001)
    print("ready", flush=True)
    input()
"""

BLOCKED = {
    "in join": "workers.join()",
    "in read": "queue.read()",
    "in a pool": """
    with torchwq.BackgroundTaskPool(2) as pool:
        pool.submit(time.sleep, 1000).result()
    """,
}


@pytest.mark.parametrize("blocked", BLOCKED)
def test_ctrl_c(interpreter: Interpreter, blocked: str) -> None:
    with Program(WORKERS + "\n    " + BLOCKED[blocked].strip() + "\n", interpreter=interpreter) as program:
        program.expect("ready")
        time.sleep(0.1)  # until it is blocked; Ctrl-C before that must do as well
        program.interrupt()
        status, out, err = program.end(timeout=10)
        assert (status, out) == (-signal.SIGINT, "")
        assert err.count("Traceback") == 1, err
        assert err.count("KeyboardInterrupt") == 1, err
        program.assert_nothing_is_left()


def test_ctrl_c_ends_iterators_pools_and_plain_tasks(interpreter: Interpreter) -> None:
    source = """
    import time
    import torch, torchwq

    def items(ready):
        import itertools
        ready[0] = 1
        for number in itertools.count():
            yield number

    def wait(ready, place):
        import time
        ready[place] = 1
        time.sleep(1000)

    ready = torch.zeros(3)
    pool = torchwq.BackgroundTaskPool(1)
    task, future = torchwq.BackgroundTask(wait, ready, 1), pool.submit(wait, ready, 2)
    iterator = torchwq.BackgroundTask(items, ready)
    while not ready.all():
        time.sleep(0.001)
    print("ready", flush=True)
    for item in iterator:
        pass
    """
    with Program(source, interpreter=interpreter) as program:
        program.expect("ready")
        program.interrupt()
        status, out, err = program.end(timeout=10)
        assert (status, out) == (-signal.SIGINT, "")
        assert err.count("Traceback") == 1, err
        assert err.count("KeyboardInterrupt") == 1, err
        program.assert_nothing_is_left()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_owner_is_killed(interpreter: Interpreter, number: signal.Signals) -> None:
    with Program(WORKERS + "    workers.join()\n", interpreter=interpreter) as program:
        program.expect("ready")
        assert len(program.descendants()) >= 4  # the fork server and three workers
        program.send(number)
        program.assert_nothing_is_left(seconds=2.0)
        assert program.end()[0] == -number


@pytest.mark.parametrize(("end", "expected"), [("", 0), ("raise ValueError('oh')", 1)])
def test_the_owner_ends_while_its_workers_run(interpreter: Interpreter, end: str, expected: int) -> None:
    with Program(WORKERS + f"    {end}\n", interpreter=interpreter) as program:
        program.expect("ready")
        status, _, err = program.end(timeout=10)
        assert status == expected
        assert err.count("Traceback") == (1 if "raise" in end else 0), err
        program.assert_nothing_is_left()


def test_the_owner_ends_by_os_exit(interpreter: Interpreter) -> None:
    with Program(WORKERS + "    os._exit(4)\n", interpreter=interpreter) as program:
        program.expect("ready")
        assert program.end(timeout=10)[0] == 4
        program.assert_nothing_is_left(seconds=2.0)
