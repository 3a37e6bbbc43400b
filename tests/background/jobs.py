"""Functions for the workers of these tests. Their module can be imported, so they travel by name."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset

import torchwq


def wait_for(flag: torch.Tensor, index: int = 0) -> None:
    while not flag[index]:
        time.sleep(0.001)


# --- plain tasks ---


def gated(gate: torch.Tensor, result: Any = "done") -> Any:
    wait_for(gate)
    return result


def fail(text: str) -> None:
    raise ZeroDivisionError(text)


def take_all(*args: Any) -> Any:
    return args


class _Exits:
    def __reduce__(self) -> Any:
        return sys.exit, (3,)


def exits_where_it_is_read() -> Any:
    return _Exits()


def die(gate: torch.Tensor) -> None:
    wait_for(gate)
    os.kill(os.getpid(), signal.SIGKILL)


def give_lock() -> Any:
    return [threading.Lock()]


def info() -> Any:
    return torchwq.worker_info()


def give_list() -> list[int]:
    return [1, 2, 3]


def sleep_and_tell(seconds: float) -> str:
    time.sleep(seconds)
    return "slept"


# --- producers ---


def count(n: int, result: Any = None) -> Generator[int, None, Any]:
    yield from range(n)
    return result


def give_iterator(n: int) -> Iterator[int]:
    return iter(range(n))


def give_map(n: int) -> Any:
    return map(str, range(n))


def counted(n: int, made: torch.Tensor) -> Generator[int, None, None]:
    """``made[0]`` counts the items; ``made[1]`` is set if the producer was closed."""
    try:
        for number in range(n):
            made[0] += 1
            yield number
    finally:
        made[1] += 1


def counted_with_pid(n: int, made: torch.Tensor) -> Generator[int, None, None]:
    made[1] = os.getpid()
    for number in range(n):
        made[0] += 1
        yield number


def most_ahead(n: int, taken: torch.Tensor, ahead: torch.Tensor) -> Generator[int, None, None]:
    """Notes in ``ahead`` by how much the items made were ever ahead of those taken."""
    for number in range(n):
        ahead[0] = max(int(ahead[0]), number + 1 - int(taken[0]))
        yield number


def fail_at(n: int) -> Generator[int, None, None]:
    yield from range(n)
    raise ZeroDivisionError(f"at item {n}")


def fail_before_the_first() -> Iterator[int]:
    raise LookupError("no items at all")


def unpicklable_at(n: int) -> Generator[Any, None, None]:
    yield from range(n)
    yield {"held": threading.Lock()}
    yield "after"


def die_at(n: int) -> Generator[int, None, None]:
    yield from range(n)
    os.kill(os.getpid(), signal.SIGKILL)


def exit_at(n: int, status: int) -> Generator[int, None, None]:
    yield from range(n)
    os._exit(status)


def stuck_at(n: int, gate: torch.Tensor, made: torch.Tensor) -> Generator[int, None, None]:
    made[1] = os.getpid()
    for number in range(n):
        made[0] += 1
        yield number
    made[0] += 1
    wait_for(gate)


def hand_over(gate: torch.Tensor) -> Generator[Any, None, None]:
    """Yields a tensor, and then the values that the consumer has written into it."""
    tensor = torch.zeros(4)
    yield {"batch": [tensor]}
    wait_for(gate)
    yield tensor.tolist()


def read_and_double(queue: torchwq.WorkQueue) -> Generator[int, None, None]:
    for question in queue:
        yield question * 2


def nested_producer(n: int) -> Generator[int, None, None]:
    """A producer that has a producer."""
    for item in torchwq.BackgroundTask(count, n):
        yield item + 100


class Squares(IterableDataset[int]):
    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[int]:
        return (number * number for number in range(self.n))


class SizedSquares(Squares):
    def __len__(self) -> int:
        return self.n


class Letters(Dataset[str]):
    """A map-style dataset, with more to read beyond its length."""

    def __init__(self, text: str, bad: int = -1) -> None:
        self.text = text
        self.bad = bad

    def __getitem__(self, index: int) -> str:
        if index == self.bad:
            raise LookupError(f"letter {index} cannot be read")
        return (self.text + "too far")[index]

    def __len__(self) -> int:
        return len(self.text)


class OldStyle:
    """Iterable by the old protocol: __getitem__ until IndexError."""

    def __getitem__(self, index: int) -> int:
        if index >= 4:
            raise IndexError(index)
        return index * 3


class Countdown:
    """An iterator, with a place of its own."""

    def __init__(self, start: int) -> None:
        self.left = start

    def __iter__(self) -> Countdown:
        return self

    def __next__(self) -> int:
        if self.left == 0:
            raise StopIteration
        self.left -= 1
        return self.left


class Bag:
    """An iterable that is no iterator."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)
