"""A thread that waits at a channel is woken by the failures that it is told of: it does not poll for them."""

from __future__ import annotations

import gc
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Sequence

import pytest

import torchwq
from tests.channels import jobs
from tests.conftest import wait_until
from torchwq.channels import core, reading
from torchwq.transport import polling

#: Longer than any test may take.
NEVER = 1000.0


@pytest.fixture(autouse=True)
def _nothing_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (core, reading):
        monkeypatch.setattr(module, "POLL_INTERVAL", NEVER)


def is_waiting(channel: torchwq.Channel) -> bool:
    """Whether a reader in this process waits for longer than a moment."""
    return bool(channel._core.failures._waiting)


def soon(channel: torchwq.Channel, action: Callable[[], object]) -> threading.Thread:
    """Do it when the reader sleeps; in a daemon thread, which does not count as one that could write."""

    def run() -> None:
        wait_until(lambda: is_waiting(channel))
        time.sleep(0.3)  # its first look is over
        action()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def test_a_reader_is_woken_by_a_death() -> None:
    channel, gate = torchwq.channel(), torchwq.channel()
    holder = torchwq.map(1, jobs.hold, channel, gate)
    writer = torchwq.map(1, jobs.write_and_wait, channel)
    pid = channel.read(timeout=20)[1]
    thread = soon(channel, lambda: os.kill(pid, signal.SIGKILL))
    started = time.monotonic()
    with pytest.raises(torchwq.WorkerDied, match="SIGKILL"):
        channel.read(timeout=30)
    assert time.monotonic() - started < 10
    with pytest.raises(torchwq.WorkerDied):
        writer.join(20)
    gate.write("go")
    holder.join(20)
    thread.join(20)


def test_a_reader_is_woken_by_the_death_of_one_who_came_while_it_waited() -> None:
    channel, gate = torchwq.channel(), torchwq.channel()
    holder = torchwq.map(1, jobs.hold, channel, gate)
    wait_until(lambda: any(True for _ in channel._core.socket.table.other_slots()))  # type: ignore[union-attr]
    thread = soon(channel, lambda: torchwq.map(1, jobs.die, channel))
    started = time.monotonic()
    with pytest.raises(torchwq.WorkerDied, match="SIGKILL"):
        channel.read(timeout=30)
    assert time.monotonic() - started < 15
    gate.write("go")
    holder.join(20)
    thread.join(20)


def test_a_reader_is_woken_when_the_last_writer_leaves() -> None:
    channel, gate = torchwq.channel(), torchwq.channel()
    holder = torchwq.map(1, jobs.hold, channel, gate)
    wait_until(lambda: any(True for _ in channel._core.socket.table.other_slots()))  # type: ignore[union-attr]
    thread = soon(channel, lambda: gate.write("go"))
    started = time.monotonic()
    with pytest.raises(torchwq.WorkerDied, match="nobody is left"):
        channel.read(timeout=30)
    assert time.monotonic() - started < 10
    holder.join(20)
    thread.join(20)


def test_readers_of_several_processes_tell_each_other_that_all_wait() -> None:
    channel = torchwq.channel()
    readers = torchwq.map(2, jobs.read_or_death, channel)
    with pytest.raises(torchwq.WorkerDied, match="nobody is left"):
        channel.read(timeout=30)
    del channel  # this process might write
    gc.collect()
    assert all("nobody is left" in each for each in readers.join(20))


def test_a_watched_channel_is_ready_when_there_is_a_death_to_tell_and_not_longer() -> None:
    channel, gate = torchwq.channel(), torchwq.channel()
    holder = torchwq.map(1, jobs.hold, channel, gate)
    writer = torchwq.map(1, jobs.write_and_wait, channel)
    pid = channel.read(timeout=20)[1]
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLIN)
    assert poll.poll(300) == []
    os.kill(pid, signal.SIGKILL)
    assert poll.poll(10_000)
    with pytest.raises(torchwq.WorkerDied, match="SIGKILL"):
        channel.read(nonblocking=True)
    wait_until(lambda: poll.poll(0) == [])
    with pytest.raises(torchwq.WorkerDied):
        writer.join(20)
    gate.write("go")
    holder.join(20)


def test_a_descriptor_asked_for_just_as_items_move_tells_of_those_that_come_later() -> None:
    channel = torchwq.channel()
    part = channel._core
    filenos = part.local.pipe.filenos
    threads: list[threading.Thread] = []

    def move_meanwhile() -> Sequence[int]:
        found = filenos()
        if not threads:
            threads.append(threading.Thread(target=part.open_to_processes))
            threads[0].start()
            threads[0].join(0.3)  # as long as it might have taken
        return found

    part.local.pipe.filenos = move_meanwhile  # type: ignore[method-assign]
    fd = channel.fileno()
    threads[0].join(20)
    channel.write(1)
    assert polling.readable(20, fd)
