"""``Channel`` as the contract has it: states, order, cascade, capacity; over processes and threads."""

from __future__ import annotations

import gc
import queue
import threading
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch

import torchwq
from tests.channels import jobs
from tests.channels.parts import socket_of
from tests.conftest import wait_until
from torchwq import ChannelState

OPEN, CLOSED, DRAINED = ChannelState.OPEN, ChannelState.CLOSED, ChannelState.DRAINED


def test_first_in_first_out_and_multi_write(make: Callable[[], torchwq.Channel]) -> None:
    channel = make()
    assert channel.write(*range(10)) is OPEN
    assert channel.write() is OPEN
    assert channel.num_items() == 10
    assert [channel.read() for _ in range(10)] == [(OPEN, number) for number in range(10)]
    assert channel.read(nonblocking=True) == (OPEN, None)
    with pytest.raises(queue.Empty):
        channel.read(timeout=0.02)


def test_states(make: Callable[[], torchwq.Channel]) -> None:
    channel = make()
    channel.write("a", None)
    assert (channel.closed(), channel.drained()) == (False, False)
    channel.close()
    channel.close()
    assert (channel.closed(), channel.drained(), channel.num_items()) == (True, False, 2)
    assert channel.write("too late") is CLOSED
    assert channel.read() == (CLOSED, "a")
    assert channel.read() == (CLOSED, None), "None is an item like any other"
    assert channel.read() == channel.read(True) == (DRAINED, None)
    assert (channel.closed(), channel.drained(), channel.num_items()) == (True, True, 0)
    assert channel.write("too late") is DRAINED


def test_an_empty_channel_is_drained_as_soon_as_it_is_closed(make: Callable[[], torchwq.Channel]) -> None:
    channel = make()
    channel.close()
    assert channel.drained()
    assert list(channel) == []


def test_a_failing_write_leaves_the_channel_as_it_was(make: Callable[[], torchwq.Channel]) -> None:
    channel = make()
    with pytest.raises(torchwq.MarshalError, match=r"args\[1\]\['lock'\]"):
        channel.write(1, {"lock": threading.Lock()})
    with pytest.raises(torchwq.ClosureError, match="channel"):
        channel.write(lambda: channel)
    assert channel.num_items() == 0
    assert channel.writeup(lambda n=3: n) is OPEN
    assert channel.read()[1]() == 3


def test_values_are_copied_and_tensors_shared(make: Callable[[], torchwq.Channel]) -> None:
    channel = make()
    data = {"list": [1], "tensor": torch.zeros(3), "array": np.zeros(20_000)}
    channel.write(data)
    got = channel.read()[1]
    got["list"].append(2)
    got["array"][0] = got["tensor"][0] = 7
    assert data["list"] == [1]
    assert data["array"][0] == 0
    assert data["tensor"][0] == 7
    assert got["tensor"].data_ptr() == data["tensor"].data_ptr()


def test_between_threads_tensors_are_not_moved_to_shared_memory() -> None:
    channel = torchwq.channel()
    tensor = torch.zeros(3)
    channel.write(tensor)
    assert not tensor.is_shared()
    channel._core.open_to_processes()
    assert tensor.is_shared(), "another process may read it now"
    got = channel.read()[1]
    got[0] = 5
    assert tensor[0] == 5


def test_items_that_wait_when_the_channel_is_first_sent_keep_their_order() -> None:
    channel = torchwq.channel()
    channel.write(1, torch.ones(2), "three", lambda: 4)
    readers = torchwq.map(1, jobs.consume, channel)
    channel.write(5)
    channel.close()
    one, two, three, four, five = readers.join(20)[0]
    assert (one, two.tolist(), three, four(), five) == (1, [1.0, 1.0], "three", 4, 5)


VALUES = [(1, "a"), {"b": [2, (3.5, [None])]}, [], [b"c"], {}, (), "d" * 10_000, b"e" * 100_000, None, 4]


def test_values_that_wait_are_copies_and_move_as_they_are() -> None:
    for process in (False, True):
        channel = torchwq.channel()
        changed: dict[str, list[object]] = {"list": [1, [2]]}
        channel.write(changed)
        for value in VALUES:
            channel.write(value)
        changed["list"][0] = changed["more"] = [0]
        if process:
            channel._core.open_to_processes()
        channel.close()
        assert list(channel) == [{"list": [1, [2]]}, *VALUES]


def test_an_item_that_cannot_go_to_a_process_keeps_the_channel_here() -> None:
    channel = torchwq.channel()
    channel.write(1, Unpicklable(torch.zeros(1)))
    with pytest.raises(torchwq.MarshalError, match=r"channel|here only"):
        torchwq.map(1, jobs.consume, channel)
    assert channel.read() == (OPEN, 1)
    assert isinstance(channel.read()[1], Unpicklable)


class Unpicklable:
    """Can be pickled once, when it is written."""

    left = 1

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __reduce__(self) -> object:
        if not Unpicklable.left:
            raise TypeError("here only")
        Unpicklable.left -= 1
        return Unpicklable, (self.tensor,)


