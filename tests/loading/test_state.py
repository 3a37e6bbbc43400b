"""A state taken anywhere brings exactly the batches that were left, in a new loader, as after a restart."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import RandomSampler, Sampler

import torchwq

from . import datasets
from .datasets import same

pytestmark = [pytest.mark.filterwarnings("ignore:This DataLoader will create"), pytest.mark.timeout(120)]


def saved(state: Any) -> Any:
    """What comes back from a file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def state_after(loader: Any, batches: int) -> Any:
    """The state of an iterator that has handed out so many batches and is gone."""
    iterator = iter(loader)
    for _ in range(batches):
        next(iterator)
    return loader.state_dict()


def check(make: Any, stop: int, epochs_before: int = 0, part: Any = lambda batch: batch) -> None:
    """Interrupt after ``stop`` batches of an epoch; the rest must be what an uninterrupted run gives."""
    torch.manual_seed(11)
    whole = make()
    for _ in range(epochs_before):
        list(whole)
    expected = [part(batch) for batch in whole]

    torch.manual_seed(11)
    loader = make()
    for _ in range(epochs_before):
        list(loader)
    iterator = iter(loader)
    found = [part(next(iterator)) for _ in range(stop)]
    state = saved(loader.state_dict())
    del iterator, loader

    torch.manual_seed(999)
    torch.rand(7)
    before = torch.get_rng_state()
    resumed = make()
    resumed.load_state_dict(state)
    found += [part(batch) for batch in resumed]
    assert same(expected, found)
    assert len(found) == len(expected)
    del before


@pytest.mark.parametrize("stop", [0, 1, 4, 9])
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("shuffle", [False, True], ids=["in turn", "shuffled"])
def test_map_style(workers: int, shuffle: bool, stop: int) -> None:
    check(lambda: torchwq.DataLoader(datasets.Plain(), 4, shuffle, num_workers=workers), stop)


@pytest.mark.parametrize("persistent", [False, True])
def test_in_a_later_epoch(persistent: bool) -> None:
    check(
        lambda: torchwq.DataLoader(datasets.Plain(), 4, True, num_workers=2, persistent_workers=persistent),
        3,
        epochs_before=2,
    )


def test_with_a_generator() -> None:
    def make() -> Any:
        return torchwq.DataLoader(datasets.Plain(), 4, True, num_workers=2, generator=torch.Generator().manual_seed(4))

    check(make, 3)
    dataset = datasets.Plain()
    check(
        lambda: torchwq.DataLoader(
            dataset, 4, sampler=RandomSampler(dataset, generator=torch.Generator().manual_seed(4)), num_workers=2
        ),
        3,
        epochs_before=1,
    )


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("stop", [1, 4, 7])
@pytest.mark.parametrize("dataset", [datasets.Stream, datasets.StatefulStream])
def test_iterable(dataset: Any, stop: int, workers: int) -> None:
    def numbers(batch: Any) -> Any:
        return (batch[0] if isinstance(batch, list) else batch[:, :1]).flatten().tolist()

    check(lambda: torchwq.DataLoader(dataset(), 3, num_workers=workers), stop, part=numbers)


def test_a_stateful_stream_is_not_iterated_again() -> None:
    loader = torchwq.DataLoader(datasets.StatefulStream(), 3, num_workers=2)
    state = state_after(loader, 4)
    resumed = torchwq.DataLoader(datasets.StatefulStream(), 3, num_workers=2)
    resumed.load_state_dict(state)
    made = next(iter(resumed))[:, 1].tolist()
    assert made == [1, 2, 3], "the worker had made none before"


def test_a_map_style_dataset_is_not_asked_for_the_batches_before() -> None:
    loader = torchwq.DataLoader(datasets.Plain(), 4, num_workers=1)
    state = state_after(loader, 5)
    resumed = torchwq.DataLoader(datasets.Failing(set(range(20)), 37), 4, num_workers=1)
    resumed.load_state_dict(state)
    assert next(iter(resumed))[:, 0].tolist() == [20, 21, 22, 23]


