"""What workers run in the tests of channels. Importable, so it travels by name."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import torch

import torchwq
from torchwq import Channel, ChannelState
from torchwq.transport import cleanup

OPEN = ChannelState.OPEN


def produce(channel: Channel, count: int, mapid: int) -> int:
    """Write ``(mapid, number)``; returns how many were taken."""
    return sum(channel.write((mapid, number)) is OPEN for number in range(count))


def produce_large(channel: Channel, count: int, mapid: int) -> None:
    """Tensors and bytes, some of them too large for a message."""
    for number in range(count):
        channel.write((mapid, number, torch.full((50,), float(number)), bytes(20_000)))


def write_from_threads(channel: Channel, threads: int, count: int, mapid: int) -> None:
    """Large enough that the socket does not take all of it, so that the process leaves with a backlog."""

    def write(thread: int) -> None:
        for number in range(count):
            channel.write((os.getpid(), mapid, thread, number, "x" * 2000))

    started = [threading.Thread(target=write, args=(each,)) for each in range(threads)]
    for each in started:
        each.start()
    for each in started:
        each.join()


def consume(channel: Channel) -> list[Any]:
    return list(channel)


def consume_sizes(channel: Channel) -> list[tuple[int, int, float, int]]:
    return [(mapid, number, float(tensor.sum()), len(data)) for mapid, number, tensor, data in channel]


def double(source: Channel, sink: Channel) -> None:
    with sink:
        for item in source:
            sink.write(item * 2)


def fail_after(source: Channel, sink: Channel, count: int) -> None:
    for _ in range(count):
        sink.write(source.read()[1])
    raise ValueError("no more")


def relay_inside(outer: Channel) -> None:
    """Answer on the channel that comes with each request."""
    for reply, value in outer:
        reply.write(value + 1)


def pass_channel(outer: Channel) -> None:
    inner = torchwq.channel()
    inner.write("from", "inside")
    outer.write({"deep": [inner]})


def read_until_closed(channel: Channel) -> tuple[ChannelState, Any]:
    return channel.read()


def write_until_closed(channel: Channel) -> ChannelState:
    while (state := channel.write("item")) is OPEN:
        pass
    return state


def write_and_die(channel: Channel, number: int) -> None:
    channel.write(os.getpid())
    os.kill(os.getpid(), number)


def write_and_wait(channel: Channel) -> None:
    channel.write(os.getpid())
    signal.pause()


def read_or_death(channel: Channel) -> str:
    try:
        return str(channel.read(timeout=30))
    except torchwq.WorkerDied as death:
        return str(death)


def read_and_die(channel: Channel) -> None:
    channel.read()
    os.kill(os.getpid(), signal.SIGKILL)


def die(channel: Channel) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hold(channel: Channel, gate: Channel) -> None:
    gate.read()


def add_one(source: Channel, sink: Channel) -> None:
    for tensor in source:
        tensor += 1
        sink.write(tensor)


def die_receiving(channel: Channel) -> None:
    """Be killed in the middle of a try to receive."""
    channel._core.socket.table.count_attempt()  # type: ignore[union-attr]
    os.kill(os.getpid(), signal.SIGKILL)


def leave_receiving(channel: Channel) -> None:
    """End in the middle of a try to receive, as a thread may that exit has not waited for."""
    channel._core.socket.table.count_attempt()  # type: ignore[union-attr]


def read_when_asked(channel: Channel, asked: Channel) -> list[int]:
    asked.read()
    numbers: list[int] = channel.read()[1].tolist()
    return numbers


def produce_plain_then_tensors(channel: Channel, count: int, mapid: int) -> None:
    for number in range(count):
        channel.write((mapid, number) if number < count // 2 + 20 * mapid else (mapid, torch.tensor(number)))


def consume_kinds(channel: Channel) -> list[tuple[int, int]]:
    return [(mapid, int(number)) for mapid, number in channel]


def write_to_what_comes_again(outer: Channel, count: int) -> list[ChannelState]:
    """Each channel comes twice, and is dropped in between."""
    states = []
    for _ in range(count):
        outer.read()
        channel = outer.read()[1]
        cleanup.finish()
        states.append(channel.write("item"))
        del channel
    return states
