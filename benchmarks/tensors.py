"""How fast do tensors travel? Through one worker, beside torch.multiprocessing's queues and the limit, a memcpy.

Every contender has one worker process, which sends back what it gets; for large tensors it sends back their sum. The
peers are queues of `torch.multiprocessing`, with each of torch's two ways to share memory, and a queue that carries the
pickled values. They keep their worker over the whole run and take turns (see `_harness`). Then: whether anything
grows while a million tensors pass.

    python -m benchmarks.tensors [--quick] [--rounds N] [--growth N] [--json FILE] [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import gc
import os
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.multiprocessing

import torchwq
from benchmarks._harness import Measure, Results, Target, conclude, environment, interleave, parser, show_results
from benchmarks._peers import open_queue

FORK = torch.multiprocessing.get_context("fork")
MB = 1_000_000
STRATEGIES = {"fd": "file_descriptor", "fs": "file_system"}


# --- cases ---


@dataclass(frozen=True)
class Case:
    """Messages of one kind, `in_flight` of them at a time. `prepare` gives what makes one message."""

    name: str
    prepare: Callable[[], Callable[[], Any]]
    in_flight: int = 16
    adds_up: bool = False
    """Whether the worker answers with the sum."""
    share: float = 1.0
    """How long it is measured, compared with the others."""


def same(make: Callable[[], Any]) -> Callable[[], Callable[[], Any]]:
    """The same message again and again."""

    def prepare() -> Callable[[], Any]:
        message = make()
        return lambda: message

    return prepare


def small() -> torch.Tensor:
    return torch.ones(16)


def copies_of(elements: int) -> Callable[[], Callable[[], torch.Tensor]]:
    """A tensor that is new to everyone, in private memory that is warm."""

    def prepare() -> Callable[[], torch.Tensor]:
        source = torch.ones(elements)
        return source.clone

    return prepare


def born_shared(elements: int) -> Callable[[], Callable[[], torch.Tensor]]:
    def prepare() -> Callable[[], torch.Tensor]:
        return lambda: torchwq.empty(elements).fill_(1.0)

    return prepare


# Private at first: each contender shares it in its own way when it is first written. The other one is torch's.
SAME = Case("same 16-float tensor", same(small))
SHARED = Case("same one, of share_memory_()", same(lambda: small().share_memory_()))
FRESH = Case("fresh 16-float tensor", lambda: small)
FRESH_4MB = Case("fresh 4 MB tensor, summed", copies_of(MB), adds_up=True)
FRESH_64MB = Case("fresh 64 MB tensor, summed", copies_of(16 * MB), in_flight=4, adds_up=True, share=2.0)
DICT = Case("dict of 10 fresh tensors", lambda: lambda: {f"field {index}": small() for index in range(10)})
ARRAY = Case("4 MB numpy array", same(lambda: np.ones(MB, np.float32)))
BYTES = Case("1 MB bytes", same(lambda: b"x" * MB))
TUPLE = Case("small tuple", same(lambda: (1, "abc", 2.5)))
CASES = [SAME, SHARED, FRESH, FRESH_4MB, FRESH_64MB, DICT, ARRAY, BYTES, TUPLE]


# --- contenders ---


@dataclass(frozen=True)
class Peer:
    """A running contender."""

    name: str
    write: Callable[[Any], None]
    read: Callable[[], Any]
    close: Callable[[], None]
    strategy: str = "file_descriptor"
    suits: Callable[[Case], bool] = lambda case: True


def answer(read: Callable[[], Any], write: Callable[[Any], None]) -> None:
    """What every worker does, until it reads None: `(whether to add up, message)`."""
    while True:
        question = read()
        if question is None:
            return
        adds_up, message = question if type(question) is tuple and len(question) == 2 else (False, question)
        write(message.sum().item() if adds_up else message)
        del question, message


def answer_queue(q: torchwq.WorkQueue) -> None:
    from benchmarks import tensors

    tensors.answer(q.read, q.write)


def start_torchwq() -> Peer:
    q, close = open_queue(answer_queue)
    return Peer("torchwq", q.write, q.read, close)


def serve(strategy: str, questions: Any, answers: Any) -> None:
    torch.multiprocessing.set_sharing_strategy(strategy)
    torch.set_num_threads(1)
    answer(questions.get, answers.put)


def start_peer(kind: str, short: str) -> Peer:
    """Two queues of torch.multiprocessing, one there and one back."""
    questions, answers = getattr(FORK, kind)(), getattr(FORK, kind)()
    process = FORK.Process(target=serve, args=(STRATEGIES[short], questions, answers), daemon=True)
    process.start()

    def close() -> None:
        questions.put(None)
        process.join()
        for each in (questions, answers):
            each.close()

    def suits(case: Case) -> bool:
        # SimpleQueue.put waits until all is in the pipe: two sides that put large messages never get done.
        return kind == "Queue" or case not in (ARRAY, BYTES)

    return Peer(f"{kind} {short}", questions.put, answers.get, close, STRATEGIES[short], suits)


def to_arrays(message: Any) -> Any:
    if type(message) is torch.Tensor:
        return message.numpy()
    return {key: value.numpy() for key, value in message.items()} if type(message) is dict else message


def to_tensors(message: Any) -> Any:
    if type(message) is np.ndarray:
        return torch.from_numpy(message)
    return {key: torch.from_numpy(value) for key, value in message.items()} if type(message) is dict else message


def serve_values(pack: Callable[[Any], Any], unpack: Callable[[Any], Any], questions: Any, answers: Any) -> None:
    torch.set_num_threads(1)
    answer(lambda: unpack(questions.get()), lambda message: answers.put(pack(message)))


def start_values(name: str, pack: Callable[[Any], Any], unpack: Callable[[Any], Any]) -> Peer:
    """A queue that carries the tensors' values, as ``pack`` makes them."""
    questions, answers = FORK.SimpleQueue(), FORK.SimpleQueue()
    process = FORK.Process(target=serve_values, args=(pack, unpack, questions, answers), daemon=True)
    process.start()

    def write(message: Any) -> None:
        questions.put(pack(message))

    def close() -> None:
        write(None)
        process.join()

    return Peer(f"SimpleQueue {name}", write, lambda: unpack(answers.get()), close, suits=lambda case: case in SMALL)


