"""A finalizer or a signal handler uses the channel that its thread is just using: neither hangs, and nothing is
lost."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import torchwq
from tests.injection import in_the_middle

KINDS: dict[str, tuple[Callable[[int], Any], Callable[[Any], int]]] = {
    "int": (lambda number: number, int),
    "tensor": (lambda number: torch.full((16,), number), lambda found: int(found[0])),
    "array": (lambda number: np.full(20_000, number), lambda found: int(found[0])),
}


@pytest.mark.parametrize("nested", ["write", "read"])
@pytest.mark.parametrize("outer", ["write", "read"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("capacity", [None, 8])
@pytest.mark.parametrize("where", ["here", "line"])
def test_writing_and_reading_in_the_middle_of_either_loses_nothing(
    where: str, capacity: int | None, kind: str, outer: str, nested: str
) -> None:
    make, number_of = KINDS[kind]
    channel = torchwq.channel(capacity)
    if where == "line":
        channel._core.open_to_processes()
    numbers = itertools.count()
    written: list[int] = []
    got: list[int] = []

    def write() -> None:
        number = next(numbers)
        channel.write(make(number))
        written.append(number)

    def read(nonblocking: bool = True) -> None:
        _, found = channel.read(nonblocking) if nonblocking else channel.read(timeout=10)
        if found is not None:
            got.append(number_of(found))

    for at in itertools.count():
        if outer == "read":
            write()
            write()
        operation = write if outer == "write" else lambda: read(False)
        more = in_the_middle(operation, write if nested == "write" else read, at)
        while len(got) < len(written):
            read(False)
        assert sorted(got) == sorted(written), f"at place {at}"
        if not more:
            break
    assert at > 2
    channel.close()
