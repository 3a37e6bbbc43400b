"""A program ends in silence, whatever it has at module level then: no "Exception ignored", no warning, no traceback.

Each program has many objects, because starting one costs seconds. What a program prints names the object.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from torchwq.transport import namespace

pytestmark = pytest.mark.timeout(200)

#: Things of every public kind, used and unused, in the states that they may be in when a program ends.
OBJECTS = """
    import os, sys, threading, time
    import torch, torchwq
    from torch.utils.data import Dataset

    class Numbers(Dataset):
        def __len__(self):
            return 100
        def __getitem__(self, index):
            return torch.tensor(index)

    def count():
        import itertools
        yield from itertools.count()

    def count_slowly():
        import time
        yield 1
        time.sleep(1000)

    def answer(queue):
        for question in queue:
            queue.write(question)

    def wait(*args):
        import time
        time.sleep(1000)

    backend = sys.argv[1]
    queue, named, answered = torchwq.workqueue(), torchwq.workqueue("named"), torchwq.workqueue()
    queue.write(1, torch.ones(2))
    channel, drained, line = torchwq.channel(), torchwq.channel(), torchwq.channel(capacity=2)
    channel.write(1)
    drained.close()
    line.write(torch.zeros(2))
    mutex, locked = torchwq.mutex(), torchwq.mutex()
    locked.acquire()
    marshalled = torchwq.marshal([torchwq.channel(), queue, torchwq.mutex(), torch.ones(2), {"queue": named}])
    read = marshalled.read()
    never_read = torchwq.marshal([torchwq.channel(), queue, torchwq.mutex()])
    cycle = [torchwq.channel(), torchwq.workqueue(), torchwq.mutex(), marshalled.read()]
    cycle.append(cycle)

    running = torchwq.map(1, wait, queue, line, mutex, marshalled, backend=backend)
    answering = torchwq.map(1, answer, answered, backend=backend)
    answered.write(1, 2)
    assert answered.read() == 1
    joined = torchwq.map(1, len, "ab", backend=backend)
    assert joined.join() == [2]
    torchwq.map(1, wait, backend=backend)  # dropped
    items = torchwq.BackgroundTask(count, backend=backend)
    assert next(items) == 0
    dropped = torchwq.BackgroundTask(count, backend=backend)
    assert next(dropped) == 0
    del dropped
    task = torchwq.BackgroundTask(len, "abc", backend=backend)
    pool = torchwq.BackgroundTaskPool(1, backend=backend)
    futures = [pool.submit(len, "abcd") for _ in range(3)]
    empty_pool = torchwq.BackgroundTaskPool(1, backend=backend)
    loader = torchwq.DataLoader(Numbers(), batch_size=4, num_workers=1, persistent_workers=True)
    batches = iter(loader)
    batch = next(batches)
    in_threads = iter(torchwq.DataLoader(Numbers(), batch_size=4, num_workers=1, backend="thread"))
    next(in_threads)
    assert torchwq.select([answered, channel])

    # Daemons that wait while the program ends.
    def daemon(call):
        threading.Thread(target=call, daemon=True).start()

    def read_on(iterator):
        for _ in iterator:
            time.sleep(0.001)

    class Slow(Numbers):
        def __getitem__(self, index):
            time.sleep(0.2)
            return super().__getitem__(index)

    empty = torchwq.workqueue()
    reading = torchwq.channel()
    slow = torchwq.DataLoader(Slow(), batch_size=2, num_workers=1)
    for waits in (
        empty.read, reading.read, running.join, locked.acquire,
        lambda: list(torchwq.BackgroundTask(count_slowly, backend=backend)),
        lambda: read_on(items), lambda: read_on(slow), lambda: read_on(in_threads),
        lambda: next(iter(torchwq.DataLoader(Slow(), batch_size=100, num_workers=1))),
    ):
        daemon(waits)
    time.sleep(0.3)
"""

#: A few, in a program in which no thread of torchwq's was ever started; most are dropped before the end.
QUIET = """
    import torchwq

    queue = torchwq.workqueue()
    roles = [queue._role]
    del queue
    channel = torchwq.channel()
    channel.write(1)
    for made in (torchwq.channel, torchwq.mutex, torchwq.workqueue, lambda: torchwq.marshal([torchwq.workqueue()])):
        made()
    marshalled = torchwq.marshal(torchwq.workqueue())
    kept = torchwq.workqueue()
    while not roles[0].closed:
        pass
"""


def run(tmp_path: Path, source: str, *args: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(source))
    environment = {key: value for key, value in os.environ.items() if key != namespace.VARIABLE}
    return subprocess.run(
        [sys.executable, "-W", "error", "-X", "dev", str(script), *args],
        capture_output=True,
        text=True,
        timeout=180,
        cwd=tmp_path,
        env=environment,
    )


@pytest.mark.parametrize("backend", ["process", "thread"])
def test_every_public_object_at_module_level(tmp_path: Path, backend: str) -> None:
    done = run(tmp_path, OBJECTS, backend)
    assert (done.stderr, done.returncode) == ("", 0)


def test_ctrl_c_with_every_public_object_at_module_level(tmp_path: Path) -> None:
    ctrl_c = """
    os.kill(os.getpid(), __import__("signal").SIGINT)
    time.sleep(100)
    """
    done = run(tmp_path, OBJECTS + ctrl_c, "process")
    assert done.stderr.count("Traceback") == 1, done.stderr
    assert done.stderr.endswith("\nKeyboardInterrupt\n"), done.stderr
    assert "ignored" not in done.stderr


def test_objects_that_are_dropped_before_anything_has_started(tmp_path: Path) -> None:
    done = run(tmp_path, QUIET)
    assert (done.stderr, done.returncode) == ("", 0)
