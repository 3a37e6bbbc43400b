"""Datasets and samplers with a state, and a check that a loader goes on from its state as if it had not stopped."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

import torchwq

from . import datasets
from .datasets import same


def through_json(state: Any) -> Any:
    return json.loads(json.dumps(state))


def through_file(state: Any) -> Any:
    """As ``torch.load`` reads it by default."""
    file = io.BytesIO()
    torch.save({"loader": state}, file)
    file.seek(0)
    return torch.load(file)["loader"]


class Drawing(Dataset[Any]):
    """A map-style dataset with a state: the generator from which it draws."""

    def __init__(self, n: int = 24) -> None:
        self.n = n
        self.calls = 0

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Any:
        self.calls += 1
        return index, int(torch.randint(1 << 40, ())), self.calls

    def state_dict(self) -> dict[str, Any]:
        return {"generator": torch.get_rng_state(), "calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["generator"])
        self.calls = state["calls"]


class Counted(Dataset[Any]):
    """A map-style dataset whose state is plain: how often it was asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        self.calls += 1
        return index, self.calls

    def state_dict(self) -> dict[str, int]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]


class Epochs(IterableDataset[Any]):
    """An iterable dataset with a state, which counts its epochs; its iterator is a generator."""

    def __init__(self) -> None:
        self.position = self.epoch = 0
        self.resumed = False

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info is not None else (0, 1)
        if not self.resumed:
            self.position = 0
        self.resumed = False
        for number in list(range(first, 23, step))[self.position :]:
            self.position += 1
            yield number, self.epoch
        self.position = 0
        self.epoch += 1

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position, self.epoch, self.resumed = state["position"], state["epoch"], True


class Own(IterableDataset[Any]):
    """An iterable dataset that is its own iterator, and begins anew with each ``iter``."""

    def __iter__(self) -> Any:
        info = get_worker_info()
        self.next, self.step = (info.id, info.num_workers) if info is not None else (0, 1)
        return self

    def __next__(self) -> Any:
        if self.next >= 23:
            raise StopIteration
        self.next += self.step
        return self.next - self.step

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


class Apart(IterableDataset[Any]):
    """An iterable dataset without a state, whose iterator has one, with a generator in it."""

    class Numbers:
        def __init__(self) -> None:
            self.next = 0

        def __iter__(self) -> Any:
            return self

        def __next__(self) -> Any:
            if self.next >= 11:
                raise StopIteration
            self.next += 1
            return self.next, int(torch.randint(1 << 40, ()))

        def state_dict(self) -> dict[str, Any]:
            return {"next": self.next, "generator": torch.get_rng_state()}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.next = state["next"]
            torch.set_rng_state(state["generator"])

    def __iter__(self) -> Any:
        return self.Numbers()


class OfIterator(Sampler[int]):
    """A sampler whose iterator has the state, and is not to be had by drawing again."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def __len__(self) -> int:
        return 24

    def __iter__(self) -> Any:
        return Permutation(self.seed)


class Permutation:
    def __init__(self, seed: int) -> None:
        self.order = torch.randperm(24, generator=torch.Generator().manual_seed(seed)).tolist()
        self.next = 0

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> int:
        if self.next == 24:
            raise StopIteration
        self.next += 1
        return int(self.order[self.next - 1])

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order, "next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order, self.next = state["order"], state["next"]


class OfSampler(Sampler[int]):
    """A sampler with a state of its own, which counts epochs."""

    def __init__(self) -> None:
        self.position = self.epoch = 0
        self.resumed = False

    def __len__(self) -> int:
        return 24

    def __iter__(self) -> Iterator[int]:
        if not self.resumed:
            self.position = 0
        self.resumed = False
        while self.position < 24:
            self.position += 1
            yield (self.position - 1 + 5 * self.epoch) % 24
        self.position = 0
        self.epoch += 1

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position, self.epoch, self.resumed = state["position"], state["epoch"], state["position"] > 0


def loader(dataset: Any, **arguments: Any) -> Any:
    arguments = {"collate_fn": list, **arguments}
    return torchwq.DataLoader(dataset, **arguments)


def check(make: Any, stop: int, before: int = 0, after: int = 1, carry: Any = copy.deepcopy) -> None:
    """What is left after ``stop`` batches, and ``after`` whole epochs, come out of the state as without it."""
    torch.manual_seed(3)
    whole = make()
    for _ in range(before):
        list(whole)
    batches = iter(whole)
    for _ in range(stop):
        next(batches)
    state = carry(whole.state_dict())
    random = torch.get_rng_state()
    expected = [list(batches), *(list(whole) for _ in range(after))]
    resumed = make()
    torch.set_rng_state(random)  # as a program does that goes on
    resumed.load_state_dict(state)
    assert same(through_pickle(resumed.state_dict()), through_pickle(state)), "it can be saved again before it is used"
    found = [list(resumed) for _ in range(1 + after)]
    assert same(expected, found), (expected, found)


def through_pickle(state: Any) -> Any:
    return json.loads(json.dumps(pickle.loads(pickle.dumps(state)), default=lambda each: each.tolist()))


class WantsArguments(datasets.Stream):
    def state_dict(self, num_samples: int, from_beginning: bool) -> Any:
        raise AssertionError("never called")

    def load_state_dict(self, state: Any) -> None:
        raise AssertionError("never called")


class Raises(WantsArguments):
    def state_dict(self) -> Any:  # type: ignore[override]
        raise OSError("the state is not to be had")


class Unsendable(WantsArguments):
    def state_dict(self) -> Any:  # type: ignore[override]
        return {"file": open(__file__)}


class RaisingSampler(OfSampler):
    def state_dict(self) -> Any:
        raise OSError("the state is not to be had")


class Wrapper:
    """Passes on to a loader what it does not have itself, and is pickled in a way of its own."""

    def __init__(self, base: Any) -> None:
        self.base = base
        self.dataset = "its own"

    def __getattr__(self, name: str) -> Any:
        if name == "base":
            raise AttributeError(name)
        return getattr(self.base, name)

    def __iter__(self) -> Any:
        return iter(self.base)

    def __reduce__(self) -> Any:
        return Wrapper, (torchwq.DataLoader(range(3)),), {"base": self.base, "dataset": self.dataset}


class Adapter(Wrapper, torchwq.DataLoader[Any]):
    """The same, and one of the loader's class at the same time, never initialized as one."""

    def __reduce__(self) -> Any:
        made = torchwq.DataLoader.__reduce__(self)
        assert isinstance(made, tuple)
        return Adapter, (torchwq.DataLoader(range(3)),), *made[2:]
