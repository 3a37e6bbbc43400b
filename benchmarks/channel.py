"""How fast is a channel? Small objects from one or several writers to one or several readers, each in a process of
its own, beside the queues that Python has.

Writers are let go at once, and the time is taken until the last reader has read the last item. Every contender pickles
and unpickles. The raw socket is the limit for anything written in Python: the same pickles and system calls with
nothing around them. Items of one writer that do not come in order, or are lost, end the benchmark.

    python -m benchmarks.channel [--quick] [--rounds N] [--json FILE] [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import os
import pickle
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torchwq
from benchmarks._harness import Measure, Results, Target, conclude, environment, interleave, parser, show_results
from benchmarks._peers import FOREVER_S, FORK

SHAPES = [(1, 1), (1, 4), (4, 1), (4, 4)]


def check(numbers: list[tuple[int, int]], writers: int) -> None:
    """Raise unless the items of each writer are in order."""
    last = [-1] * writers
    for writer, number in numbers:
        if number <= last[writer]:
            raise AssertionError(f"item {number} of writer {writer} came after {last[writer]}")
        last[writer] = number


# --- torchwq ---


def write_items(channel: torchwq.Channel, ready: torchwq.Channel, go: torchwq.Channel, count: int, mapid: int) -> None:
    ready.write(mapid)
    go.read()
    for number in range(count):
        channel.write((mapid, number))
    ready.write(mapid)


def read_items(channel: torchwq.Channel, ready: torchwq.Channel, done: torchwq.Channel, writers: int) -> int:
    from benchmarks.channel import check

    ready.write("reader")
    numbers = list(channel)
    done.write(len(numbers))
    check(numbers, writers)
    return len(numbers)


def channel_rate(writers: int, readers: int, count: int) -> float:
    channel, ready, go, done = (torchwq.channel() for _ in range(4))
    reading = torchwq.map(readers, read_items, channel, ready, done, writers)
    writing = torchwq.map(writers, write_items, channel, ready, go, count // writers)
    for _ in range(readers + writers):
        ready.read()
    started = time.perf_counter()
    go.write(*range(writers))
    for _ in range(writers):
        ready.read()
    channel.close()
    read = sum(done.read()[1] for _ in range(readers))
    seconds = time.perf_counter() - started
    writing.join()
    reading.join()
    if read != count // writers * writers:
        raise AssertionError(f"{read} of {count} items came")
    return read / seconds


# --- peers: queues with put and get ---


def put_items(
    put: Callable[[Any], None], flush: Callable[[], None], mapid: int, count: int, ready: int, go: int
) -> None:
    os.write(ready, b"w")
    os.read(go, 1)
    for number in range(count):
        put((mapid, number))
    flush()
    os.write(ready, b"e")


def get_items(get: Callable[[], Any], writers: int, ready: int, done: int) -> None:
    os.write(ready, b"r")
    numbers = list(iter(get, None))
    os.write(done, len(numbers).to_bytes(8, "little"))
    check(numbers, writers)


def peer_rate(make: Callable[[], tuple[Any, Any, Any]], writers: int, readers: int, count: int) -> float:
    """The same with forked processes and None for the end."""
    put, get, flush = make()
    (ready, ready_end), (go_end, go), (done, done_end) = os.pipe(), os.pipe(), os.pipe()
    reading = [FORK.Process(target=get_items, args=(get, writers, ready_end, done_end)) for _ in range(readers)]
    writing = [
        FORK.Process(target=put_items, args=(put, flush, n, count // writers, ready_end, go_end))
        for n in range(writers)
    ]
    for process in reading + writing:
        process.start()
    for _ in reading + writing:
        os.read(ready, 1)
    started = time.perf_counter()
    os.write(go, b"g" * writers)
    for _ in writing:
        os.read(ready, 1)
    for _ in reading:
        put(None)
    read = sum(int.from_bytes(os.read(done, 8), "little") for _ in reading)
    seconds = time.perf_counter() - started
    for process in reading + writing:
        process.join()
    for fd in (ready, ready_end, go, go_end, done, done_end):
        os.close(fd)
    if read != count // writers * writers:
        raise AssertionError(f"{read} of {count} items came")
    return read / seconds


def no_flush() -> None:
    """What was put is there."""


def mp_queue() -> tuple[Any, Any, Any]:
    queue = FORK.Queue()

    def flush() -> None:
        queue.close()
        queue.join_thread()

    return queue.put, queue.get, flush


def simple_queue() -> tuple[Any, Any, Any]:
    queue = FORK.SimpleQueue()
    return queue.put, queue.get, no_flush


def faster_fifo() -> tuple[Any, Any, Any]:
    from faster_fifo import Queue

    queue = Queue(max_size_bytes=1 << 24)
    return partial(queue.put, timeout=FOREVER_S), partial(queue.get, timeout=FOREVER_S), no_flush


def raw_socket() -> tuple[Any, Any, Any]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    send, recv, dumps, loads = ours.send, theirs.recv, pickle.dumps, pickle.loads

    def put(item: Any) -> None:
        send(dumps(item, 5))

    def get() -> Any:
        return loads(recv(32768))

    return put, get, no_flush


PEERS = {"mp.Queue": mp_queue, "mp.SimpleQueue": simple_queue, "faster-fifo": faster_fifo, "raw socket": raw_socket}


def contenders(writers: int, readers: int, count: int) -> dict[str, Measure]:
    measures: dict[str, Measure] = {"torchwq": partial(channel_rate, writers, readers, count)}
    for name, make in PEERS.items():
        try:
            make()
        except ImportError:
            continue
        measures[name] = partial(peer_rate, make, writers, readers, count)
    return measures


def targets(results: Results) -> list[Target]:
    found = []
    for writers, readers in SHAPES[:3]:
        case = f"{writers} to {readers}"
        for peer in PEERS:
            limit = 1.3 if peer == "raw socket" else 1.0
            found.append(Target(f"{case}: rate to {peer}'s", results.ratio(case, "torchwq", peer), limit))
    return found


def main(options: argparse.Namespace) -> int:
    rounds = options.rounds or (3 if options.quick else 5)
    count = 40_000 if options.quick else 100_000
    print(", ".join(f"{key} {value}" for key, value in environment().items()), end="\n\n")
    torchwq.warm_up()
    cases = {f"{writers} to {readers}": contenders(writers, readers, count) for writers, readers in SHAPES}
    results = interleave("items/s", cases, rounds)
    show_results(results, "torchwq")
    return conclude(targets(results), {"channels": results}, options)


if __name__ == "__main__":
    sys.exit(main(parser("How fast is a channel?").parse_args()))
