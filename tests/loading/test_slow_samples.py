"""``stats()`` names the samples that took the longest."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

import torchwq
from torchwq.loading import slow_samples
from torchwq.loading.counters import SLOWEST, TOLD

#: Far apart: a sample is late, too, if others have the processor.
SLOW = {17: 0.4, 3: 0.2, 30: 0.8}


class Samples(torch.utils.data.Dataset[Any]):
    """Each takes a millisecond, and some longer."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        time.sleep(0.001 + self.scale * SLOW.get(index, 0.0))
        return torch.tensor(index)


class AtOnce(Samples):
    number = 40

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]


class Named(Samples):
    def __getitem__(self, name: Any) -> Any:
        return super().__getitem__(int(name))


class Stream(torch.utils.data.IterableDataset[Any]):
    number = 20

    def __iter__(self) -> Any:
        for number in range(20):
            time.sleep(0.001)
            yield number


@pytest.mark.parametrize("batch_size", [None, 8])
def test_the_slowest_samples_come_first(backend: str, batch_size: int | None) -> None:
    loader = torchwq.DataLoader(Samples(), batch_size, num_workers=2, backend=backend)
    for _ in range(2):
        assert len(list(loader)) == len(loader)
        slowest = loader.stats().slowest
        assert [each.index for each in slowest[:3]] == [30, 17, 3]
        assert slowest[0].seconds >= 0.8
        assert slowest == loader.stats(last_epoch=True).slowest
        assert slowest == sorted(slowest, key=lambda each: -each.seconds)
    assert "slowest samples: 30 (" in str(loader.stats())
    assert "slowest samples: 30 (" in loader.stats()._repr_html_()


def test_each_epoch_has_its_own() -> None:
    samples = Samples()
    loader = torchwq.DataLoader(samples, 8, num_workers=1, persistent_workers=True)
    list(loader)
    before = loader.stats().slowest
    list(loader)
    assert {each.index for each in before} == {each.index for each in loader.stats().slowest} == set(SLOW)
    assert before != loader.stats().slowest


@pytest.mark.parametrize("dataset", [AtOnce(), Stream()], ids=["at once", "stream"])
def test_where_no_sample_can_be_told_from_others_none_is_named(dataset: Any) -> None:
    loader = torchwq.DataLoader(dataset, 8, num_workers=1)
    assert torch.cat(list(loader)).tolist() == list(range(dataset.number))
    assert loader.stats().slowest == []
    assert "slowest" not in str(loader.stats())


class Large(Samples):
    def __getitem__(self, index: int) -> Any:
        return torch.tensor(index % 7)


def test_an_index_that_no_word_holds_is_not_named() -> None:
    indices = [2**70 + 1, 2, 2**64 - 1, 2**64 - 2, -1]
    loader = torchwq.DataLoader(Large(), 8, sampler=indices, num_workers=1)
    assert torch.cat(list(loader)).tolist() == [index % 7 for index in indices]
    assert {each.index for each in loader.stats().slowest} <= {2, 2**64 - 2}


def test_an_index_that_is_no_number_is_not_named() -> None:
    loader = torchwq.DataLoader(Named(), 8, sampler=[str(number) for number in range(8)], num_workers=1)
    assert torch.cat(list(loader)).tolist() == list(range(8))
    assert loader.stats().slowest == []


def test_samples_that_take_no_time_are_passed_on_as_they_are() -> None:
    samples = slow_samples.SlowSamples(memoryview(bytearray(8 * TOLD)).cast("Q"))
    seen: list[Any] = []
    samples.last_batch = 1000
    indices = [1, 2, 3]
    samples.fetch(seen.append, indices, is_batch=True)
    samples.fetch(seen.append, 4, is_batch=False)
    samples.last_batch = 1 << 30
    samples.fetch(seen.append, indices, is_batch=False)  # one sample, of these
    assert seen[0] is seen[2] is indices
    samples.fetch(lambda given: seen.append(list(given)), indices, is_batch=True)
    assert seen[1:] == [4, indices, indices]


def test_the_three_slowest_are_kept_in_their_order() -> None:
    words = memoryview(bytearray(8 * TOLD)).cast("Q")
    samples = slow_samples.SlowSamples(words)
    for index, took in enumerate([5, 9, 7, 1, 8, 9]):
        samples.note(index, took)
    samples.note(-1, 100)
    samples.note("a", 100)
    assert list(words[SLOWEST:TOLD]) == [9, 2, 9, 6, 8, 5]
    samples.begin_epoch()
    assert not any(words)
