"""What a message costs, in time and in descriptors, does not grow with what is kept or has passed by."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

import torchwq
from tests.conftest import wait_until
from tests.loading import datasets
from tests.marshalling.support import Peer, started_peer
from torchwq.memory import limits, maintenance, recycling, state_lock
from torchwq.memory.block import Block
from torchwq.memory.block_fields import MAPPED


@pytest.fixture
def peer() -> Any:
    with started_peer() as started:
        yield started


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[Block]:
    """Every block of which it was asked whether this process uses it."""
    seen: list[Block] = []
    in_use = Block.in_use

    def counted(block: Block) -> bool:
        seen.append(block)
        return in_use(block)

    monkeypatch.setattr(Block, "in_use", counted)
    return seen


@pytest.mark.parametrize("limit", ["descriptors", "memory"])
@pytest.mark.filterwarnings("ignore:.*copied instead of shared")
def test_at_a_limit_a_tensor_costs_as_few_looks_however_many_are_kept(
    limit: str, looks: list[Block], monkeypatch: pytest.MonkeyPatch
) -> None:
    if limit == "descriptors":
        monkeypatch.setattr(limits, "max_open_blocks", lambda: 300)
    else:
        monkeypatch.setenv(limits.ENV_VARIABLE, str(300 * 4096))
    kept = [torchwq.empty(4) for _ in range(300)]
    looks.clear()
    kept += [torchwq.empty(4) for _ in range(100)]
    assert len(looks) <= 32 * 100
    kept.clear()
    made = [torchwq.empty(5000) for _ in range(30)]  # what is free is found, and makes room for others
    assert made[-1].is_shared()
    assert recycling.open_blocks <= 300 if limit == "descriptors" else recycling.made_bytes <= 300 * 4096


@pytest.mark.filterwarnings("ignore:.*copied instead of shared")
def test_a_reader_at_its_limit_looks_at_no_block_that_is_in_use(
    peer: Peer, looks: list[Block], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "max_open_blocks", lambda: 120)
    kept = [peer.ask(torch.full, (4,), float(number)) for number in range(110)]
    for _ in range(10):
        peer.ask(torch.full, (4,), 1.0)
    looks.clear()
    last = [peer.ask(torch.full, (5,), float(number)) for number in range(40)]
    assert len(looks) <= 10 * len(last)
    assert [each[0].item() for each in kept + last] == [*range(110), *range(40)]


def _mapped() -> int:
    with state_lock.lock:
        recycling.drain_finalizers()
        recycling.poll_all()
        return sum(block.kind == MAPPED for block in recycling.by_number.values())


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_an_epochs_workers_leave_no_descriptors_but_of_what_is_kept(method: str) -> None:
    loader = torchwq.DataLoader(
        datasets.Plain(40, 10_000), batch_size=4, num_workers=2, multiprocessing_context=method, shuffle=False
    )
    kept = list(loader)
    assert _mapped() <= len(kept)
    for batch in loader:
        del batch
    assert _mapped() <= len(kept)
    assert [batch[0, 0].item() for batch in kept] == list(range(0, 40, 4))
    before = len(os.listdir("/proc/self/fd"))
    kept.clear()
    assert _mapped() == 0
    wait_until(lambda: (maintenance.run(), len(os.listdir("/proc/self/fd")))[1] <= before - 10)


def test_blocks_of_a_worker_that_has_ended_go_when_they_are_not_used(peer: Peer) -> None:
    with torchwq.workqueue() as queue:

        def answer(queue: torchwq.WorkQueue) -> None:
            import torch

            for number in range(20):
                queue.write(torch.full((10,), float(number)))

        torchwq.map(1, answer, queue).join(30)
        kept = [queue.read(timeout=10) for _ in range(20)][:2]
        wait_until(lambda: (maintenance.run(), _mapped())[1] <= len(kept))
        assert [each[0].item() for each in kept] == [0, 1]


def test_a_loaders_dicts_of_small_tensors_take_a_block_each() -> None:
    loader = torchwq.DataLoader(datasets.Dicts(200), batch_size=4, num_workers=2)
    most = 0
    for batch in loader:
        most = max(most, _mapped())
        assert len(batch) == 10
    assert most <= 16