class Counting(Sampler[int]):
    """A sampler with a state; counts what is drawn from it."""

    def __init__(self) -> None:
        self.next = 0
        self.drawn = 0

    def __iter__(self) -> Iterator[int]:
        while self.next < 30:
            self.next += 1
            self.drawn += 1
            yield self.next - 1
        self.next = 0

    def __len__(self) -> int:
        return 30

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_sampler_with_a_state_is_moved_by_it(workers: int) -> None:
    loader = torchwq.DataLoader(datasets.Plain(), None, sampler=Counting(), num_workers=workers)
    state = saved(state_after(loader, 10))
    sampler = Counting()
    resumed = torchwq.DataLoader(datasets.Plain(), None, sampler=sampler, num_workers=workers)
    resumed.load_state_dict(state)
    assert [int(row[0]) for row in resumed] == list(range(10, 30))
    assert sampler.drawn == 20


@pytest.mark.parametrize("workers", [1, 2])
def test_random_numbers_of_workers_go_on_where_they_were(workers: int) -> None:
    def make() -> Any:
        loader = torchwq.DataLoader(datasets.Random(), 4, True, num_workers=workers)
        loader.state_dict()  # from now on states have them
        return loader

    check(make, 3)


def test_before_the_first_and_after_the_last_batch() -> None:
    loader = torchwq.DataLoader(datasets.Plain(), 4, num_workers=2)
    fresh = saved(loader.state_dict())
    list(loader)
    over = saved(loader.state_dict())
    for state in (fresh, over):
        resumed = torchwq.DataLoader(datasets.Plain(), 4, num_workers=2)
        resumed.load_state_dict(state)
        assert len(list(resumed)) == 10


def test_loading_leaves_the_random_numbers_of_the_training_alone() -> None:
    loader = torchwq.DataLoader(datasets.Plain(), 4, True, num_workers=1)
    state = state_after(loader, 1)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    loader.load_state_dict(state)
    resumed = iter(loader)
    torch.manual_seed(5)
    next(resumed)
    assert torch.equal(torch.rand(3), expected)


def test_the_epoch_after_a_resumed_one_is_whole() -> None:
    loader = torchwq.DataLoader(datasets.Plain(), 4, num_workers=2, persistent_workers=True)
    iterator = iter(loader)
    next(iterator)
    loader.load_state_dict(loader.state_dict())
    assert len(list(loader)) == 9
    assert len(list(loader)) == 10


@pytest.mark.parametrize("workers", [0, 2])
def test_a_state_after_breaking_off(workers: int) -> None:
    loader = torchwq.DataLoader(datasets.Plain(), 4, num_workers=workers)
    for number, _ in enumerate(loader):
        if number == 4:
            break
    state = saved(loader.state_dict())
    resumed = torchwq.DataLoader(datasets.Plain(), 4, num_workers=workers)
    resumed.load_state_dict(state)
    assert saved(resumed.state_dict())["yielded"] == 5, "it can be saved before it was used"
    assert next(iter(resumed))[:, 0].tolist() == [20, 21, 22, 23]


def test_an_older_iterator_that_goes_does_not_count() -> None:
    loader = torchwq.DataLoader(datasets.Plain(), 4, num_workers=1)
    older = iter(loader)
    next(older)
    newer = iter(loader)
    for _ in range(3):
        next(newer)
    del older
    assert loader.state_dict()["yielded"] == 3
    del newer
    assert loader.state_dict()["yielded"] == 3


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_sampler_with_a_state_in_a_batch_sampler(workers: int) -> None:
    loader = torchwq.DataLoader(datasets.Plain(), 3, sampler=Counting(), num_workers=workers)
    state = saved(state_after(loader, 4))
    sampler = Counting()
    resumed = torchwq.DataLoader(datasets.Plain(), 3, sampler=sampler, num_workers=workers)
    resumed.load_state_dict(state)
    assert [int(row[0]) for batch in resumed for row in batch] == list(range(12, 30))
    assert sampler.drawn == 18


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("dataset", [datasets.Plain, datasets.Stream])
def test_after_the_last_batch_and_before_the_end_nothing_is_left(dataset: Any, workers: int) -> None:
    loader = torchwq.DataLoader(dataset(), 4, num_workers=workers)
    states = [saved(loader.state_dict()) for _ in loader]
    resumed = torchwq.DataLoader(dataset(), 4, num_workers=workers)
    resumed.load_state_dict(states[-1])
    assert len(list(resumed)) == 0
    assert len(list(resumed)) == len(states)


