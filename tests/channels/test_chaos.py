"""Writers and readers of a channel that are killed at random: the others go on, in order, and nothing hangs."""

from __future__ import annotations

import os
import queue
import random
import signal
import time
from collections import Counter

import pytest
import torch

import torchwq
from torchwq import Channel, ChannelState
from torchwq.workers import worker


def write_for_ever(channel: Channel, name: int) -> None:
    number, state = 0, ChannelState.OPEN
    while state is ChannelState.OPEN:
        try:
            state = channel.write((name, number, torch.full((4,), float(number)) if number % 50 == 0 else None))
            number += 1
        except torchwq.WorkerDied:  # a relay was killed: the others go on
            continue


def relay(source: Channel, sink: Channel) -> None:
    item = None
    while True:
        try:
            if item is None:
                state, item = source.read()
                if state is ChannelState.DRAINED:
                    return
            name, number, tensor = item
            assert tensor is None or float(tensor.sum()) == 4 * number
            sink.write((os.getpid(), name, number))
            item = None
        except torchwq.WorkerDied:
            continue


def kill_one(workers: dict[int, torchwq.Map]) -> None:
    key = random.choice(list(workers))
    pid = workers.pop(key).pids[0]
    if pid is not None:
        os.kill(pid, signal.SIGKILL)


def run_chaos(seconds: float, capacity: int | None) -> Counter[str]:
    seen: Counter[str] = Counter()
    source, sink = torchwq.channel(capacity), torchwq.channel(capacity)
    writers: dict[int, torchwq.Map] = {}
    relays: dict[int, torchwq.Map] = {}
    gone: list[torchwq.Map] = []
    last: dict[tuple[int, int], int] = {}
    number, end, next_kill = 0, time.monotonic() + seconds, time.monotonic() + 0.5
    # On a busy machine, until there was something to see.
    while time.monotonic() < end or (min(seen["items"] - 50, seen["kills"]) <= 0 and time.monotonic() < end + 40):
        while len(writers) < 2:
            number += 1
            writers[number] = torchwq.map(1, write_for_ever, source, number)
        while len(relays) < 2:
            number += 1
            relays[number] = torchwq.map(1, relay, source, sink)
        try:
            _, (reader, name, item) = sink.read(timeout=20)
        except torchwq.WorkerDied:
            seen["told"] += 1
            continue
        assert item > last.get((reader, name), -1), "out of order, or twice"
        last[reader, name] = item
        seen["items"] += 1
        if time.monotonic() > next_kill:
            next_kill = time.monotonic() + 0.4
            victims = random.choice((writers, relays))
            gone += victims.values()
            kill_one(victims)
            seen["kills"] += 1
    source.close()
    until = time.monotonic() + 20
    while True:
        someone_lives = bool(worker.active_workers())  # how long they take to end is the machine's affair
        try:
            sink.read(timeout=5)
        except queue.Empty:
            assert someone_lives, "nobody is left, and that is not told"
            assert time.monotonic() < until, "the workers do not end"
        except torchwq.WorkerDied as death:
            if "nobody is left" in str(death):
                break
            seen["told"] += 1
    sink.close()
    for each in [*gone, *writers.values(), *relays.values()]:
        try:
            each.join(20)
        except torchwq.WorkerDied:
            seen["ended by a death"] += 1
    return seen


@pytest.mark.parametrize("capacity", [None, 5])
def test_short_chaos(capacity: int | None) -> None:
    seen = run_chaos(5, capacity)
    assert seen["items"] > 50
    assert seen["kills"] > 0


@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.parametrize("capacity", [None, 5])
def test_long_chaos(capacity: int | None) -> None:
    seen = run_chaos(float(os.environ.get("TORCHWQ_SOAK_SECONDS", "600")), capacity)
    print(dict(seen))
    assert seen["kills"] > 10
