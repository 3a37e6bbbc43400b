"""The same batches as torch's DataLoader, bit for bit, over a grid of everything that has an influence on them."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.data
from torch.utils.data import (
    BatchSampler,
    ChainDataset,
    ConcatDataset,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.datapipes.iter import IterableWrapper

import torchwq

from . import datasets
from .datasets import same
from .pinned import Pinned

pytestmark = [pytest.mark.filterwarnings("ignore:This DataLoader will create"), pytest.mark.timeout(120)]


def batches(cls: Any, make: Any, epochs: int = 2, seed: int = 7) -> Any:
    """All batches of some epochs, and a random number drawn after each batch and at the end."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    loader = make(cls)
    out: list[Any] = []
    for _ in range(epochs):
        for batch in loader:
            out.append(copy.deepcopy(batch))  # torch's take room in /dev/shm
            out.append(torch.rand(1))
        out.append(("epoch", torch.rand(1), random.random()))
    return out


def check(make: Any, epochs: int = 2) -> None:
    expected = batches(torch.utils.data.DataLoader, make, epochs)
    found = batches(torchwq.DataLoader, make, epochs)
    assert len(found) == len(expected)
    for position, (left, right) in enumerate(zip(expected, found, strict=True)):
        assert same(left, right), f"at {position}: {left} != {right}"


DATASETS = {
    "plain": datasets.Plain,
    "random": datasets.Random,
    "mixed": datasets.Mixed,
    "getitems": datasets.Many,
    "concat": lambda: ConcatDataset([datasets.Plain(5), datasets.Plain(8)]),
    "subset": lambda: Subset(datasets.Random(), [3, 1, 4, 1, 5, 9]),
    "tensors": lambda: torch.utils.data.TensorDataset(torch.arange(11.0), torch.arange(22).view(11, 2)),
    "list": lambda: [float(number) for number in range(9)],
}


@pytest.mark.parametrize("shuffle", [False, True], ids=["in turn", "shuffled"])
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("name", DATASETS)
def test_map_style_datasets(name: str, workers: int, shuffle: bool) -> None:
    check(lambda cls: cls(DATASETS[name](), batch_size=4, shuffle=shuffle, num_workers=workers))


OPTIONS: dict[str, dict[str, Any]] = {
    "drop_last": {"batch_size": 5, "drop_last": True},
    "persistent": {"batch_size": 5, "persistent_workers": True, "shuffle": True},
    "prefetch 1": {"batch_size": 5, "prefetch_factor": 1},
    "prefetch 7": {"batch_size": 2, "prefetch_factor": 7, "shuffle": True},
    "no batches": {"batch_size": None},
    "no batches, shuffled": {"batch_size": None, "shuffle": True},
    "collate_fn": {"batch_size": 3, "collate_fn": datasets.listed},
    "init_fn": {"batch_size": 3, "worker_init_fn": datasets.tag},
    "timeout": {"batch_size": 3, "timeout": 30},
    "one batch": {"batch_size": 1000},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str) -> None:
    made = datasets.Plain if name == "collate_fn" else datasets.Random
    check(lambda cls: cls(made(), num_workers=2, **OPTIONS[name]), epochs=3)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(99)


