"""The first item with descriptors: no reader may receive it that could lose them."""

from __future__ import annotations

import threading
import time

import pytest
import torch

import torchwq
from tests.channels import jobs
from tests.channels.parts import socket_of
from tests.conftest import wait_until
from torchwq import Channel, ChannelState
from torchwq.channels.socket import SocketChannel
from torchwq.channels.table import ATTEMPTS, DESCRIPTORS, FAILED_ATTEMPTS, SAFE, SLOW_PATH, TAKEN
from torchwq.memory import membarrier
from torchwq.transport import kinds

pytestmark = pytest.mark.skipif(kinds.kind() != "seqpacket", reason="a stream is never received without descriptors")


def begun() -> tuple[Channel, SocketChannel, threading.Thread]:
    """A channel in which one thread seems to be in recv while another writes the first tensor."""
    channel = torchwq.channel()
    socket = socket_of(channel)
    socket.table.count_attempt()
    writer = threading.Thread(target=channel.write, args=(torch.arange(3),))
    writer.start()
    wait_until(lambda: socket.table.words[SLOW_PATH])
    return channel, socket, writer


def test_a_tensor_waits_for_those_who_are_just_receiving() -> None:
    channel, socket, writer = begun()
    time.sleep(0.1)
    assert socket.table.words[DESCRIPTORS] != SAFE
    assert channel.num_items() == 0, "it has not left"
    socket.table.count_failed_attempt()
    writer.join(20)
    assert socket.table.words[DESCRIPTORS] == SAFE
    assert channel.read(timeout=20)[1].tolist() == [0, 1, 2]


def test_it_waits_for_each_thread_of_a_process() -> None:
    channel, socket, writer = begun()
    for _ in range(10):
        assert channel.read(nonblocking=True) == (ChannelState.OPEN, None)
        socket.table.count_attempt()  # as others, who see SLOW_PATH
        socket.table.count_failed_attempt()
        time.sleep(0.01)
    assert socket.table.words[DESCRIPTORS] != SAFE
    socket.table.count_failed_attempt()
    writer.join(20)
    assert channel.read(timeout=20)[1].tolist() == [0, 1, 2]


def test_no_end_of_a_try_is_counted_without_it() -> None:
    channel = torchwq.channel()
    socket = socket_of(channel)
    channel.write(Unreadable())
    channel.write(Unreadable())
    with pytest.raises(BlockingIOError, match="in reading"):
        channel.read()
    channel.close()
    with pytest.raises(BlockingIOError, match="in reading"):
        channel.read()
    assert channel.read() == (ChannelState.DRAINED, None)
    tried, taken, missed = (socket.table.own(word) for word in (ATTEMPTS, TAKEN, FAILED_ATTEMPTS))
    assert tried == taken + missed
    assert taken == 2


class Unreadable:
    def __reduce__(self) -> object:
        return fail_in_reading, ()


def fail_in_reading() -> None:
    raise BlockingIOError("in reading")


def test_it_does_not_wait_for_the_dead() -> None:
    channel = torchwq.channel()
    with pytest.raises(torchwq.WorkerDied):
        torchwq.map(1, jobs.die_receiving, channel).join(20)
    socket_of(channel)
    started = time.monotonic()
    channel.write(torch.arange(3))
    assert time.monotonic() - started < 2
    assert channel.read(nonblocking=True)[1].tolist() == [0, 1, 2]


def test_nor_for_one_who_has_left() -> None:
    channel = torchwq.channel()
    torchwq.map(1, jobs.leave_receiving, channel).join(20)
    socket = socket_of(channel)
    workers = torchwq.map(1, jobs.read_when_asked, channel, asked := torchwq.channel())
    slot = wait_until(lambda: [slot for slot, lives in socket.table.other_slots() if lives])[0]
    assert socket.table.get_word(slot, ATTEMPTS) == 1, "it has the slot of the one who has left"
    started = time.monotonic()
    channel.write(torch.arange(3))
    assert time.monotonic() - started < 2
    asked.write("now")
    assert workers.join(20) == [[0, 1, 2]]


def test_nothing_is_lost_when_tensors_begin_to_come_among_plain_items() -> None:
    """Each channel changes once; so there are many."""
    for _ in range(10):
        channel, sizes = torchwq.channel(), torchwq.channel()
        readers = torchwq.map(2, jobs.consume_kinds, channel)
        writers = torchwq.map(2, jobs.produce_plain_then_tensors, channel, 300)
        writers.join(60)
        channel.close()
        taken = readers.join(60)
        for items in taken:
            for writer in range(2):
                numbers = [number for mapid, number in items if mapid == writer]
                assert numbers == sorted(numbers), "each writer's order"
        assert sorted(item for items in taken for item in items) == [(w, n) for w in range(2) for n in range(300)]
        del sizes


def test_a_channel_of_plain_items_is_never_told() -> None:
    channel = torchwq.channel()
    socket = socket_of(channel)
    for item in (1, "text", (1, 2.5, None), [1, {"a": b"b"}], {"key": (1,)}):
        channel.write(item)
        assert channel.read() == (ChannelState.OPEN, item)
    assert not socket.table.words[SLOW_PATH]
    assert not socket.table.words[DESCRIPTORS]


@pytest.mark.parametrize("machine", [None, "unheard of"], ids=["membarrier", "elsewhere"])
def test_a_fence_everywhere_returns(machine: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if machine is not None:
        monkeypatch.setattr("platform.machine", lambda: machine)
    started = time.monotonic()
    membarrier.global_barrier()
    assert time.monotonic() - started < 5


def test_counts_are_right_when_threads_write_and_read_at_once() -> None:
    channel = torchwq.channel()
    socket_of(channel)
    writers = [threading.Thread(target=lambda: [channel.write(n) for n in range(2000)]) for _ in range(4)]
    readers = [threading.Thread(target=lambda: [channel.read(timeout=20) for _ in range(2000)]) for _ in range(4)]
    for thread in writers + readers:
        thread.start()
    for thread in writers + readers:
        thread.join(60)
    # The last item may be read before its writer, the reactor, has noted that no backlog is left.
    wait_until(lambda: channel.num_items() == 0, 10, "the end of the backlog")
    statistics = channel.statistics()
    assert (statistics.written, statistics.read, statistics.num_items) == (8000, 8000, 0)
