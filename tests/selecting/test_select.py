"""``select``, ``fileno`` and asyncio, over queues and channels, between threads and between processes."""

from __future__ import annotations

import asyncio
import gc
import os
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable

import pytest

import torchwq
from tests.channels import jobs as channel_jobs
from tests.conftest import wait_until
from tests.queues import jobs as queue_jobs
from tests.queues.handles import worker_handle
from torchwq import ChannelState


def is_readable(source: object) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(source, selectors.EVENT_READ)  # type: ignore[arg-type]
        return bool(selector.select(0))


def test_select_returns_those_that_are_ready(make: Callable[[], torchwq.Channel]) -> None:
    a, b = make(), make()
    with torchwq.workqueue() as q:
        assert torchwq.select([a, b, q], 0) == []
        b.write(1)
        assert torchwq.select([a, b, q], 20) == [b]
        a.write(2)
        assert torchwq.select([a, b, q]) == [a, b]
        a.read(), b.read()
        started = time.monotonic()
        assert torchwq.select([a, b, q], timeout=0.1) == []
        assert time.monotonic() - started >= 0.1


def test_select_wakes_for_whatever_comes_first(backend: str) -> None:
    numbers = torchwq.channel()
    with torchwq.workqueue() as q:
        echo = torchwq.map(1, queue_jobs.echo, q, backend=backend)
        producer = torchwq.map(1, channel_jobs.produce, numbers, 200, backend=backend)
        q.write(*range(200))
        got_answers, got_items = [], []
        while len(got_answers) < 200 or len(got_items) < 200:
            wanted = [q] * (len(got_answers) < 200) + [numbers] * (len(got_items) < 200)
            for source in torchwq.select(wanted, 20):
                if source is q:
                    got_answers.append(q.read(True))
                else:
                    got_items.append(numbers.read(True)[1])
        assert got_answers == list(range(200))
        assert got_items == [(0, number) for number in range(200)]
        q.write(None)
        echo.join(20)
        producer.join(20)


def test_select_watches_other_descriptors_too(make: Callable[[], torchwq.Channel]) -> None:
    ours, theirs = socket.socketpair()
    channel = make()
    with ours, theirs:
        assert torchwq.select([channel, ours], 0) == []
        theirs.send(b"x")
        assert torchwq.select([channel, ours], 20) == [ours]


def test_a_closed_source_is_ready(make: Callable[[], torchwq.Channel]) -> None:
    channel = make()
    timer = threading.Timer(0.1, channel.close)
    timer.start()
    assert torchwq.select([channel], 20) == [channel]
    assert channel.read() == (ChannelState.DRAINED, None)
    timer.join()
    with torchwq.workqueue() as q:
        torchwq.map(1, queue_jobs.answer_many, q, 0).join(20)
        assert torchwq.select([q], 20) == [q], "no worker is left"
        with pytest.raises(torchwq.WorkerDied):
            q.read()


def test_a_death_makes_a_source_ready() -> None:
    channel = torchwq.channel()
    with torchwq.workqueue() as q:
        torchwq.map(1, queue_jobs.read_one_and_die, q, signal.SIGKILL)
        q.write("deadly")
        assert torchwq.select([q, channel], 20) == [q]
        with pytest.raises(torchwq.WorkerDied, match="deadly"):
            q.read()
    torchwq.map(1, channel_jobs.write_and_die, channel, signal.SIGKILL)
    channel.read(timeout=20)
    assert torchwq.select([channel], 20) == [channel]
    with pytest.raises(torchwq.WorkerDied, match="SIGKILL"):
        channel.read(timeout=20)


def test_bad_arguments_of_select() -> None:
    with pytest.raises(ValueError, match="nothing to wait for"):
        torchwq.select([])
    assert torchwq.select([], 0) == []
    with pytest.raises(TypeError, match="int"):
        torchwq.select([3])


def test_fileno_of_a_channel_shows_items_and_the_end(make: Callable[[], torchwq.Channel]) -> None:
    channel = make()
    assert not is_readable(channel)
    channel.write(1, 2)
    assert is_readable(channel)
    channel.read()
    assert is_readable(channel)
    channel.read()
    assert not is_readable(channel)
    channel.close()
    assert is_readable(channel)


def test_fileno_stays_the_same_when_the_channel_is_opened_to_processes() -> None:
    channel = torchwq.channel()
    fd = channel.fileno()
    channel.write(1)
    channel._core.open_to_processes()
    assert channel.fileno() == fd
    assert is_readable(channel)
    channel.read()
    assert not is_readable(channel)
    channel.write(2)
    assert is_readable(channel)


def test_fileno_of_a_queue(backend: str) -> None:
    with torchwq.workqueue() as q:
        fd = q.fileno()
        assert not is_readable(q)
        worker = torchwq.map(1, queue_jobs.echo, q, backend=backend)
        q.write("question")
        wait_until(lambda: is_readable(q))
        assert q.fileno() == fd
        assert q.read(True) == "question"
        assert q.read(True) is None
        assert not is_readable(q)
        q.write(None)
        worker.join(20)
        wait_until(lambda: is_readable(q))
        with pytest.raises(torchwq.WorkerDied):
            q.read()
    with pytest.raises(torchwq.QueueClosed):
        q.fileno()


