"""What torchdata's StatefulDataLoader promises of states, promised here too: ``docs/dataloader.md`` has the table."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset, RandomSampler, Sampler

import torchwq

from . import datasets
from .datasets import same
from .stateful import (
    Adapter,
    Apart,
    Counted,
    Drawing,
    Epochs,
    OfIterator,
    OfSampler,
    Own,
    Raises,
    RaisingSampler,
    Unsendable,
    WantsArguments,
    Wrapper,
    check,
    loader,
    through_file,
    through_json,
)

pytestmark = [pytest.mark.filterwarnings("ignore:This DataLoader will create"), pytest.mark.timeout(60)]

#: Every dataset without and with workers; notes after some batches, and at the beginning only, where workers take them.
GRID = [(each, workers, 1) for each in (Drawing, Epochs, Own, Apart, datasets.Stream) for workers in (0, 2)]
GRID += [(Drawing, 2, 5), (Epochs, 2, 5), (Apart, 2, 5), (Drawing, 2, 0), (Epochs, 2, 0)]


@pytest.mark.parametrize(("dataset", "workers", "every"), GRID)
def test_whoever_has_a_state_goes_on_from_it(dataset: Any, workers: int, every: int) -> None:
    def make() -> Any:
        batch = {"collate_fn": numbers} if dataset is datasets.Stream else {}
        return loader(dataset(), batch_size=2, num_workers=workers, snapshot_every_n_steps=every, **batch)

    for stop in (0, 5) if every == 1 else (5,):
        check(make, stop, after=0)


def numbers(batch: Any) -> Any:
    return [int(number) for number, _ in batch]


@pytest.mark.parametrize(("dataset", "every"), [(Drawing, 1), (Epochs, 1), (Apart, 1), (Drawing, 5), (Epochs, 5)])
def test_persistent_workers_go_on_over_several_epochs(dataset: Any, every: int) -> None:
    def make() -> Any:
        return loader(dataset(), batch_size=2, num_workers=2, persistent_workers=True, snapshot_every_n_steps=every)

    for stop in (0, 3) if every == 1 else (3,):
        check(make, stop, before=1)


def test_the_end_of_an_epoch_is_the_beginning_of_the_next() -> None:
    def states_at_end(make: Any) -> None:
        torch.manual_seed(3)
        whole = make()
        last = [whole.state_dict() for _ in whole][-1]
        over = whole.state_dict()
        expected = [list(whole), list(whole)]
        nothing = make()
        nothing.load_state_dict(last)
        assert list(nothing) == [], "the last batch was handed out, but the end was not reached"
        resumed = make()
        resumed.load_state_dict(over)
        first = list(resumed)
        assert same(expected[0], first), (expected[0], first)
        if resumed.generator is not None:
            assert same(expected[1], list(resumed))

    # Without workers, Drawing draws from the generator of this process, which goes on here.
    of_workers = {(0, False): (Epochs, Own, Counted), (2, False): (Epochs, Drawing), (2, True): (Epochs, Drawing)}
    for (workers, persistent), kinds in of_workers.items():
        for dataset in kinds:
            states_at_end(
                lambda dataset=dataset, workers=workers, persistent=persistent: loader(
                    dataset(),
                    batch_size=4,
                    num_workers=workers,
                    persistent_workers=persistent,
                    generator=torch.Generator().manual_seed(5),
                    shuffle=None if issubclass(dataset, IterableDataset) else True,
                )
            )
        states_at_end(
            lambda workers=workers, persistent=persistent: loader(
                list(range(24)), batch_size=4, shuffle=True, num_workers=workers, persistent_workers=persistent
            )
        )


@pytest.mark.parametrize("workers", [0, 2])
def test_before_the_first_epoch(workers: int) -> None:
    """The state is that of the epoch that follows, whoever has drawn random numbers meanwhile."""

    def make() -> Any:
        return loader(datasets.Random(24), batch_size=4, shuffle=True, num_workers=workers)

    first = make()
    state = through_file(first.state_dict())
    expected = list(first)
    torch.manual_seed(77)
    resumed = make()
    resumed.load_state_dict(state)
    assert same(resumed.state_dict(), resumed.state_dict())
    found = list(resumed)
    assert [[row[0] for row in batch] for batch in found] == [[row[0] for row in batch] for batch in expected]
    if workers:
        assert same(found, expected), "workers are seeded alike"
    torch.manual_seed(77)
    expected = torch.rand(1)
    torch.manual_seed(77)
    resumed.load_state_dict(state)
    list(make() if workers == 0 else resumed)
    if workers:
        assert torch.equal(expected, torch.rand(1)), "the training's random numbers are left alone"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("sampler", [OfIterator, OfSampler])
@pytest.mark.parametrize("batch_size", [None, 3])
def test_samplers_and_their_iterators(batch_size: int | None, sampler: Any, workers: int) -> None:
    made = 0

    def make() -> Any:
        nonlocal made
        made += 1
        which = OfIterator(made) if sampler is OfIterator else OfSampler()
        collate = {} if batch_size is None else {"collate_fn": list}
        collate = {"collate_fn": int} if batch_size is None else collate
        return torchwq.DataLoader(
            range(24), batch_size, sampler=which, num_workers=workers, snapshot_every_n_steps=3, **collate
        )

    for stop in (0, 5):
        # Another one of OfIterator's has another order, which its next epoch has too.
        check(make, stop, after=0 if sampler is OfIterator else 1, carry=through_json)


def test_generators_go_on_over_several_epochs() -> None:
    def of_sampler() -> Any:
        drawn = torch.Generator().manual_seed(4)
        return loader(range(24), batch_size=4, sampler=RandomSampler(range(24), generator=drawn), num_workers=2)

    def of_loader() -> Any:
        return loader(range(24), batch_size=4, shuffle=True, num_workers=2, generator=torch.Generator().manual_seed(4))

    class Global(Sampler[int]):
        """SamplerRng from the global generator, in ``__iter__``."""

        def __len__(self) -> int:
            return 24

        def __iter__(self) -> Any:
            return iter(torch.randperm(24).tolist())

    check(of_sampler, 3, before=1, after=2, carry=through_json)
    check(of_loader, 3, before=1, after=2, carry=through_file)
    for workers in (0, 2):
        check(lambda workers=workers: loader(range(24), sampler=Global(), num_workers=workers), 3, after=0)
        check(
            lambda workers=workers: loader(range(24), batch_size=4, shuffle=True, num_workers=workers),
            3,
            before=1,
            carry=through_json,
        )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_state_is_plain_and_prints_short(workers: int) -> None:
    def make() -> Any:
        return torchwq.DataLoader(datasets.Random(24), 4, True, num_workers=workers)

    first = make()
    states = [first.state_dict()]
    states += [first.state_dict() for _ in first]
    states.append(first.state_dict())
    for state in states:
        assert len(repr(state)) < 300
        assert through_json(through_file(state)) == through_json(state)
    states = [through_file(through_json(state)) for state in states]
    resumed = make()
    resumed.load_state_dict(states[2])
    assert len(list(resumed)) == 4
    assert type(pickle.loads(pickle.dumps(states[0]))) is dict
    copied = copy.deepcopy(first.state_dict())
    assert len(repr(copied)) < 300


def test_what_nobody_has_moved_is_not_in_it() -> None:
    """So a loader whose dataset draws no random numbers has a small state."""
    first = torchwq.DataLoader(datasets.Plain(), 4, True, num_workers=2)
    states = [first.state_dict()]
    states += [first.state_dict() for _ in first]
    assert all(len(json.dumps(state)) < 1500 for state in states), [len(json.dumps(state)) for state in states]
    drawing = torchwq.DataLoader(datasets.Random(), 4, num_workers=2)
    drawing.state_dict()
    batches = iter(drawing)
    next(batches)
    moved = [part["random"] for part in drawing.state_dict()["_snapshot"]["_worker_snapshots"].values()]
    assert set(moved[0]) == {"python", "torch", "numpy"}
    assert moved[1] is None, "its first batch was not handed out"


def test_a_state_stays_as_it_was() -> None:
    class Nested(Epochs):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[int] = []

        def __iter__(self) -> Iterator[Any]:
            for each in super().__iter__():
                self.seen.append(each[0])
                yield each

        def state_dict(self) -> dict[str, Any]:
            return {**super().state_dict(), "seen": self.seen}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            super().load_state_dict(state)
            self.seen = state["seen"]

    for workers, backend in ((0, "process"), (2, "process"), (2, "thread")):
        first = loader(Nested(), num_workers=workers, backend=backend)
        batches = iter(first)
        for _ in range(3):
            next(batches)
        state = first.state_dict()
        before = copy.deepcopy(state)
        list(batches)
        resumed = loader(Nested(), num_workers=workers, backend=backend)
        resumed.load_state_dict(state)
        assert len(list(resumed)) == 20
        assert state == before


@pytest.mark.parametrize("iterable", [False, True])
def test_in_any_order_every_batch_comes_once(iterable: bool) -> None:
    slow = datasets.OneSlow()
    dataset: Any = Epochs() if iterable else slow

    def make() -> Any:
        return loader(dataset, num_workers=2, in_order=False)

    first = make()
    batches = iter(first)
    found = [next(batches) for _ in range(5)]
    state = through_json(first.state_dict())
    slow.go_on.set()
    del batches
    resumed = make()
    resumed.load_state_dict(state)
    found += list(resumed)
    seen = sorted(batch[0][0] if iterable else int(batch[0][0]) for batch in found)
    assert seen == list(range(23 if iterable else 37))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_that_has_failed_is_tried_again(workers: int) -> None:
    """Unless another one was handed out after it."""

    def make(bad: set[int]) -> Any:
        return torchwq.DataLoader(datasets.Failing(bad, 24), 2, num_workers=workers)

    first = make({6})
    batches = iter(first)
    for _ in range(3):
        next(batches)
    with pytest.raises(KeyError):
        next(batches)
    failed = first.state_dict()
    assert next(batches)[:, 0].tolist() == [8, 9]
    passed = first.state_dict()
    for state, left in ((failed, list(range(6, 24))), (passed, list(range(10, 24)))):
        resumed = make(set())
        resumed.load_state_dict(state)
        assert [int(row[0]) for batch in resumed for row in batch] == left


def test_another_number_of_workers() -> None:
    def after(workers: int, stop: int = 4) -> Any:
        first = torchwq.DataLoader(range(24), 2, num_workers=workers)
        batches = iter(first)
        for _ in range(stop):
            next(batches)
        return first.state_dict()

    for saved in (0, 2):
        state = after(saved)
        for workers in {0, 2, 3} - {saved}:
            resumed = torchwq.DataLoader(range(24), 2, num_workers=workers)
            with pytest.raises(ValueError, match=r"num_workers=.*strict=False"):
                resumed.load_state_dict(state)
            with pytest.warns(UserWarning, match="random numbers begin anew") as caught:
                resumed.load_state_dict(state, strict=False)
            assert caught[0].filename == __file__
            assert [number for batch in resumed for number in batch.tolist()] == list(range(8, 24))
            assert len(list(resumed)) == 12
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed = torchwq.DataLoader(range(24), 2, num_workers=2)
        resumed.load_state_dict(after(2), strict=False)
        resumed.load_state_dict(torchwq.DataLoader(range(24), 2).state_dict())  # the beginning is for any number
        assert len(list(resumed)) == 12
    first = loader(Epochs(), num_workers=2)
    next(iter(first))
    with pytest.raises(ValueError, match="iterable dataset is shared out"):
        loader(Epochs(), num_workers=3).load_state_dict(first.state_dict(), strict=False)
    lost = loader(Counted(), num_workers=2)
    next(iter(lost))
    with pytest.warns(UserWarning, match="had told of themselves is lost"):
        loader(Counted(), num_workers=1).load_state_dict(lost.state_dict(), strict=False)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_state_dict_is_for_whoever_asks(workers: int) -> None:
    for dataset, error in ((WantsArguments, TypeError), (Raises, OSError)):
        torch.manual_seed(1)
        expected = list(torch.utils.data.DataLoader(dataset(), 4, num_workers=workers))
        torch.manual_seed(1)
        first = torchwq.DataLoader(dataset(), 4, num_workers=workers)
        assert same(list(first), expected)
        batches = iter(first)
        next(batches)
        with pytest.raises(error, match=r"num_samples|not to be had"):
            first.state_dict()
        assert len(list(batches)) == len(expected) - 1, "the loader is none the worse"
    sampled = torchwq.DataLoader(range(24), 4, sampler=RaisingSampler(), num_workers=workers)
    assert len(list(sampled)) == 6
    batches = iter(sampled)
    next(batches)
    with pytest.raises(OSError, match="not to be had"):
        sampled.state_dict()
    assert len(list(batches)) == 5
    if workers:
        unsendable = torchwq.DataLoader(Unsendable(), 4, num_workers=workers)
        assert len(list(unsendable)) == len(expected)
        next(batches := iter(unsendable))
        with pytest.raises(torchwq.MarshalError):
            unsendable.state_dict()
        assert len(list(batches)) == len(expected) - 1


@pytest.mark.parametrize("kind", [Wrapper, Adapter])
def test_a_wrapper_is_pickled_as_it_likes(kind: Any) -> None:
    base = torchwq.DataLoader(datasets.Plain(), 4, num_workers=1, persistent_workers=True)
    wrapped = kind(base)
    for carry in (lambda each: pickle.loads(pickle.dumps(each)), copy.deepcopy, copy.copy):
        assert len(list(wrapped)) == 10
        again = carry(wrapped)
        assert type(again) is kind
        assert again.dataset == "its own"
        assert type(again.base) is torchwq.DataLoader
        assert len(list(again)) == 10


def test_a_state_after_every_batch_costs_next_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No generator is read and nothing is copied in this process: counted, because time depends on the machine."""
    first = torchwq.DataLoader(datasets.Plain(400), 4, True, num_workers=2)
    first.state_dict()
    batches = iter(first)
    next(batches)
    first.state_dict()

    def never(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("called for a state in which nothing has moved")

    for module, name in ((torch, "get_rng_state"), (np.random, "get_state"), (copy, "deepcopy")):
        monkeypatch.setattr(module, name, never)
    for number in range(2, 50):
        next(batches)
        assert first.state_dict()["yielded"] == number
