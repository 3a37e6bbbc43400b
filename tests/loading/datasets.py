"""Datasets of an importable module, which workers of either kind find by their names."""

from __future__ import annotations

import multiprocessing.util
import os
import random
import signal
import time
from collections import namedtuple
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

Point = namedtuple("Point", ["x", "y"])


class Plain(Dataset[Any]):
    """Row i is filled with i."""

    def __init__(self, n: int = 37, width: int = 3) -> None:
        self.data = torch.arange(n).repeat_interleave(width).view(n, width)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index]


class Random(Plain):
    """SamplerRng from all three generators, and tells who it is."""

    def __getitem__(self, index: int) -> Any:
        info = get_worker_info()
        who = (info.id, info.num_workers, info.seed) if info is not None else (0, 0, 0)
        return index, torch.rand(2), random.random(), np.random.rand(2), who


class Mixed(Plain):
    """Everything that default collation knows."""

    def __getitem__(self, index: int) -> Any:
        return {
            "tensor": torch.full((2, 3), index, dtype=torch.uint8),
            "scalar": torch.tensor(float(index)),
            "array": np.full(4, index, np.int16),
            "number": np.float32(index),
            "int": index,
            "float": index / 2,
            "text": str(index),
            "bytes": bytes([index]),
            "nested": [torch.ones(1) * index, {"deep": (index, torch.zeros(2, dtype=torch.bool))}],
            "point": Point(index, torch.tensor([index])),
            "empty": torch.zeros(0, 2),
            "complex": torch.full((2,), complex(index, 1)),
            "half": torch.full((2,), index, dtype=torch.bfloat16),
        }


class Dicts(Plain):
    """Ten small tensors by name."""

    def __getitem__(self, index: int) -> Any:
        return {f"k{key}": self.data[index] + key for key in range(10)}


class Many(Plain):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self.data[index] + 1000 for index in indices]


class Whole(Plain):
    """Does its own batching: the sampler's indices are batches."""

    def __getitem__(self, index: Any) -> Any:
        return self.data[torch.as_tensor(index)]


class Cached(Dataset[Any]):
    """Hands out its own tensors, whole and as views."""

    def __init__(self) -> None:
        self.items = [torch.full((4,), float(index)) for index in range(6)]
        self.table = torch.arange(12.0).view(6, 2)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index], self.table[index]


class Failing(Plain):
    def __init__(self, bad: set[int], n: int = 20) -> None:
        super().__init__(n)
        self.bad = bad

    def __getitem__(self, index: int) -> Any:
        if index in self.bad:
            raise KeyError(f"no sample {index}")
        return super().__getitem__(index)


class Dying(Plain):
    """Kills its worker at an index, as often as a file in ``folder`` does not tell that it has happened."""

    def __init__(self, at: int, folder: str | None = None, n: int = 20, how: int = signal.SIGKILL) -> None:
        super().__init__(n)
        self.at, self.folder, self.how = at, folder, how

    def __getitem__(self, index: int) -> Any:
        if index == self.at and get_worker_info() is not None:
            if self.folder is None:
                os.kill(os.getpid(), self.how)
            else:
                mark = os.path.join(self.folder, str(index))
                if not os.path.exists(mark):
                    with open(mark, "w"):
                        pass
                    os.kill(os.getpid(), self.how)
        return super().__getitem__(index), torch.rand(2), random.random(), np.random.rand()


class Exiting(Plain):
    def __getitem__(self, index: int) -> Any:
        os._exit(3)


class Slow(Plain):
    def __getitem__(self, index: int) -> Any:
        time.sleep(30)
        return super().__getitem__(index)


class DyingBesideABusyOne(Plain):
    def __getitem__(self, index: int) -> Any:
        if index:
            time.sleep(8)
        os.kill(os.getpid(), signal.SIGKILL)


class Finishing(IterableDataset[Any]):
    """Takes its time to end, and leaves a file for each step of it."""

    def __init__(self, folder: str, seconds: float = 1.8) -> None:
        self.folder, self.seconds = folder, seconds

    def note(self, what: str) -> None:
        time.sleep(self.seconds)
        with open(os.path.join(self.folder, f"{what}-{os.getpid()}"), "w"):
            pass

    def __iter__(self) -> Iterator[int]:
        multiprocessing.util.Finalize(self, self.note, ("finalizer",), exitpriority=1)
        try:
            yield from range(1000)
        finally:
            self.note("finally")


class Caching(Plain):
    """Writes a file for each item, and is slow from the third on."""

    def __init__(self, folder: str, seconds: float = 1.8) -> None:
        self.folder, self.seconds = folder, seconds

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> int:
        with open(os.path.join(self.folder, f"begun-{index}"), "w"):
            pass
        if index > 1:
            time.sleep(self.seconds)
            with open(os.path.join(self.folder, f"done-{index}"), "w"):
                pass
        return index


class Identity(Plain):
    """Where it runs."""

    def __getitem__(self, index: int) -> Any:
        return os.getpid()


class Stream(IterableDataset[Any]):
    """Numbers, shared among the workers; worker k has k more than its part."""

    def __init__(self, n: int = 23) -> None:
        self.n = n

    def numbers(self) -> list[int]:
        info = get_worker_info()
        if info is None:
            return list(range(self.n))
        return [*range(info.id, self.n, info.num_workers), *range(1000, 1000 + info.id)]

    def __iter__(self) -> Iterator[Any]:
        for number in self.numbers():
            yield torch.tensor([number]), torch.rand(1)


class StatefulStream(Stream):
    """Has a state, and counts how many items were made."""

    def __init__(self, n: int = 23) -> None:
        super().__init__(n)
        self.position = 0
        self.made = 0

    def __iter__(self) -> Iterator[Any]:
        numbers = self.numbers()
        while self.position < len(numbers):
            self.position += 1
            self.made += 1
            yield torch.tensor([numbers[self.position - 1], self.made])
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def tag(worker_id: int) -> None:
    """A worker_init_fn."""
    info = get_worker_info()
    assert info is not None
    assert info.id == worker_id
    random.seed(1000 + worker_id)


def fail(batch: list[Any]) -> Any:
    """A collate_fn."""
    raise ValueError("no batch")


def fail_to_start(worker_id: int) -> None:
    raise OSError(f"worker {worker_id} finds no data")


def listed(batch: list[Any]) -> Any:
    """A collate_fn that makes a view, a private tensor and an array."""
    stacked = torch.stack([torch.as_tensor(each) for each in batch])
    return [stacked[:, :1], stacked.sum(0), stacked.numpy().copy(), len(batch)]


def same(left: Any, right: Any) -> bool:
    """Equal in type and value, bit for bit."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and left.stride() == right.stride() and torch.equal(left, right)
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and bool((left == right).all())
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


class DyingStream(IterableDataset[Any]):
    """40 numbers. Its worker dies at one of them if the file is there, and takes it away."""

    def __init__(self, flag: str, at: int = 0) -> None:
        self.flag, self.at = flag, at

    def __iter__(self) -> Iterator[Any]:
        for number in range(40):
            if number == self.at and os.path.exists(self.flag):
                os.unlink(self.flag)
                os._exit(3)
            yield number


class OneSlow(Plain):
    """Worker 0 does not answer until it may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = torch.multiprocessing.get_context("fork").Event()

    def __getitem__(self, index: int) -> Any:
        info = get_worker_info()
        if info is not None and info.id == 0:
            self.go_on.wait(30)
        return super().__getitem__(index)