SAMPLERS: dict[str, Any] = {
    "random": lambda d: {"sampler": RandomSampler(d), "batch_size": 3},
    "with replacement": lambda d: {"sampler": RandomSampler(d, replacement=True, num_samples=50), "batch_size": 3},
    "more than there are": lambda d: {"sampler": RandomSampler(d, num_samples=80), "batch_size": 3},
    "own generator": lambda d: {"sampler": RandomSampler(d, generator=generator()), "batch_size": 3},
    "loader's generator": lambda d: {"generator": generator(), "shuffle": True, "batch_size": 3},
    "subset": lambda d: {"sampler": SubsetRandomSampler(range(5, 20)), "batch_size": 3},
    "weighted": lambda d: {"sampler": WeightedRandomSampler([1.0] * len(d), 30), "batch_size": 3},
    "distributed": lambda d: {"sampler": DistributedSampler(d, num_replicas=2, rank=1), "batch_size": 3},
    "batch sampler": lambda d: {"batch_sampler": BatchSampler(SequentialSampler(d), 4, True)},
    "list of batches": lambda d: {"batch_sampler": [[1, 2], [3], [4, 5, 6, 7]]},
    "tensors as indices": lambda d: {"sampler": [torch.tensor(3), torch.tensor(1)], "batch_size": 2},
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers(name: str) -> None:
    def make(cls: Any) -> Any:
        dataset = datasets.Random()
        return cls(dataset, num_workers=2, **SAMPLERS[name](dataset))

    check(make)


def test_a_dataset_that_makes_batches_itself() -> None:
    dataset = datasets.Whole()
    sampler = BatchSampler(RandomSampler(dataset), 5, False)
    check(lambda cls: cls(dataset, sampler=sampler, batch_size=None, num_workers=2))


def test_a_sampler_that_draws_while_the_training_does() -> None:
    """Its indices are drawn when torch draws them, because somebody could tell."""

    class Drawing(torch.utils.data.Sampler[int]):
        def __iter__(self) -> Any:
            for _ in range(20):
                yield int(torch.randint(37, ()))

        def __len__(self) -> int:
            return 20

    check(lambda cls: cls(datasets.Plain(), sampler=Drawing(), batch_size=2, num_workers=2))


@pytest.mark.parametrize("batch_size", [1, 4, None])
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("persistent", [False, True])
def test_iterable_datasets(workers: int, batch_size: int | None, persistent: bool) -> None:
    persistent = persistent and workers > 0
    check(lambda cls: cls(datasets.Stream(), batch_size, num_workers=workers, persistent_workers=persistent))


@pytest.mark.parametrize("drop_last", [False, True])
def test_chained_and_incomplete_streams(drop_last: bool) -> None:
    check(
        lambda cls: cls(ChainDataset([datasets.Stream(5), datasets.Stream(11)]), 3, num_workers=2, drop_last=drop_last)
    )


@pytest.mark.parametrize("persistent", [False, True])
def test_datapipes(persistent: bool) -> None:
    def make(cls: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipe = IterableWrapper(range(40)).shuffle().sharding_filter()
            return cls(pipe, batch_size=3, shuffle=True, num_workers=2, persistent_workers=persistent)

    check(make, epochs=2)


def test_out_of_order_brings_every_batch_once() -> None:
    loader = torchwq.DataLoader(datasets.Plain(40), batch_size=4, num_workers=3, in_order=False)
    for _ in range(2):
        assert sorted(int(row[0]) for batch in loader for row in batch) == list(range(40))
    stream = torchwq.DataLoader(datasets.Stream(), batch_size=4, num_workers=3, in_order=False)
    numbers = sorted(int(number) for batch, _ in stream for number in batch)
    assert numbers == sorted([*range(23), 1000, 1000, 1001])


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_clean_workers_make_the_same_batches(method: str) -> None:
    def make(cls: Any) -> Any:
        context = method if cls is torchwq.DataLoader else "fork"
        return cls(datasets.Random(), batch_size=4, shuffle=True, num_workers=2, multiprocessing_context=context)

    check(make)


def test_breaking_off_leaves_a_generator_as_torch_does() -> None:
    def broken(cls: Any) -> Any:
        drawn = torch.Generator().manual_seed(5)
        loader = cls(datasets.Plain(), batch_size=2, shuffle=True, num_workers=2, generator=drawn)
        out = []
        for _ in range(3):
            for number, batch in enumerate(loader):
                out.append(copy.deepcopy(batch))
                out.append(torch.rand(1, generator=drawn))
                if number == 12:
                    break
        return out

    assert same(broken(torch.utils.data.DataLoader), broken(torchwq.DataLoader))


@pytest.mark.parametrize("how", [copy.deepcopy, copy.copy, lambda loader: pickle.loads(pickle.dumps(loader))])
@pytest.mark.parametrize("used", [False, True])
def test_a_loader_can_be_copied(how: Any, used: bool) -> None:
    loader = torchwq.DataLoader(datasets.Plain(), batch_size=4, num_workers=1, persistent_workers=True)
    if used:
        next(iter(loader))
    assert same(list(how(loader)), list(loader))


def test_a_loader_that_is_not_used_takes_no_descriptor() -> None:
    before = len(os.listdir("/proc/self/fd"))
    loaders = [torchwq.DataLoader(datasets.Plain(), num_workers=2) for _ in range(20)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert loaders[0].stats().batches == 0


def test_the_number_of_workers_may_be_changed() -> None:
    loader = torchwq.DataLoader(datasets.Random(), batch_size=4, num_workers=3)
    list(loader)
    loader.num_workers = 1
    assert {int(who) for batch in loader for who in batch[4][1]} == {1}


def test_two_iterators_at_once_and_an_abandoned_one() -> None:
    def interleaved(cls: Any) -> Any:
        torch.manual_seed(1)
        loader = cls(datasets.Random(), batch_size=4, shuffle=True, num_workers=2)
        first, second = iter(loader), iter(loader)
        out = [next(first), next(second), next(first), next(second)]
        del second
        return [*out, *first]

    assert same(interleaved(torch.utils.data.DataLoader), interleaved(torchwq.DataLoader))


def test_a_persistent_loader_begins_anew_in_mid_epoch() -> None:
    def broken(cls: Any) -> Any:
        torch.manual_seed(1)
        loader = cls(datasets.Random(), batch_size=4, shuffle=True, num_workers=2, persistent_workers=True)
        out = []
        for _ in range(3):
            for number, batch in enumerate(loader):
                out.append(batch)
                if number == 3:
                    break
        return out

    expected, found = broken(torch.utils.data.DataLoader), broken(torchwq.DataLoader)
    assert same(expected, found)


BAD: list[dict[str, Any]] = [
    {"num_workers": -1},
    {"timeout": -1},
    {"prefetch_factor": 2},
    {"num_workers": 1, "prefetch_factor": -1},
    {"persistent_workers": True},
    {"shuffle": True, "sampler": [1]},
    {"batch_sampler": [[1]], "batch_size": 2},
    {"batch_size": None, "drop_last": True},
    {"num_workers": 1, "multiprocessing_context": "nonsense"},
    {"num_workers": 1, "multiprocessing_context": 3},
    {"multiprocessing_context": "fork"},
]


@pytest.mark.parametrize("arguments", BAD, ids=str)
def test_the_same_errors_for_bad_arguments(arguments: dict[str, Any]) -> None:
    with pytest.raises(Exception) as expected:  # noqa: PT011 - whatever torch raises
        torch.utils.data.DataLoader(datasets.Plain(), **arguments)
    with pytest.raises(expected.type) as found:
        torchwq.DataLoader(datasets.Plain(), **arguments)
    assert str(found.value) == str(expected.value)


def test_an_iterable_dataset_takes_no_sampler() -> None:
    with pytest.raises(ValueError, match="expected unspecified sampler"):
        torchwq.DataLoader(datasets.Stream(), sampler=[1])


def test_the_same_warning_for_a_wrong_length() -> None:
    class Short(datasets.Stream):
        def __len__(self) -> int:
            return 3

    texts = []
    for cls in (torch.utils.data.DataLoader, torchwq.DataLoader):
        loader = cls(Short(), batch_size=2, num_workers=2)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert len(loader) == 2
            list(loader)
        texts.append([str(each.message).split("was reported")[1] for each in caught if "reported" in str(each.message)])
    assert texts[0]
    assert texts[0] == texts[1]


def test_it_is_a_torch_dataloader() -> None:
    loader = torchwq.DataLoader(datasets.Plain(), batch_size=4, num_workers=1)
    assert isinstance(loader, torch.utils.data.DataLoader)
    assert len(loader) == 10
    assert len(iter(loader)) == 10
    with pytest.raises(ValueError, match="should not be set"):
        loader.batch_size = 3


#: After how many batches epochs are broken off, one after the other; None is a whole one.
BREAKS: list[tuple[int | None, ...]] = [(3, 0, None), (0, 0, None, 1, 9, 0, 0, 0, None, None, 0, 7, 0, None)]


@pytest.mark.parametrize(
    ("workers", "options", "pinned"),
    [(2, {}, False), (3, {"prefetch_factor": 1}, False), (2, {}, True)],
    ids=["two", "three", "pinned"],
)
def test_epochs_broken_off_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, workers: int, options: dict[str, Any], pinned: bool
) -> None:
    """Random numbers of persistent workers go on as with torch, however many batches were on their way."""

    def run(cls: Any, breaks: tuple[int | None, ...]) -> Any:
        torch.manual_seed(1)
        loader = cls(
            datasets.Random(), batch_size=4, shuffle=True, num_workers=workers, persistent_workers=True, **options
        )
        out = []
        for stop in breaks:
            iterator = iter(loader)
            out.extend(copy.deepcopy(batch) for batch in itertools.islice(iterator, stop))
        return out

    expected = [run(torch.utils.data.DataLoader, breaks) for breaks in BREAKS]
    if pinned:
        Pinned(monkeypatch)
        options = {**options, "pin_memory": True}
    for each, breaks in zip(expected, BREAKS, strict=True):
        assert same(each, run(torchwq.DataLoader, breaks)), breaks


class Zeros(datasets.Plain):
    def __getitem__(self, index: int) -> Any:
        return torch.zeros(2)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_default_dtype_counts_where_it_does_with_torchs_workers(method: str) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        found = [
            next(iter(cls(Zeros(4), 2, num_workers=1, multiprocessing_context=method))).dtype
            for cls in (torch.utils.data.DataLoader, torchwq.DataLoader)
        ]
    finally:
        torch.set_default_dtype(torch.float32)
    assert found[0] == found[1]
