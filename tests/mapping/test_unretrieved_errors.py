"""An error that was never retrieved is printed once, with its traceback; a retrieved one never is."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]

#: The text of each error says whether it must be printed.
PROGRAM = """
    import concurrent.futures, gc, os, signal, sys, time
    import torchwq

    backend = sys.argv[1]

    def fail(text, mapid=0):
        raise ValueError(f"{text}.{mapid}")

    def fail_later(text, seconds):
        time.sleep(seconds)
        raise ValueError(f"{text}.0")

    def close_and_fail(queue):
        queue.read()
        raise torchwq.QueueClosed("quiet: closed")

    def answer_and_fail(queue):
        queue.write(1)
        raise ValueError(queue.read())

    def fail_with_items(text):
        yield 1
        raise ValueError(text)

    def run(f, *args, n=1):
        return torchwq.map(n, f, *args, backend=backend)

    def ended(workers):
        while "0 running" not in repr(workers):
            time.sleep(0.01)
        return workers

    # Dropped before and after the end of the workers.
    run(fail_later, "printed: dropped while it runs", 0.2)
    dropped = ended(run(fail, "printed: dropped", n=2))
    del dropped
    # Asked for.
    try:
        run(fail, "quiet: joined", n=2).join()
    except ValueError:
        pass
    checked = ended(run(fail, "quiet: checked"))
    try:
        checked.check_errors()
    except ValueError:
        pass
    # Told by a queue; before its map is dropped, and after.
    told = torchwq.workqueue()
    run(answer_and_fail, told)
    keep = run(answer_and_fail, told)
    assert [told.read(), told.read()] == [1, 1]
    told.write("quiet: told", "quiet: told")
    for _ in range(2):
        try:
            told.read()
        except torchwq.WorkerDied as death:
            assert death.__cause__ is not None
    closed = torchwq.workqueue()
    closing = run(close_and_fail, closed)
    closed.write(0)

    # Tasks and futures.
    def task(f, *args):
        return torchwq.BackgroundTask(f, *args, backend=backend)

    task(fail_later, "printed: a task that was dropped", 0.1)
    kept_task = task(fail, "printed: a task that was kept")
    try:
        task(fail, "quiet: a task").result()
    except ValueError:
        pass
    assert task(fail, "quiet: another task").exception() is not None
    items = task(fail_with_items, "quiet: an item")
    try:
        print(*items)
    except ValueError:
        pass
    for item in task(fail_with_items, "quiet: an item that nobody wanted"):
        break
    pool = torchwq.BackgroundTaskPool(1, backend=backend)
    asked = [pool.submit(fail, "quiet: a future") for _ in range(2)]
    concurrent.futures.wait(asked)
    assert asked[0].exception() is not None
    try:
        asked[1].result()
    except ValueError:
        pass
    try:
        list(pool.map(fail, ["quiet: mapped", "quiet: mapped as well", "quiet: and this"]))
    except ValueError:
        pass
    dropped = pool.submit(fail, "printed: a future that was dropped")
    concurrent.futures.wait([dropped])
    del dropped
    last = pool.submit(fail, "printed: a future that was kept")
    called = []
    with_callback = pool.submit(fail, "quiet: a future with a callback")
    with_callback.add_done_callback(lambda future: called.append(future.exception()))
    pool.submit(len, "").result()
    gc.collect()

    # At exit, running workers are ended; that is no error.
    run(time.sleep, 100)
    left = ended(run(fail, "printed: left"))
    if backend == "process":
        def die():
            os.kill(os.getpid(), signal.SIGKILL)
        ended(run(die))
    print("the end", flush=True)
"""


def check(err: str, died: int) -> None:
    reports = err.split("exception was never retrieved")[1:]
    printed = [found[-1] for each in reports if (found := re.findall(r"^ValueError: (.*)\.\d$", each, re.MULTILINE))]
    assert "quiet" not in err, err
    expected = {
        "printed: dropped while it runs": 1,
        "printed: dropped": 2,
        "printed: a task that was dropped": 1,
        "printed: a task that was kept": 1,
        "printed: a future that was dropped": 1,
        "printed: a future that was kept": 1,
        "printed: left": 1,
    }
    assert {text: printed.count(text) for text in set(printed)} == expected, err
    assert len(reports) == sum(expected.values()) + died, err
    assert err.count("SIGKILL. ") == died, err
    assert "in fail" in err  # the worker's traceback


@pytest.mark.timeout(150)
def test_errors_of_processes_that_nobody_asks_for(run_script: Run) -> None:
    done = run_script(PROGRAM, "process", timeout=140)
    assert done.stdout.endswith("the end\n")
    check(done.stderr, died=1)


@pytest.mark.timeout(150)
def test_errors_of_threads_that_nobody_asks_for(run_script: Run) -> None:
    done = run_script(PROGRAM, "thread", timeout=140)
    assert done.stdout.endswith("the end\n")
    check(done.stderr, died=0)


def test_a_death_that_a_reader_was_told_of_is_not_printed(run_script: Run) -> None:
    done = run_script("""
        import os, signal
        import torchwq

        def die(queue):
            queue.read()
            os.kill(os.getpid(), signal.SIGKILL)

        with torchwq.workqueue() as queue:
            workers = torchwq.map(1, die, queue)
            queue.write(1)
            try:
                queue.read(timeout=40)
            except torchwq.WorkerDied as death:
                print(death.signal.name)
        with torchwq.workqueue() as queue:
            unread = torchwq.map(1, die, queue)
            queue.write(1)
            unread.wait(40)
    """)
    assert done.stdout == "SIGKILL\n"
    assert done.stderr.count("exception was never retrieved") == 1
    assert "WorkerDied: worker 0" in done.stderr
