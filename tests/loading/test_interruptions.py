"""Ctrl-C in the middle of things: the workers are ended, and the next epoch is whole."""

from __future__ import annotations

import random
import signal
import threading
from typing import Any

import pytest
import torch

import torchwq
from torchwq.loading.worker_handle import WorkerHandle

from .pinned import Pinned

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


class InTurn(torch.utils.data.Sampler[int]):
    """torchwq does not know it, and so draws nothing from it in advance."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Any:
        return iter(range(self.n))

    def __len__(self) -> int:
        return self.n


def _loader(n: int, **arguments: Any) -> torchwq.DataLoader[Any]:
    # Of numbers: a message with a tensor, lost in that moment, would be missed for seconds.
    return torchwq.DataLoader(
        range(n),  # type: ignore[arg-type]
        None,
        num_workers=1,
        sampler=InTurn(n),
        persistent_workers=True,
        **arguments,
    )


@pytest.mark.parametrize("pin_memory", [False, True])
@pytest.mark.parametrize("where", ["before sending", "after sending", "taking"])
def test_the_epoch_after_an_interruption_is_whole(
    monkeypatch: pytest.MonkeyPatch, where: str, pin_memory: bool
) -> None:
    Pinned(monkeypatch)
    loader = _loader(20, pin_memory=pin_memory)
    iterator = iter(loader)
    next(iterator)
    send, take = WorkerHandle.send, WorkerHandle.take

    def interrupted_send(worker: WorkerHandle, message: Any) -> None:
        if where == "after sending":
            send(worker, message)
        raise KeyboardInterrupt

    def interrupted_take(worker: WorkerHandle) -> Any:
        if take(worker) is not None:
            raise KeyboardInterrupt

    if where == "taking":
        monkeypatch.setattr(WorkerHandle, "take", interrupted_take)
    else:
        monkeypatch.setattr(WorkerHandle, "send", interrupted_send)
    with pytest.raises(KeyboardInterrupt):
        list(iterator)
    monkeypatch.setattr(WorkerHandle, "take", take)
    monkeypatch.setattr(WorkerHandle, "send", send)
    with pytest.raises(RuntimeError, match=r"KeyboardInterrupt has interrupted this iterator.*iter\(loader\)"):
        next(iterator)
    for _ in range(2):
        assert [int(batch) for batch in loader] == list(range(20))


@pytest.mark.parametrize("pin_memory", [False, True])
def test_an_interruption_while_a_death_is_looked_into(monkeypatch: pytest.MonkeyPatch, pin_memory: bool) -> None:
    Pinned(monkeypatch)
    loader = _loader(20, on_worker_death="restart", pin_memory=pin_memory)
    iterator = iter(loader)
    next(iterator)
    death = WorkerHandle.death

    def interrupted(worker: WorkerHandle, in_hand: str) -> Any:
        death(worker, in_hand)
        raise KeyboardInterrupt

    monkeypatch.setattr(WorkerHandle, "death", interrupted)
    iterator._handles[0].process.kill(signal.SIGKILL)
    with pytest.raises(KeyboardInterrupt):
        list(iterator)
    monkeypatch.setattr(WorkerHandle, "death", death)
    assert [int(batch) for batch in loader] == list(range(20))


def test_a_reset_that_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = _loader(20)
    assert len(list(loader)) == 20
    flush, count = WorkerHandle.flush, 0

    def interrupted(worker: WorkerHandle) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        flush(worker)

    monkeypatch.setattr(WorkerHandle, "flush", interrupted)
    with pytest.raises(KeyboardInterrupt):
        iter(loader)
    monkeypatch.undo()
    assert [int(batch) for batch in loader] == list(range(20))


def test_interruptions_at_any_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert threading.current_thread() is threading.main_thread()

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    loader = _loader(100)
    assert len(list(loader)) == 100
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(30):
            try:
                signal.setitimer(signal.ITIMER_REAL, random.uniform(0.0005, 0.01))
                len(list(loader))
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                pass
            assert [int(batch) for batch in loader] == list(range(100))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
