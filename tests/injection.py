"""Does something in the middle of something else, as a signal handler or a finalizer does: at every place, one by one.

CPython runs signal handlers and finalizers where a function begins or has returned. ``sys.setprofile`` tells of each
such place, so no luck is needed to meet one. (It also tells when a function of C is about to be called: there nothing
comes.)
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import torch

from torchwq import _native

#: An operation has more places than so many. C code has none.
FEWEST_PLACES = 5 if _native.core is None else 2

#: How to make a value of each kind of a number, and to find the number in it.
KINDS: dict[str, tuple[Callable[[int], Any], Callable[[Any], int]]] = {
    "int": (lambda number: number, int),
    "tensor": (lambda number: torch.full((16,), number), lambda found: int(found[0])),
    "tensors": (lambda number: {key: torch.full((30_000,), number) for key in "ab"}, lambda found: int(found["a"][0])),
    "array": (lambda number: np.full(20_000, number), lambda found: int(found[0])),
}


class _Injector:
    def __init__(self, at: int, action: Callable[[], object]) -> None:
        self._left = at
        self._action = action
        self.has_acted = False

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        if "torchwq" not in frame.f_code.co_filename or event == "c_call":
            return
        self._left -= 1
        if self._left < 0 and not self.has_acted:
            self.has_acted = True
            sys.setprofile(None)
            self._action()


def in_the_middle(operation: Callable[[], object], action: Callable[[], object], at: int) -> bool:
    """Run ``operation``, and ``action`` at the place number ``at`` in it; False if it has fewer."""
    injector = _Injector(at, action)
    sys.setprofile(injector)
    try:
        operation()
    finally:
        sys.setprofile(None)
    return injector.has_acted


def loses_nothing(
    write_value: Callable[[Any], object], read_value: Callable[[bool], Any], kind: str, outer: str, nested: str
) -> int:
    """Write or read, as ``outer`` says, again and again, and do what ``nested`` says at each place in the middle of it.

    ``read_value(nonblocking)`` gives None if nothing is there. Returns how many places there are.
    """
    make, number_of = KINDS[kind]
    numbers = itertools.count()
    written: list[int] = []
    got: list[int] = []

    def write() -> None:
        number = next(numbers)
        write_value(make(number))
        written.append(number)

    def read(nonblocking: bool = True) -> None:
        found = read_value(nonblocking)
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
    return at
