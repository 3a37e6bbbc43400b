"""A write to a bounded queue or channel that has no room: how long it waits, and on asyncio's event loop."""

from __future__ import annotations

import asyncio
import queue
from typing import Any

import pytest

import torchwq
from tests.queues.handles import worker_handle


def test_a_write_to_a_full_queue_waits_so_long_and_writes_the_objects_before() -> None:
    with torchwq.workqueue(capacity=2) as owner, worker_handle(owner) as worker:
        with pytest.raises(queue.Full, match="2 unread messages"):
            owner.write(1, 2, 3, timeout=0.01)
        with pytest.raises(queue.Full):
            owner.write(3, timeout=0)
        assert worker.read() == 1
        owner.write(3, timeout=0)
        assert [worker.read(), worker.read()] == [2, 3]
        worker.write("an answer", timeout=0)  # for whoever writes answers there is always room
        assert owner.read() == "an answer"


def test_a_write_to_a_full_channel_waits_so_long(make: Any) -> None:
    with torchwq.channel(capacity=1) as channel:
        channel.write(1, timeout=0)
        with pytest.raises(queue.Full, match="1 unread messages"):
            channel.write(2, timeout=0.01)
        assert channel.read()[1] == 1
        assert channel.write(2, timeout=0) is torchwq.ChannelState.OPEN
    with make() as unbounded:
        assert unbounded.write(1, timeout=0) is torchwq.ChannelState.OPEN
        assert unbounded.read()[1] == 1


@pytest.mark.parametrize("kind", ["queue", "channel"])
def test_a_task_that_writes_waits_while_the_loop_goes_on(kind: str) -> None:
    async def run() -> None:
        with torchwq.workqueue(capacity=1) as owner, worker_handle(owner) as worker, torchwq.channel(1) as channel:
            sink, source = (owner, worker) if kind == "queue" else (channel, channel)
            await sink.awrite(1)
            with pytest.raises(TimeoutError, match="no room"):
                await sink.awrite(2, timeout=0.01)
            waiting = asyncio.ensure_future(sink.awrite(3))
            await asyncio.sleep(0)
            assert not waiting.done()
            first = await source.aread()
            await waiting
            second = await source.aread()
            assert [first, second] == ([1, 3] if kind == "queue" else [(torchwq.ChannelState.OPEN, n) for n in (1, 3)])
            await sink.awrite(4)
            cancelled = asyncio.ensure_future(sink.awrite(5))
            await asyncio.sleep(0.002)
            cancelled.cancel()
            await asyncio.gather(cancelled, return_exceptions=True)
            with pytest.raises(torchwq.MarshalError):
                await sink.awrite(6, (each for each in ()))  # nothing of it is written
            await source.aread()
            assert source.read(nonblocking=True) in (None, (torchwq.ChannelState.OPEN, None))

    asyncio.run(run())
