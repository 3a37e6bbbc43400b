"""How fast is a workqueue? Echoes through one worker, beside the other queues that Python has.

A *round trip* has one message in flight: it shows what waking up the other process costs. *Pipelined* keeps
several in flight, as an owner does that feeds workers: it shows the work per message. Both go through one
worker process that unpickles and pickles, so that all contenders do the same. They keep their worker over
the whole run and take turns (see `_harness`); how many messages a measurement takes is chosen for each, so
that all are measured equally long. Then: several workers, more than there are cores, each with a queue of its
own; how long workers take to start, what waiting questions cost in memory, and what messages and waiting
readers cost in processor time.

    python -m benchmarks.queue [--quick] [--rounds N] [--json FILE] [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file, whose folder would hide the standard `queue` behind this one
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torchwq
from benchmarks._harness import (
    Measure,
    Results,
    Target,
    conclude,
    environment,
    interleave,
    number,
    parser,
    show_results,
    table,
)
from benchmarks._peers import FORK, MB, Case, Peer, answer_queue, fork, start_peers

ROOT = Path(__file__).resolve().parent.parent

SMALL = (1, "abc", 2.5)
DICT = {f"key{place:03}": place * 0.5 for place in range(100)}
LARGE = b"x" * MB
WORKERS = (2, 8, 32)
CASES = [
    Case("small tuple, round trip", SMALL, 1),
    Case("small tuple, pipelined", SMALL, 32),
    Case("dict of 100 floats, round trip", DICT, 1),
    Case("dict of 100 floats, pipelined", DICT, 32),
    Case("1 MB bytes, round trip", LARGE, 1),
    Case("1 MB bytes, pipelined", LARGE, 4),
]


# --- echoes ---


def echo_rate(peer: Peer, case: Case, count: int) -> float:
    """Messages per second, there and back."""
    write, read, message = peer.write, peer.read, case.message
    started = time.perf_counter()
    for _ in range(case.in_flight):
        write(message)
    for _ in range(count - case.in_flight):
        read()
        write(message)
    for _ in range(case.in_flight):
        read()
    return count / (time.perf_counter() - started)


def measure_echo(peer: Peer, case: Case, seconds: float) -> Measure:
    """A measurement of about `seconds`; checks that the message comes back as it was, and warms up."""
    peer.write(case.message)
    if peer.read() != case.message:
        raise AssertionError(f"{peer.name} changed the message of {case.name}")
    trial = 20 if case.large else 500
    echo_rate(peer, case, trial)
    rate = echo_rate(peer, case, trial)
    return partial(echo_rate, peer, case, max(2 * case.in_flight, int(rate * seconds)))


# --- several workers ---


def echo_rate_of(ends: Sequence[tuple[Callable[[Any], Any], Callable[[], Any]]], count: int) -> float:
    """Messages per second, there and back, with one in flight for each of the workers at these ends."""
    started = time.perf_counter()
    for _ in range(count // len(ends)):
        for write, _ in ends:
            write(SMALL)
        for _, read in ends:
            read()
    return count // len(ends) * len(ends) / (time.perf_counter() - started)


def echo_through_queues(workers: int, count: int) -> float:
    queues = [torchwq.workqueue() for _ in range(workers)]
    maps = [torchwq.map(1, answer_queue, q) for q in queues]
    ends = [(q.write, q.read) for q in queues]
    echo_rate_of(ends, 20 * workers)
    rate = echo_rate_of(ends, count)
    for q, started in zip(queues, maps, strict=True):
        q.write(None)
        started.join()
        q.close()
    return rate


def echo_through_pipes(workers: int, count: int) -> float:
    pipes = [FORK.Pipe() for _ in range(workers)]
    processes = [fork(theirs.recv, theirs.send) for _, theirs in pipes]
    ends = [(ours.send, ours.recv) for ours, _ in pipes]
    echo_rate_of(ends, 20 * workers)
    rate = echo_rate_of(ends, count)
    for (ours, theirs), process in zip(pipes, processes, strict=True):
        ours.send(None)
        process.join()
        ours.close()
        theirs.close()
    return rate


def measure_workers(rounds: int, count: int) -> Results:
    return interleave(
        "messages/s",
        {
            f"{workers} workers, one in flight each": {
                "torchwq": partial(echo_through_queues, workers, count),
                "mp.Pipe": partial(echo_through_pipes, workers, count),
            }
            for workers in WORKERS
        },
        rounds,
    )


def measure_echoes(rounds: int, seconds: float) -> Results:
    peers = start_peers()
    measures = {
        case.name: {peer.name: measure_echo(peer, case, seconds) for peer in peers if peer.suits(case)}
        for case in CASES
    }
    results = interleave("messages/s", measures, rounds)
    for peer in peers:
        peer.close()
    return results


# --- starting workers ---


def answer_once(q: torchwq.WorkQueue) -> None:
    q.write(0)


def start_torchwq() -> float:
    """Seconds from `map` to the first answer of two workers."""
    with torchwq.workqueue() as q:
        started = time.perf_counter()
        workers = torchwq.map(2, answer_once, q)
        q.read()
        seconds = time.perf_counter() - started
        workers.join()
    return seconds


def start_forks() -> float:
    """The same for two processes that multiprocessing forks."""
    answers = FORK.SimpleQueue()
    processes = [FORK.Process(target=answers.put, args=(0,)) for _ in range(2)]
    started = time.perf_counter()
    for process in processes:
        process.start()
    answers.get()
    seconds = time.perf_counter() - started
    for process in processes:
        process.join()
    answers.close()
    return seconds


def probe(name: str) -> dict[str, float]:
    """The figures of one of `_probes`, measured in a fresh process."""
    command = [sys.executable, "-m", "benchmarks._probes", name]
    printed = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, timeout=120).stdout
    figures: dict[str, float] = json.loads(printed)
    return figures


def measure_starts(rounds: int, first_rounds: int) -> tuple[Results, Results]:
    """Seconds to the first answer: warm, and for the first use in a process."""
    torchwq.warm_up()
    warm: dict[str, Callable[[], float]] = {"torchwq": start_torchwq, "mp fork": start_forks}
    for measure in warm.values():
        measure()
    first: dict[str, Any] = {
        "torchwq": lambda: probe("first_use_of_torchwq")["seconds"],
        "mp spawn": lambda: probe("first_use_of_spawn")["seconds"],
    }
    return (
        interleave("seconds to the first answer", {"two workers, warm": warm}, rounds),
        interleave("seconds to the first answer", {"first use in a process": first}, first_rounds),
    )


# --- what must be reached ---


def echo_targets(echoes: Results) -> list[Target]:
    def target(case: str, other: str, limit: float) -> Target:
        return Target(f"{case}: rate to {other}'s", echoes.ratio(case, "torchwq", other), limit)

    return [
        target("small tuple, pipelined", "mp.SimpleQueue", 2.5),
        target("small tuple, pipelined", "faster-fifo", 1.7),
        target("small tuple, pipelined", "raw socket", 1.5),
        target("small tuple, round trip", "mp.Pipe", 5.0),
        target("1 MB bytes, round trip", "mp.Queue", 1.0),
        target("1 MB bytes, pipelined", "mp.Queue", 1.0),
    ]


def start_targets(warm: Results, first: Results) -> list[Target]:
    beyond = [ours - theirs for ours, theirs in zip(*warm.figures["two workers, warm"].values(), strict=True)]
    ratio = first.ratio("first use in a process", "torchwq", "mp spawn")
    return [
        Target("two workers, warm: time beyond mp fork's", median(beyond), 0.1, "s", at_most=True),
        Target("first use in a process: time to mp spawn's", ratio, 1.0, at_most=True),
    ]


def worker_targets(workers: Results) -> list[Target]:
    return [
        Target(f"{case}: rate to mp.Pipe's", workers.ratio(case, "torchwq", "mp.Pipe"), 1.5) for case in workers.figures
    ]


def processor_targets(messages: dict[str, float], idle: dict[str, float]) -> list[Target]:
    both = messages["dict of 10 fresh tensors, owner"] + messages["dict of 10 fresh tensors, worker"]
    return [
        Target("dict of 10 fresh tensors: processor time of both sides", both, 25, "µs", at_most=True),
        *(Target(f"waiting, {side}: processor time a second", idle[side], 0.1, "ms", at_most=True) for side in idle),
    ]


def memory_targets(memory: dict[str, float]) -> list[Target]:
    def target(text: str, figure: str, limit: float) -> Target:
        return Target(text, memory[figure] / 1000, limit, "KB", at_most=True)

    return [
        target("100,000 waiting questions: memory of each", "waiting", 1.0),
        target("... what is left of it when all are answered", "left_when_answered", 0.1),
        target("... what is left of it when the queue is closed", "left_when_closed", 0.1),
    ]


def main(options: argparse.Namespace) -> int:
    rounds = options.rounds or (3 if options.quick else 5)
    print(", ".join(f"{key} {value}" for key, value in environment().items()), end="\n\n")

    echoes = measure_echoes(rounds, seconds=0.08 if options.quick else 0.3)
    show_results(echoes, "torchwq")
    if "faster-fifo" not in echoes.contenders:
        print("faster-fifo is not installed and was skipped: pip install faster-fifo\n")
    workers = measure_workers(rounds, 4000 if options.quick else 20_000)
    show_results(workers, "torchwq")
    warm, first = measure_starts(rounds, 1 if options.quick else min(rounds, 3))
    show_results(warm, "torchwq")
    show_results(first, "torchwq")

    messages = probe("processor_time")
    print(table("processor time", list(messages), ["µs a message"], lambda kind, _: number(messages[kind])), end="\n\n")

    targets = echo_targets(echoes) + worker_targets(workers) + start_targets(warm, first)
    targets += processor_targets(messages, probe("idle")) + memory_targets(probe("memory"))
    groups = {"echoes": echoes, "workers": workers, "warm start": warm, "first use": first}
    return conclude(targets, groups, options)


sys.exit(main(parser("How fast is a workqueue?").parse_args()))