def test_the_end_of_an_epoch_keeps_the_generator() -> None:
    def make() -> Any:
        return torchwq.DataLoader(datasets.Plain(), 4, True, num_workers=1, generator=torch.Generator().manual_seed(4))

    loader = make()
    list(loader)
    state = saved(loader.state_dict())
    expected = list(loader)
    resumed = make()
    resumed.load_state_dict(state)
    assert same(expected, list(resumed))


def test_states_with_prefetching_across_epochs() -> None:
    check(
        lambda: torchwq.DataLoader(
            datasets.Plain(), 4, True, num_workers=2, persistent_workers=True, prefetch_across_epochs=True
        ),
        9,
        epochs_before=0,
    )


def test_the_state_between_two_epochs_has_the_order_that_was_drawn_ahead() -> None:
    def make() -> Any:
        return torchwq.DataLoader(
            datasets.Plain(), 4, True, num_workers=1, persistent_workers=True, prefetch_across_epochs=True
        )

    loader = make()
    list(loader)
    state = saved(loader.state_dict())
    resumed = make()
    resumed.load_state_dict(state)
    assert same(list(loader), list(resumed))


def test_a_failure_at_the_end_of_an_epoch_is_not_counted_in_the_next_one() -> None:
    def make() -> Any:
        failing = datasets.Failing({19})
        return torchwq.DataLoader(failing, 4, num_workers=2, persistent_workers=True, prefetch_across_epochs=True)

    loader = make()
    iterator = iter(loader)
    for _ in range(4):
        next(iterator)
    with pytest.raises(KeyError):
        next(iterator)
    assert next(iterator, None) is None
    iterator = iter(loader)
    next(iterator)
    resumed = make()
    resumed.load_state_dict(saved(loader.state_dict()))
    assert same(next(iterator), next(iter(resumed)))


def test_an_automatic_number_of_workers_is_that_of_the_state() -> None:
    loader = torchwq.DataLoader(datasets.Plain(), 4, num_workers=2)
    state = state_after(loader, 1)
    resumed = torchwq.DataLoader(datasets.Plain(), 4, num_workers="auto")
    resumed.load_state_dict(state)
    assert len(list(resumed)) == 9


def test_a_state_says_what_it_needs() -> None:
    loader = torchwq.DataLoader(datasets.Plain(), 4, num_workers=2)
    iterator = iter(loader)
    state = loader.state_dict()
    del iterator
    with pytest.raises(ValueError, match=r"num_workers=2 .* num_workers=3.*Make the loader with num_workers=2"):
        torchwq.DataLoader(datasets.Plain(), 4, num_workers=3).load_state_dict(state)
    with pytest.raises(ValueError, match="map-style dataset, and this one has an iterable-style"):
        torchwq.DataLoader(datasets.Stream(), 4, num_workers=2).load_state_dict(state)
    for nonsense in ({}, {"_sampler_iter_state": 3}, None):
        with pytest.raises(ValueError, match="no state of a torchwq"):
            loader.load_state_dict(nonsense)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"batch_size": 5}, "batch_size=2"),
        ({"shuffle": False}, "shuffle=True"),
        ({"dataset": range(9)}, "len.dataset.=12"),
    ],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_that_makes_other_batches_refuses_the_state(changed: Any, what: str, workers: int) -> None:
    made = {"dataset": range(12), "batch_size": 2, "shuffle": True, "num_workers": workers}
    loader = torchwq.DataLoader(**made)
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    saved = json.loads(json.dumps(loader.state_dict()))
    other = torchwq.DataLoader(**{**made, **changed})
    with pytest.raises(ValueError, match=rf"taken with .*{what}.*strict=False"):
        other.load_state_dict(saved)
    with pytest.warns(UserWarning, match="twice, or never"):
        other.load_state_dict(saved, strict=False)
    same = torchwq.DataLoader(**made)
    same.load_state_dict(saved)
    assert len(list(same)) == 3
    same.load_state_dict(saved)
    assert repr(same.state_dict()) == repr(loader.state_dict())  # in few words, as any other
    saved.pop("_torchwq_made_with")  # one of before
    same.load_state_dict(saved)
    assert len(list(same)) == 3


def test_the_state_of_a_beginning_fits_loaders_with_other_batches() -> None:
    loader = torchwq.DataLoader(range(12), 2)
    list(loader)
    other = torchwq.DataLoader(range(12), 5)
    other.load_state_dict(loader.state_dict())
    assert len(list(other)) == 3