def test_many_writers_and_readers_lose_nothing(backend: str) -> None:
    channel = torchwq.channel()
    writers = torchwq.map(3, jobs.produce, channel, 2_000, backend=backend)
    readers = torchwq.map(2, jobs.consume, channel, backend=backend)
    assert writers.join(30) == [2_000] * 3
    channel.close()
    got = readers.join(30)
    assert Counter(item for items in got for item in items) == Counter(
        (mapid, number) for mapid in range(3) for number in range(2_000)
    )
    for items in got:
        for mapid in range(3):
            numbers = [number for writer, number in items if writer == mapid]
            assert numbers == sorted(numbers), "the order of each writer is kept"


def test_processes_and_threads_on_one_channel() -> None:
    channel = torchwq.channel()
    threads = torchwq.map(2, jobs.produce, channel, 500, backend="thread")
    processes = torchwq.map(2, jobs.produce, channel, 500)
    readers = torchwq.map(1, jobs.consume, channel, backend="thread"), torchwq.map(1, jobs.consume, channel)
    assert threads.join(30) + processes.join(30) == [500] * 4
    channel.close()
    assert sum(len(reader.join(30)[0]) for reader in readers) == 2_000


def test_closing_cascades_through_a_pipeline(backend: str) -> None:
    a, b, c = torchwq.channel(), torchwq.channel(), torchwq.channel()
    workers = [torchwq.map(1, jobs.double, *ends, backend=backend) for ends in ((a, b), (b, c))]
    a.write(1, 2, torch.ones(2))
    a.close()
    one, two, three = list(c)
    assert (one, two, three.tolist()) == (4, 8, [4.0, 4.0])
    assert [each.drained() for each in (a, b, c)] == [True] * 3
    for worker in workers:
        worker.join(20)


def test_closing_wakes_readers_and_stops_writers(backend: str) -> None:
    channel, full = torchwq.channel(), torchwq.channel(capacity=1)
    readers = torchwq.map(2, jobs.read_until_closed, channel, backend=backend)
    writers = torchwq.map(2, jobs.write_until_closed, full, backend=backend)
    wait_until(lambda: full.num_items() == 1)
    channel.close()
    full.close()
    assert readers.join(20) == [(DRAINED, None)] * 2
    assert writers.join(20) == [CLOSED] * 2
    assert full.read() == (CLOSED, "item")
    assert full.drained()


def test_a_worker_may_close(backend: str) -> None:
    source, sink = torchwq.channel(), torchwq.channel()
    worker = torchwq.map(1, jobs.double, source, sink, backend=backend)
    source.close()
    assert sink.read(timeout=20) == (DRAINED, None)
    worker.join(20)


def test_capacity_gives_back_pressure(backend: str) -> None:
    channel = torchwq.channel(capacity=3)
    assert channel.capacity == 3
    writers = torchwq.map(2, jobs.produce, channel, 300, backend=backend)
    got = []
    for _ in range(600):
        got.append(channel.read(timeout=20)[1])
        assert channel.num_items() <= 3
    assert writers.join(20) == [300, 300]
    assert Counter(got) == Counter((mapid, number) for mapid in range(2) for number in range(300))


def test_an_unlimited_channel_takes_everything_and_its_writers_end(backend: str) -> None:
    channel = torchwq.channel()
    writers = torchwq.map(2, jobs.produce, channel, 20_000, backend=backend)
    assert writers.join(30) == [20_000] * 2, "though nobody has read"
    assert channel.num_items() == 40_000
    channel.close()
    got = list(channel)
    for mapid in range(2):
        assert [number for writer, number in got if writer == mapid] == list(range(20_000))


def test_a_backlog_with_tensors_and_large_items_outlives_its_writer() -> None:
    channel = torchwq.channel()
    writers = torchwq.map(2, jobs.produce_large, channel, 150)
    writers.join(30)
    readers = torchwq.map(2, jobs.consume_sizes, channel)
    channel.close()
    got = [item for items in readers.join(30) for item in items]
    assert sorted(got) == sorted((mapid, n, 50.0 * n, 20_000) for mapid in range(2) for n in range(150))


def test_a_channel_closed_with_a_backlog_is_still_read() -> None:
    channel = torchwq.channel()
    channel._core.open_to_processes()
    channel.write(*range(30_000))
    assert channel.statistics().unsent > 0
    channel.close()
    assert channel.write("too late") is CLOSED
    assert list(channel) == list(range(30_000))


def test_a_channel_inside_a_channel(backend: str) -> None:
    outer, reply = torchwq.channel(), torchwq.channel()
    worker = torchwq.map(1, jobs.relay_inside, outer, backend=backend)
    for value in range(3):
        outer.write((reply, value))
        assert reply.read(timeout=20) == (OPEN, value + 1)
    outer.close()
    worker.join(20)