def start_by_value() -> list[Peer]:
    """Pickles of tensors, and of arrays, which cost a tenth."""
    return [
        start_values("pickled", partial(pickle.dumps, protocol=5), pickle.loads),
        start_values("arrays", to_arrays, to_tensors),
    ]


SMALL = (SAME, SHARED, FRESH, DICT, TUPLE)


def run(peer: Peer, case: Case, make: Callable[[], Any], count: int) -> float:
    """Messages per second, there and back."""
    torch.multiprocessing.set_sharing_strategy(peer.strategy)
    write, read, adds_up = peer.write, peer.read, case.adds_up

    def send() -> None:
        message = make()
        write((True, message) if adds_up else message)

    started = time.perf_counter()
    for _ in range(case.in_flight):
        send()
    for _ in range(count - case.in_flight):
        read()
        send()
    for _ in range(case.in_flight):
        read()
    return count / (time.perf_counter() - started)


def measure(peer: Peer, case: Case, seconds: float) -> Measure:
    """A measurement of about `seconds`, warmed up."""
    torch.multiprocessing.set_sharing_strategy(peer.strategy)
    make = case.prepare()
    run(peer, case, make, 2 * case.in_flight)
    rate = run(peer, case, make, 6 * case.in_flight)
    return partial(run, peer, case, make, max(3 * case.in_flight, int(rate * seconds * case.share)))


