"""``DataLoader(..., backend="ray")`` gives the batches that process workers give, and survives what a cluster does."""

from __future__ import annotations

import os
import signal
import time
import warnings
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import torch.utils.data

import torchwq
import torchwq.ray
from tests.conftest import wait_until
from tests.loading import datasets
from tests.loading.datasets import same
from tests.loading.pinned import Pinned
from tests.loading.test_equality import batches
from torchwq import WorkerDied

from .conftest import Cluster, ray

pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore:This DataLoader will create")]


def check(make: Any, epochs: int = 2) -> None:
    expected = batches(torch.utils.data.DataLoader, make, epochs)
    found = batches(lambda *args, **kwargs: torchwq.DataLoader(*args, **kwargs, backend="ray"), make, epochs)
    assert len(found) == len(expected)
    for position, (left, right) in enumerate(zip(expected, found, strict=True)):
        assert same(left, right), f"at {position}: {left} != {right}"


def test_map_style_batches_with_random_numbers() -> None:
    check(lambda cls: cls(datasets.Random(37), 4, shuffle=True, num_workers=2, worker_init_fn=datasets.tag))


def test_persistent_workers_and_prefetch_factor() -> None:
    options: dict[str, Any] = {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 3}
    check(lambda cls: cls(datasets.Random(23), 3, shuffle=True, drop_last=True, **options), epochs=3)


def test_batches_of_every_kind() -> None:
    check(lambda cls: cls(datasets.Mixed(12), 5, num_workers=1), epochs=1)


def test_iterable_datasets_which_ask_for_their_worker() -> None:
    check(lambda cls: cls(datasets.Stream(20), 3, num_workers=2))


class Big(torch.utils.data.Dataset[Any]):
    """Its data are put into the object store once."""

    def __init__(self) -> None:
        self.data = torch.arange(1 << 20)
        self.array = np.arange(1 << 18)

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> Any:
        return self.data[index * 1000 : index * 1000 + 50_000], int(self.array[index])


def test_a_large_dataset_travels_once_and_batches_can_be_changed_and_kept() -> None:
    loader = torchwq.DataLoader(Big(), 2, num_workers=1, backend="ray")
    kept = []
    for batch, numbers in loader:
        batch += 1
        kept.append((batch, numbers))
    for position, (batch, numbers) in enumerate(kept):
        expected = [torch.arange(i * 1000, i * 1000 + 50_000) + 1 for i in (2 * position, 2 * position + 1)]
        assert torch.equal(batch, torch.stack(expected))
        assert numbers.tolist() == [2 * position, 2 * position + 1]


def test_it_goes_on_from_a_state_in_mid_epoch() -> None:
    def make() -> Any:
        torch.manual_seed(5)
        return torchwq.DataLoader(datasets.Random(30), 3, shuffle=True, num_workers=1, backend="ray")

    loader = make()
    loader.state_dict()  # from now on with the states of random generators
    iterator = iter(loader)
    for _ in range(4):
        next(iterator)
    state = loader.state_dict()
    rest = list(iterator)
    again = make()
    again.load_state_dict(state)
    assert same(list(again), rest)


def test_an_error_has_the_remote_traceback_and_the_loader_goes_on() -> None:
    loader = torchwq.DataLoader(datasets.Failing({2, 5}, 8), 1, num_workers=1, backend="ray")
    iterator = iter(loader)
    got, failed = [], 0
    while True:
        try:
            got.append(next(iterator))
        except StopIteration:
            break
        except KeyError as error:
            failed += 1
            assert "in __getitem__" in str(error.__cause__)
    assert (len(got), failed) == (6, 2)


class Indexed(torch.utils.data.Dataset[Any]):
    """Rows that depend on the index only; slow enough to be in the middle of an epoch when something happens."""

    def __init__(self, n: int, pause: float = 0.0) -> None:
        self.n, self.pause = n, pause

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Any:
        time.sleep(self.pause)
        rows = torch.randn(5000, generator=torch.Generator().manual_seed(index))
        return rows, index, ray.get_runtime_context().get_node_id(), os.getpid()


def _without_place(found: list[Any]) -> list[Any]:
    return [(rows, index) for rows, index, *_ in found]


def test_a_node_that_goes_in_mid_epoch_costs_no_batch(cluster: Cluster) -> None:
    """Each batch comes once, in order, bit for bit; others make again what the lost workers had in hand."""
    expected = [
        (torch.randn(5000, generator=torch.Generator().manual_seed(i))[None], torch.tensor([i])) for i in range(60)
    ]
    doomed = cluster.add_node()
    loader = torchwq.DataLoader(
        Indexed(60, 0.02), 1, num_workers=4, backend="ray", on_worker_death="restart", max_restarts=4
    )
    found = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for batch in loader:
            found.append(batch)
            if len(found) == 8:
                pids = {int(batch[3][0]) for batch in found if batch[2][0] == doomed.node_id}
                assert pids, "no worker is on the node that is to go"
                cluster.remove_node(doomed)
                wait_until(lambda pids=pids: not any(map(psutil.pid_exists, pids)), 60, "the end of its workers")
    assert same(_without_place(found), expected)
    assert any("on node" in str(each.message) and "restarted" in str(each.message) for each in told)
    assert loader.stats().restarts >= 1


def test_a_killed_actor_is_a_worker_that_died() -> None:
    loader = torchwq.DataLoader(Indexed(20, 0.01), 1, num_workers=2, backend="ray")
    iterator = iter(loader)
    os.kill(int(next(iterator)[3][0]), signal.SIGKILL)
    with pytest.raises(WorkerDied, match="its actor on node"):
        list(iterator)


def test_statistics_have_what_far_workers_count() -> None:
    loader = torchwq.DataLoader(Indexed(12, 0.02), 2, num_workers=1, backend="ray")
    list(loader)
    stats = loader.stats()
    assert stats.batches == 6
    assert stats.workers_busy >= 0.8 * 12 * 0.02
    assert stats.bytes >= 12 * 5000 * 4


class Reused(torch.utils.data.IterableDataset[Any]):
    """Yields one tensor again and again, with other values."""

    def __iter__(self) -> Any:
        tensor = torch.zeros(100_000)
        for number in range(60):
            tensor.fill_(number)
            yield tensor


def test_a_dataset_may_use_its_memory_again_and_the_loader_may_be_far_ahead() -> None:
    loader = torchwq.DataLoader(Reused(), None, num_workers=1, prefetch_factor=8, backend="ray")
    for number, batch in enumerate(loader):
        assert batch.unique().tolist() == [number]


@pytest.mark.parametrize("pinned", [False, True])
def test_many_indices_ahead_each_in_a_message_of_its_own(pinned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message with the dataset is large, and Ray lets later calls overtake it."""
    if pinned:
        Pinned(monkeypatch)
    options: dict[str, Any] = {"in_order": pinned, "pin_memory": pinned, "prefetch_factor": 40}
    loader = torchwq.DataLoader(Big(), 1, num_workers=1, backend="ray", timeout=60, **options)
    assert sorted(int(numbers[0]) for _, numbers in loader) == list(range(100))


def test_an_automatic_number_of_workers_is_refused() -> None:
    with pytest.raises(ValueError, match="say how many workers"):
        torchwq.DataLoader(Big(), num_workers="auto", backend="ray")
