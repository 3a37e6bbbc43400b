"""Batches that a thread copies into pinned memory: the same as without it, whatever happens to worker and loader."""

from __future__ import annotations

import gc
import os
import select
import signal
import threading
import time
import warnings
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch

import torchwq
from tests.conftest import wait_until
from torchwq.errors import ResourceError
from torchwq.loading import internals, result_receiver, worker_handle, worker_pool
from torchwq.loading.result_receiver import ResultReceiver
from torchwq.marshalling import codec
from torchwq.memory import state_lock
from torchwq.transport import reactor
from torchwq.transport.waiting import Waiter

from . import datasets
from .pinned import Pinned

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("persistent", [True, False])
def test_batches_are_pinned_in_a_thread(monkeypatch: pytest.MonkeyPatch, persistent: bool, in_order: bool) -> None:
    pinned = Pinned(monkeypatch)
    loader = torchwq.DataLoader(
        datasets.Plain(), 4, num_workers=2, pin_memory=True, persistent_workers=persistent, in_order=in_order
    )
    for _ in range(2):
        rows = [int(row[0]) for batch in loader for row in batch]
        assert (rows if in_order else sorted(rows)) == list(range(37))
    for number, _ in enumerate(loader):
        if number == 2:
            break
    assert len(list(loader)) == 10
    assert pinned.count >= 30


@pytest.mark.parametrize("backend", ["process", "thread"])
@pytest.mark.parametrize("in_order", [True, False])
def test_leaving_early_ends_the_thread_that_pins(
    monkeypatch: pytest.MonkeyPatch, in_order: bool, backend: Literal["process", "thread"]
) -> None:
    pinning, closing = threading.Event(), threading.Event()

    class Slow(Pinned):
        def pin(self, data: Any, device: Any) -> Any:
            if self.count:
                pinning.set()
                assert closing.wait(30)  # meanwhile its loader leaves, and more answers come
            return super().pin(data, device)

    Slow(monkeypatch)
    end = worker_pool.end
    monkeypatch.setattr(worker_pool, "end", lambda *arguments: (end(*arguments), closing.set()))
    stop = ResultReceiver.stop
    monkeypatch.setattr(ResultReceiver, "stop", lambda receiver: (stop(receiver), closing.set()))
    three_batches = torch.utils.data.Subset(datasets.Plain(), range(12))
    loader = torchwq.DataLoader(
        three_batches, 4, num_workers=2, pin_memory=True, in_order=in_order, backend=backend, prefetch_factor=3
    )
    iterator = iter(loader)
    next(iterator)
    assert pinning.wait(30)
    (last,) = [worker for worker in iterator._handles if worker.unreceived or worker.unsent]
    last.flush()
    assert select.select([last.connection], [], [], 30)[0]
    del iterator
    assert not [thread for thread in threading.enumerate() if thread.name == "torchwq-pin"]


def test_pinning_with_failures_deaths_streams_and_states(monkeypatch: pytest.MonkeyPatch) -> None:
    Pinned(monkeypatch)
    failing = iter(torchwq.DataLoader(datasets.Failing({1}), 4, num_workers=2, pin_memory=True))
    with pytest.raises(KeyError):
        next(failing)
    assert next(failing)[0, 0] == 4
    del failing
    with pytest.raises(torchwq.WorkerDied):
        list(torchwq.DataLoader(datasets.Dying(9), 4, num_workers=2, pin_memory=True))
    stream = torchwq.DataLoader(datasets.Stream(), 3, num_workers=3, pin_memory=True)
    assert sorted(int(number) for batch, _ in stream for number in batch) == sorted([*range(23), 1000, 1000, 1001])
    loader = torchwq.DataLoader(datasets.Plain(), 4, num_workers=2, pin_memory=True)
    iterator = iter(loader)
    next(iterator)
    loader.load_state_dict(loader.state_dict())
    del iterator
    assert len(list(loader)) == 9


