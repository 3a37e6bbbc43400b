"""Measurements that need a fresh process: `python -m benchmarks._probes NAME` prints its figures as JSON.

How long the first use takes can be measured only once per process, and memory only where nothing else has
used any.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import queue
import sys
import time
from collections.abc import Callable
from multiprocessing.queues import SimpleQueue
from typing import Any

QUESTIONS = 100_000
MESSAGES = 20_000
IN_FLIGHT = 16
IDLE_S = 10


def answer_once(answers: SimpleQueue[str]) -> None:
    import torch

    answers.put(torch.__version__)


def first_use_of_spawn() -> dict[str, float]:
    """Seconds from here to the first answer of a spawned process that imports torch."""
    started = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    process = context.Process(target=answer_once, args=(answers,))
    process.start()
    answers.get()
    seconds = time.perf_counter() - started
    process.join()
    return {"seconds": seconds}


def first_use_of_torchwq() -> dict[str, float]:
    """Seconds from the import of torchwq, this process's own, to the first answer of its first worker."""
    import torchwq

    def write_version(q: torchwq.WorkQueue) -> None:
        import torch

        q.write(torch.__version__)

    started = time.perf_counter()
    with torchwq.workqueue() as q:
        workers = torchwq.map(1, write_version, q)
        q.read()
        seconds = time.perf_counter() - started
        workers.join()
    return {"seconds": seconds}


def memory() -> dict[str, float]:
    """What a waiting question costs the owner, in bytes, and what of that is left after answer or close."""
    import torchwq

    def echo(q: torchwq.WorkQueue) -> None:
        for question in q:
            q.write(question)

    def fill(q: torchwq.WorkQueue) -> None:
        for place in range(QUESTIONS):
            q.write((place, "abc", 2.5))

    with torchwq.workqueue() as q:  # whatever is needed once
        workers = torchwq.map(1, echo, q)
        q.write((0, "abc", 2.5))
        q.read()
        q.write(None)
        workers.join()

    empty = resident_bytes()
    with torchwq.workqueue() as q:
        fill(q)
        full = resident_bytes()
        workers = torchwq.map(1, echo, q)
        for _ in range(QUESTIONS):
            q.read()
        answered = resident_bytes()
        q.write(None)
        workers.join()
    q = torchwq.workqueue()
    fill(q)
    q.close()
    closed = resident_bytes()
    return {
        "waiting": (full - empty) / QUESTIONS,
        "left_when_answered": (answered - empty) / QUESTIONS,
        "left_when_closed": (closed - empty) / QUESTIONS,
    }


def resident_bytes() -> int:
    """What this process occupies in memory."""
    gc.collect()
    try:
        with open("/proc/self/statm", encoding="ascii") as statm:
            pages = int(statm.read().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        import psutil

        return int(psutil.Process().memory_info().rss)


def processor_time() -> dict[str, float]:
    """Microseconds of processor time that a message costs the owner and the worker, there and back, by its kind."""
    import torch

    shared = torch.ones(16)
    kinds: dict[str, Callable[[], Any]] = {
        "small tuple": lambda: (1, "abc", 2.5),
        "same 16 floats": lambda: shared,
        "fresh 16 floats": lambda: torch.empty(16),
        "dict of 10 fresh tensors": lambda: {f"key{place}": torch.empty(16) for place in range(10)},
    }
    return {
        f"{name}, {side}": microseconds
        for name, make in kinds.items()
        for side, microseconds in zip(("owner", "worker"), _processor_time_of(make), strict=True)
    }


def _processor_time_of(make: Callable[[], Any]) -> tuple[float, float]:
    import torchwq

    def echo(q: torchwq.WorkQueue) -> None:
        import time

        for _ in range(2):
            q.read()
            started, count = time.process_time(), 0
            while (question := q.read()) is not None:
                q.write(question)
                count += 1
            q.write((time.process_time() - started) / count)

    def run(count: int) -> tuple[float, float]:
        q.write("begin")
        started = time.process_time()
        for _ in range(IN_FLIGHT):
            q.write(make())
        for _ in range(count - IN_FLIGHT):
            q.read()
            q.write(make())
        for _ in range(IN_FLIGHT):
            q.read()
        owner = time.process_time() - started
        started = time.process_time()
        for _ in range(count):
            make()
        owner -= time.process_time() - started
        q.write(None)
        return owner / count * 1e6, q.read() * 1e6

    with torchwq.workqueue() as q:
        workers = torchwq.map(1, echo, q)
        run(1000)
        found = run(MESSAGES)
        workers.join()
    return found


def idle() -> dict[str, float]:
    """Milliseconds of processor time a second that a reader costs its process while nothing comes."""
    import torchwq

    def sleep(q: torchwq.WorkQueue) -> None:
        import time

        q.write("here")
        started = time.process_time()
        q.read()
        q.write(time.process_time() - started)

    with torchwq.workqueue() as q:
        workers = torchwq.map(1, sleep, q)
        q.read()
        started = time.process_time()
        try:
            q.read(timeout=IDLE_S)
        except queue.Empty:
            owner = time.process_time() - started
        q.write(None)
        worker = q.read()
        workers.join()
    return {"owner": owner / IDLE_S * 1000, "worker": worker / IDLE_S * 1000}


PROBES = {probe.__name__: probe for probe in (first_use_of_spawn, first_use_of_torchwq, memory, processor_time, idle)}

if __name__ == "__main__":  # multiprocessing's spawned process imports this file again
    print(json.dumps(PROBES[sys.argv[1]]()))