def measure_memcpy(elements: int, case: Case) -> Measure:
    """The limit: what making a tensor, copying it into warm memory and adding up cost in this process, with one thread.

    As many pieces of warm memory take turns as there are messages in flight.
    """
    make = case.prepare()
    targets = [torch.ones(elements) for _ in range(case.in_flight)]

    def once() -> float:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            count = max(10, 400 * MB // elements // 4)
            started = time.perf_counter()
            for number in range(count):
                target = targets[number % len(targets)]
                target.copy_(make())
                target.sum().item()
            return count / (time.perf_counter() - started)
        finally:
            torch.set_num_threads(threads)

    return once


def measure_echoes(rounds: int, seconds: float) -> Results:
    peers = [start_peer(kind, short) for kind in ("Queue", "SimpleQueue") for short in STRATEGIES]
    peers = [start_torchwq(), *peers, *start_by_value()]
    torch.multiprocessing.set_sharing_strategy("file_descriptor")
    measures: dict[str, dict[str, Measure]] = {
        case.name: {peer.name: measure(peer, case, seconds) for peer in peers if peer.suits(case)} for case in CASES
    }
    born = Case(FRESH_4MB.name, born_shared(MB), adds_up=True)
    measures[FRESH_4MB.name]["torchwq.empty"] = measure(peers[0], born, seconds)
    measures[FRESH_4MB.name]["memcpy + sum"] = measure_memcpy(MB, FRESH_4MB)
    measures[FRESH_64MB.name]["memcpy + sum"] = measure_memcpy(16 * MB, FRESH_64MB)
    results = interleave("messages/s", measures, rounds)
    for peer in peers:
        torch.multiprocessing.set_sharing_strategy(peer.strategy)
        peer.close()
    return results


# --- growth ---


def footprint() -> dict[str, int]:
    gc.collect()
    with open("/proc/self/statm", encoding="ascii") as statm:
        resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    with open("/proc/self/maps", encoding="ascii") as maps:
        mappings = sum(1 for _ in maps)
    stats = torchwq.memory_stats()
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "mappings": mappings,
        "pool bytes": stats.bytes,
        "resident bytes": resident,
    }


def answer_and_report(q: torchwq.WorkQueue) -> None:
    from benchmarks import tensors

    for question in q:
        q.write(tensors.footprint() if question == "footprint" else question)


def measure_growth(count: int) -> dict[str, float]:
    """By what factor each thing has grown from message 10,000 to the end, at the owner and at the worker."""
    with torchwq.workqueue() as q:
        workers = torchwq.map(1, answer_and_report, q)

        def echo(times: int) -> None:
            for _ in range(16):
                q.write(small())
            for _ in range(times - 16):
                q.read()
                q.write(small())
            for _ in range(16):
                q.read()

        def look() -> dict[str, int]:
            q.write("footprint")
            theirs = q.read()
            return {
                **{f"owner's {key}": value for key, value in footprint().items()},
                **{f"worker's {key}": value for key, value in theirs.items()},
            }

        echo(10_000)
        before = look()
        echo(count - 10_000)
        after = look()
        q.write(None)
        workers.join()
    return {key: after[key] / before[key] for key in before if before[key]}


def targets(echoes: Results, growth: dict[str, float], count: int) -> list[Target]:
    def target(case: Case, other: str, limit: float) -> Target:
        return Target(f"{case.name}: rate to {other}'s", echoes.ratio(case.name, "torchwq", other), limit)

    same_rate, tuple_rate = echoes.median(SAME.name, "torchwq"), echoes.median(TUPLE.name, "torchwq")
    assert same_rate is not None
    assert tuple_rate is not None
    grown = max(growth, key=lambda key: growth[key])
    return [
        target(SAME, "Queue fd", 90),
        target(SAME, "Queue fs", 10),
        target(SAME, "SimpleQueue arrays", 4),
        Target("same 16-float tensor: rate to that of a small tuple", same_rate / tuple_rate, 1 / 3),
        target(FRESH, "Queue fd", 90),
        target(FRESH, "Queue fs", 40),
        target(FRESH, "SimpleQueue arrays", 3),
        target(FRESH_4MB, "memcpy + sum", 0.7),
        target(DICT, "Queue fd", 20),
        target(BYTES, "Queue fd", 3),
        target(ARRAY, "Queue fd", 3),
        Target(f"growth over {count:,} tensors, the most: {grown}", growth[grown], 1.01, at_most=True),
    ]


def main(options: argparse.Namespace) -> int:
    rounds = options.rounds or (3 if options.quick else 5)
    print(", ".join(f"{key} {value}" for key, value in environment().items()), end="\n\n")
    echoes = measure_echoes(rounds, seconds=0.15 if options.quick else 0.5)
    show_results(echoes, "torchwq")
    count = options.growth or (50_000 if options.quick else 1_000_000)
    growth = measure_growth(count)
    for name, factor in growth.items():
        print(f"{name:32}{factor:8.4f} × from tensor 10,000 to {count:,}")
    print()
    return conclude(targets(echoes, growth, count), {"echoes": echoes}, options)


if __name__ == "__main__":
    arguments = parser("How fast do tensors travel?")
    arguments.add_argument("--growth", type=int, default=None, help="how many tensors pass in the growth test")
    sys.exit(main(arguments.parse_args()))