def test_a_worker_restarted_while_an_abandoned_epoch_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    Pinned(monkeypatch)
    loader = torchwq.DataLoader(
        datasets.Plain(40), 1, num_workers=2, pin_memory=True, persistent_workers=True, on_worker_death="restart"
    )
    for number, _ in enumerate(loader):
        if number == 3:
            break
    pid = loader._iterator._handles[0].process.pid  # type: ignore[union-attr]
    os.kill(pid, signal.SIGKILL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert [int(batch[0, 0]) for batch in loader] == list(range(40))
    assert len(list(loader)) == 40


def test_a_failing_pin_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    Pinned(monkeypatch)

    def fail(data: Any, device: Any) -> Any:
        raise RuntimeError("no pages left")

    monkeypatch.setattr(internals, "pin_memory", fail)
    with pytest.raises(RuntimeError, match="no pages left"):
        next(iter(torchwq.DataLoader(datasets.Plain(), num_workers=1, pin_memory=True)))


def test_an_abandoned_epoch_does_not_move_the_next_one_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    pinned = Pinned(monkeypatch)
    begun = threading.Event()

    def pin(data: Any, device: Any) -> Any:
        if pinned.count:
            assert begun.wait(30)
        return pinned.pin(data, device)

    monkeypatch.setattr(internals, "pin_memory", pin)
    flag = tmp_path / "die at the first sample"
    loader = torchwq.DataLoader(
        datasets.DyingStream(str(flag)),
        4,
        num_workers=1,
        pin_memory=True,
        persistent_workers=True,
        prefetch_factor=3,
        on_worker_death="restart",
    )
    next(iter(loader))
    flag.touch()
    batches = iter(loader)
    begun.set()  # what came of the first epoch is received now
    with pytest.warns(UserWarning, match="restarted"):
        rows = [int(row) for batch in batches for row in batch]
    assert rows == list(range(40))


def test_an_answer_of_an_idle_worker_is_noticed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result_receiver, "_POLL_INTERVAL", 1000.0)
    Pinned(monkeypatch)
    slow = datasets.OneSlow()
    iterator = iter(torchwq.DataLoader(slow, 1, num_workers=2, pin_memory=True, in_order=False))
    for _ in range(10):
        next(iterator)
    slow.go_on.set()
    iterator._shutdown_workers()


def test_what_ends_the_thread_ends_the_iterator(monkeypatch: pytest.MonkeyPatch) -> None:
    Pinned(monkeypatch)
    loader = torchwq.DataLoader(datasets.Plain(), 4, num_workers=1, pin_memory=True, persistent_workers=True)
    iterator = iter(loader)
    receive = ResultReceiver.receive
    monkeypatch.setattr(ResultReceiver, "receive", _raiser(ResourceError("too many open files")))
    with pytest.raises(ResourceError, match="too many open files"):
        list(iterator)
    with pytest.raises(ResourceError, match="too many open files"):
        next(iterator)
    monkeypatch.setattr(ResultReceiver, "receive", receive)
    assert len(list(loader)) == 10


def test_a_pin_that_exits_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    Pinned(monkeypatch)
    monkeypatch.setattr(internals, "pin_memory", _raiser(SystemExit(3)))
    with pytest.raises(SystemExit):
        next(iter(torchwq.DataLoader(datasets.Plain(), num_workers=1, pin_memory=True)))


def _raiser(error: BaseException) -> Any:
    def raise_it(*arguments: Any) -> Any:
        raise error

    return raise_it


def test_closing_wakes_a_thread_that_waits_for_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    Pinned(monkeypatch)
    slow = datasets.OneSlow()
    iterator = iter(torchwq.DataLoader(slow, 1, num_workers=1, pin_memory=True))
    raised: list[BaseException] = []
    waits = threading.Event()
    get = iterator._pool._pinner._ready.get

    class Ready:
        put = iterator._pool._pinner._ready.put

        def get(self, timeout: float | None) -> Any:
            waits.set()
            return get(timeout=timeout)

    monkeypatch.setattr(iterator._pool._pinner, "_ready", Ready())

    def train() -> None:
        try:
            next(iterator)
        except RuntimeError as error:
            raised.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    assert waits.wait(30)
    slow.go_on.set()  # its worker ends by itself then
    iterator._shutdown_workers()
    thread.join(30)
    (error,) = raised
    assert "closed" in str(error)


