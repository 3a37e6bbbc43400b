"""What do workers as threads cost, and when do they pay?

First, echoes through one worker that is a thread, beside ``queue.SimpleQueue`` with and without pickling, and tasks
beside ``ThreadPoolExecutor``. Then three kinds of work, done by workers of either backend and without any: decoding
that releases the GIL (PNG images, by Pillow), that holds it (pixels from text, by Python), and waiting (as for a disk
or a network).

    python -m benchmarks.threads [--quick] [--rounds N] [--json FILE] [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import io
import pickle
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

import torchwq
from benchmarks._harness import Measure, Results, Target, conclude, environment, interleave, parser, show_results

#: A tuple that cannot change is not copied between threads, a flat dict is, and so are dicts with lists, more slowly.
SMALL = {
    "small tuple": (1, "abc", 2.5),
    "small dict": {"id": 1, "name": "abc", "value": 2.5},
    "dict with a list": {"id": 1, "name": "abc", "values": [1, 2, 3]},
}
IN_FLIGHT = 32
TASK = "add two numbers"


# --- echoes ---


def echo(q: torchwq.WorkQueue) -> None:
    for question in q:
        q.write(question)


def echo_rate(write: Callable[[Any], Any], read: Callable[[], Any], message: Any, count: int) -> float:
    started = time.perf_counter()
    for _ in range(IN_FLIGHT):
        write(message)
    for _ in range(count - IN_FLIGHT):
        read()
        write(message)
    for _ in range(IN_FLIGHT):
        read()
    return count / (time.perf_counter() - started)


def queue_rate(backend: str, message: Any, count: int) -> float:
    with torchwq.workqueue() as q:
        worker = torchwq.map(1, echo, q, backend=backend)
        q.write(message)
        q.read()
        rate = echo_rate(q.write, q.read, message, count)
        q.write(None)
        worker.join()
    return rate


def simple_queue_rate(pickled: bool, message: Any, count: int) -> float:
    dumps: Callable[[Any], Any] = partial(pickle.dumps, protocol=5) if pickled else lambda obj: obj
    loads: Callable[[Any], Any] = pickle.loads if pickled else lambda obj: obj
    questions: queue.SimpleQueue[Any] = queue.SimpleQueue()
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def work() -> None:
        while (question := loads(questions.get())) is not None:
            answers.put(dumps(question))

    worker = threading.Thread(target=work)
    worker.start()
    rate = echo_rate(lambda obj: questions.put(dumps(obj)), lambda: loads(answers.get()), message, count)
    questions.put(dumps(None))
    worker.join()
    return rate


# --- tasks ---


def add(a: int, b: int) -> int:
    return a + b


def task_rate(make: Callable[[], Any], count: int) -> float:
    # The function of a module that can be imported. One of the script itself would travel as code, with each task.
    from benchmarks.threads import add

    with make() as pool:
        pool.submit(add, 1, 2).result()
        started = time.perf_counter()
        for future in [pool.submit(add, number, 1) for number in range(count)]:
            future.result()
        return count / (time.perf_counter() - started)


# --- kinds of work ---


class Work(Dataset[Any]):
    """Samples that cost about a millisecond or more each, of one of three kinds."""

    def __init__(self, kind: str, n: int) -> None:
        self.kind, self.n = kind, n
        pixels = np.random.default_rng(0).integers(0, 255, (160, 160, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        self.png = stream.getvalue()
        self.text = " ".join(map(str, pixels[:64, :64].ravel().tolist()))

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.kind == "png":
            return torch.from_numpy(np.asarray(Image.open(io.BytesIO(self.png))).copy())
        if self.kind == "text":
            return torch.tensor([int(word) for word in self.text.split()], dtype=torch.uint8)
        time.sleep(0.004)
        return torch.zeros(64, 64)


def loader_rate(kind: str, workers: int, backend: str, n: int) -> float:
    """Samples per second, with workers that have started already."""
    loader: Any = torchwq.DataLoader(
        Work(kind, n), batch_size=8, num_workers=workers, persistent_workers=workers > 0, backend=backend
    )
    for _ in loader:
        pass
    started = time.perf_counter()
    for _ in loader:
        pass
    return n / (time.perf_counter() - started)


KINDS = {"png": "decoding that releases the GIL", "text": "decoding that holds the GIL", "wait": "waiting"}


def main(options: argparse.Namespace) -> int:
    rounds = options.rounds or (3 if options.quick else 5)
    count = 20_000 if options.quick else 60_000
    print(", ".join(f"{key} {value}" for key, value in environment().items()), end="\n\n")
    tensor = torch.zeros(1_000_000)
    echoes: dict[str, dict[str, Measure]] = {
        name: {
            "threads": partial(queue_rate, "thread", message, count),
            "SimpleQueue, pickled": partial(simple_queue_rate, True, message, count),
            "SimpleQueue": partial(simple_queue_rate, False, message, count),
            "processes": partial(queue_rate, "process", message, count),
        }
        for name, message in SMALL.items()
    }
    echoes["4 MB tensor"] = {
        "threads": partial(queue_rate, "thread", tensor, count // 4),
        "processes": partial(queue_rate, "process", tensor.clone(), count // 4),
    }
    torchwq.warm_up()
    found = interleave("echoes/s", echoes, rounds)
    show_results(found, "threads")
    tasks = interleave(
        "tasks/s",
        {
            TASK: {
                "threads": partial(task_rate, partial(torchwq.BackgroundTaskPool, 2, backend="thread"), count // 10),
                "ThreadPoolExecutor": partial(task_rate, partial(ThreadPoolExecutor, 2), count // 10),
                "processes": partial(task_rate, partial(torchwq.BackgroundTaskPool, 2), count // 10),
            }
        },
        rounds,
    )
    show_results(tasks, "threads")
    n = 160 if options.quick else 400
    cases = {
        text: {
            "threads": partial(loader_rate, kind, workers, "thread", n),
            "processes": partial(loader_rate, kind, workers, "process", n),
            "no workers": partial(loader_rate, kind, 0, "process", n),
        }
        for kind, text in KINDS.items()
        for workers in (8 if kind == "wait" else 2,)
    }
    works = interleave("samples/s", cases, rounds)
    show_results(works, "threads")
    return conclude(targets(found, tasks), {"echoes": found, "tasks": tasks, "work": works}, options)


def targets(found: Results, tasks: Results) -> list[Target]:
    of_tasks = tasks.ratio(TASK, "threads", "ThreadPoolExecutor")
    echoes = [
        Target(
            f"{name} between threads: rate to SimpleQueue's with pickles",
            found.ratio(name, "threads", "SimpleQueue, pickled"),
            0.5,
        )
        for name in SMALL
    ]
    return [Target("tasks of a thread pool: rate to ThreadPoolExecutor's", of_tasks, 0.8), *echoes]


if __name__ == "__main__":
    sys.exit(main(parser("What do workers as threads cost?").parse_args()))