def test_fileno_of_a_queue_shows_answers_that_were_taken_in_already() -> None:
    """By the reactor, for a worker that leaves, or by ``drain``."""
    with torchwq.workqueue() as queue, worker_handle(queue) as worker:
        queue.fileno()
        queue.write(1)
        worker.write(worker.read(timeout=10) + 1)
        queue.drain(10)
        assert is_readable(queue.fileno())
        queue._role.members._look_again()
        assert is_readable(queue.fileno())
        assert queue.read(nonblocking=True) == 2
        assert queue.read(nonblocking=True) is None
        assert not is_readable(queue.fileno())


def test_a_death_shows_in_the_descriptor_of_a_channel() -> None:
    channel = torchwq.channel()
    channel.fileno()
    torchwq.map(1, channel_jobs.write_and_die, channel, signal.SIGKILL)
    channel.read(timeout=20)
    wait_until(lambda: is_readable(channel))
    with pytest.raises(torchwq.WorkerDied):
        channel.read(timeout=20)


def test_aread_of_a_queue(backend: str) -> None:
    async def ask(q: torchwq.WorkQueue) -> list[object]:
        q.write(1, 2)
        answers = [await q.aread(), await q.aread()]
        for error in (TimeoutError, asyncio.TimeoutError):
            with pytest.raises(error):
                await q.aread(timeout=0.05)
        q.write(None)
        with pytest.raises(torchwq.WorkerDied, match="no worker is left"):
            await q.aread(timeout=20)
        return answers

    with torchwq.workqueue() as q:
        worker = torchwq.map(1, queue_jobs.echo, q, backend=backend)
        assert asyncio.run(ask(q)) == [1, 2]
        worker.join(20)
    with pytest.raises(torchwq.QueueClosed):
        asyncio.run(q.aread())


def test_async_iteration_ends_when_the_channel_is_drained(backend: str) -> None:
    channel = torchwq.channel()

    async def read() -> list[object]:
        return [item async for item in channel]

    async def main() -> list[list[object]]:
        readers = [asyncio.create_task(read()) for _ in range(3)]
        await asyncio.to_thread(torchwq.map(2, channel_jobs.produce, channel, 100, backend=backend).join)
        channel.close()
        return await asyncio.gather(*readers)

    got = [item for items in asyncio.run(main()) for item in items]
    assert sorted(got) == sorted((mapid, number) for mapid in range(2) for number in range(100))  # type: ignore[type-var]


def test_async_iteration_over_a_queue_ends_with_none_or_its_closing() -> None:
    async def answer(worker: torchwq.WorkQueue) -> list[object]:
        return [question async for question in worker]

    with torchwq.workqueue("async") as q:
        handles: list[torchwq.WorkQueue] = []
        thread = threading.Thread(target=lambda: handles.append(torchwq.workqueue("async")))
        thread.start()
        thread.join()
        q.write(1, 2, None, 3)
        assert asyncio.run(answer(handles[0])) == [1, 2]
        q.close()
        assert asyncio.run(answer(handles[0])) == [3]


def test_a_thousand_tasks_wait_without_threads(make: Callable[[], torchwq.Channel]) -> None:
    channel = make()

    async def main() -> list[object]:
        tasks = [asyncio.create_task(channel.aread()) for _ in range(1_000)]
        await asyncio.sleep(0.05)
        before = threading.active_count()
        assert before < 20
        channel.write(*range(1_000))
        return [item for _, item in await asyncio.gather(*tasks)]

    assert sorted(asyncio.run(main())) == list(range(1_000))  # type: ignore[type-var]


def test_a_cancelled_task_takes_nothing(make: Callable[[], torchwq.Channel]) -> None:
    channel = make()

    async def main() -> object:
        first, second = (asyncio.create_task(channel.aread()) for _ in range(2))
        await asyncio.sleep(0.05)
        first.cancel()
        channel.write("item")
        with pytest.raises(asyncio.CancelledError):
            await first
        return await second

    assert asyncio.run(main()) == (ChannelState.OPEN, "item")


def test_watched_queues_and_channels_leave_no_descriptor() -> None:
    for _ in range(50):
        with torchwq.workqueue() as q:
            q.fileno()
        channel = torchwq.channel()
        channel.fileno()
    del channel
    gc.collect()


def test_a_forked_child_has_no_descriptor() -> None:
    with torchwq.workqueue() as q:
        channel = torchwq.channel()
        q.fileno(), channel.fileno()
        pid = os.fork()
        if pid == 0:
            refused = 0
            for source in (q, channel):
                try:
                    source.fileno()
                except torchwq.QueueClosed:
                    refused += 1
            os._exit(refused)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