def test_ctrl_c_while_the_thread_is_waited_for_leaves_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    Pinned(monkeypatch)
    iterator = iter(torchwq.DataLoader(datasets.Plain(), 4, num_workers=2, pin_memory=True))
    next(iterator)
    join = iterator._pool._pinner._thread.join

    def interrupted(timeout: float) -> None:
        join(timeout)
        raise KeyboardInterrupt

    monkeypatch.setattr(iterator._pool._pinner._thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        iterator._shutdown_workers()
    assert all(worker.process.exitcode is not None for worker in iterator._handles)


class Cycle:
    """Garbage that only the collector frees, and an iterator with it."""

    def __init__(self, iterator: Any) -> None:
        self.itself = self
        self.iterator = iterator


@pytest.mark.parametrize("where", ["reactor", "lock"])
def test_garbage_is_closed_without_waiting_where_others_wait(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    Pinned(monkeypatch)
    decoding, go_on = threading.Event(), threading.Event()

    def slow_decode(*arguments: Any) -> Any:
        decoding.set()
        assert go_on.wait(30)
        return codec.decode(*arguments)

    monkeypatch.setattr(worker_handle, "codec", SimpleNamespace(**vars(codec) | {"decode": slow_decode}))
    collected = threading.Event()

    def collect() -> None:
        gc.collect()
        collected.set()

    gc.disable()
    try:
        cycle = Cycle(iter(torchwq.DataLoader(datasets.Plain(), 4, num_workers=2, pin_memory=True)))
        assert decoding.wait(30)
        del cycle
        if where == "lock":
            with state_lock.lock:
                gc.collect()
        else:
            reactor.get().call_later(0, collect)
            assert collected.wait(30)
        assert "torchwq-pin" in {thread.name for thread in threading.enumerate()}
    finally:
        gc.enable()
        go_on.set()
    wait_until(lambda: not {"torchwq-pin", "torchwq-close"} & {thread.name for thread in threading.enumerate()})


def test_garbage_that_is_collected_by_the_thread_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = Pinned(monkeypatch)
    armed, collected = threading.Event(), threading.Event()

    def pin(data: Any, device: Any) -> Any:
        if pinned.count:
            assert armed.wait(30)
            gc.collect()
            collected.set()
        return pinned.pin(data, device)

    monkeypatch.setattr(internals, "pin_memory", pin)
    gc.disable()
    try:
        cycle = Cycle(iter(torchwq.DataLoader(datasets.Plain(), 4, num_workers=2, pin_memory=True)))
        next(cycle.iterator)
        del cycle
        armed.set()
        assert collected.wait(30)
    finally:
        gc.enable()


def test_a_waiter_is_closed_by_one_who_falls_asleep() -> None:
    ours, theirs = torchwq.transport.kinds.pair()
    waiter = Waiter(ours)
    with waiter._guard:
        waiter.close()
    assert waiter.wait(ours.try_receive, time.monotonic() + 30) is None
    ours.close()
    theirs.close()


def test_a_fork_says_whose_the_iterator_is(monkeypatch: pytest.MonkeyPatch) -> None:
    Pinned(monkeypatch)
    iterator = iter(torchwq.DataLoader(datasets.Plain(), 4, num_workers=1, pin_memory=True))
    next(iterator)
    reads, writes = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            next(iterator)
        except RuntimeError as error:
            os.write(writes, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    os.close(writes)
    with os.fdopen(reads) as said:
        assert "belongs to the parent process" in said.read()
    assert len(list(iterator)) == 9