def test_a_channel_made_by_a_worker_outlives_it(backend: str) -> None:
    outer = torchwq.channel()
    torchwq.map(1, jobs.pass_channel, outer, backend=backend).join(20)
    inner = outer.read()[1]["deep"][0]
    assert [inner.read(), inner.read()] == [(OPEN, "from"), (OPEN, "inside")]
    with pytest.raises(torchwq.WorkerDied, match="nobody is left"):
        inner.read(timeout=20)


def test_a_channel_inside_a_queue_and_a_queue_inside_a_channel(backend: str) -> None:
    with torchwq.workqueue() as q:
        channel = torchwq.channel()
        channel.write(q)
        handle = channel.read()[1]
        assert not handle.creator
        handle.write("answer")
        assert q.read() == "answer"
        q.write(channel)
        handle.read().write("item")
        assert channel.read() == (OPEN, "item")
        handle.close()


def test_the_same_channel_comes_back_as_itself() -> None:
    channel = torchwq.channel()
    channel._core.open_to_processes()
    channel.write(channel)
    again = channel.read()[1]
    again.write(1)
    assert channel.read() == (OPEN, 1)
    assert again._core is channel._core


def test_a_channel_that_is_dropped_and_comes_again_at_once_is_still_open() -> None:
    outer, channel = torchwq.channel(), torchwq.channel()
    outer.write(*[channel] * 10)
    worker = torchwq.map(1, jobs.write_to_what_comes_again, outer, 5)
    assert worker.join(20) == [[OPEN] * 5]
    assert channel.num_items() == 5


def test_tensors_go_by_reference_through_a_pipeline(backend: str) -> None:
    source, sink = torchwq.channel(), torchwq.channel()
    worker = torchwq.map(1, jobs.add_one, source, sink, backend=backend)
    tensor = torch.zeros(4)
    source.write(tensor)
    assert sink.read(timeout=20)[1].data_ptr() == tensor.data_ptr()
    assert tensor.tolist() == [1.0] * 4
    source.close()
    worker.join(20)


def test_thousands_of_channels_leave_no_descriptor() -> None:
    for _ in range(300):
        channel = torchwq.channel()
        channel._core.open_to_processes()
        channel.write(torchwq.channel(), 1)
        channel.fileno()
    del channel
    gc.collect()


def test_statistics_and_repr(make: Callable[[], torchwq.Channel]) -> None:
    channel = make()
    channel.write(1, 2)
    channel.read()
    assert channel.statistics() == torchwq.ChannelStatistics(2, 1, 0, 1)
    assert repr(channel) == "<torchwq.Channel, open, 1 items>"
    assert "capacity=2" in repr(torchwq.channel(2))
    assert repr(OPEN) == "<ChannelState.OPEN>"


def test_what_was_written_and_read_before_a_process_has_the_channel_counts() -> None:
    channel = torchwq.channel()
    for number in range(5):
        channel.write(number)
        channel.read()
    channel._core.open_to_processes()
    channel.write(5)
    channel.write(6, 7)
    channel.write(8)
    assert channel.statistics() == torchwq.ChannelStatistics(9, 5, 0, 4)
    assert [channel.read()[1] for _ in range(4)] == [5, 6, 7, 8]
    assert channel.statistics() == torchwq.ChannelStatistics(9, 9, 0, 0)


def test_bad_arguments(make: Callable[[], torchwq.Channel]) -> None:
    channel = make()
    import pickle

    with pytest.raises(ValueError, match="capacity"):
        torchwq.channel(0)
    with pytest.raises(TypeError, match="torchwq"):
        pickle.dumps(channel)


def test_many_threads_on_one_handle(make: Callable[[], torchwq.Channel]) -> None:
    channel = make()
    got: list[int] = []
    readers = [threading.Thread(target=lambda: got.extend(channel)) for _ in range(4)]
    writers = [threading.Thread(target=lambda: channel.write(*range(500))) for _ in range(4)]
    for thread in readers + writers:
        thread.start()
    for thread in writers:
        thread.join(20)
    channel.close()
    for thread in readers:
        thread.join(20)
    assert Counter(got) == Counter(dict.fromkeys(range(500), 4))


def test_what_another_thread_is_about_to_send_is_still_read_after_the_close() -> None:
    """A write in the middle of another one's leaves its item to that one, and returns."""
    with torchwq.channel() as channel:
        channel._core.open_to_processes()
        assert channel.write(0) is ChannelState.OPEN
        outbox = socket_of(channel)._outbox
        outbox.sending_thread = 1  # as if another thread was sending
        assert channel.write(1) is ChannelState.OPEN
        assert len(outbox.submitted) == 1
        closing = threading.Thread(target=channel.close)
        closing.start()
        closing.join(0.05)
        outbox.sending_thread = 0
        outbox.process()
        closing.join(30)
        assert [channel.read(), channel.read()] == [(ChannelState.CLOSED, 0), (ChannelState.CLOSED, 1)]
        assert channel.read() == (ChannelState.DRAINED, None)
