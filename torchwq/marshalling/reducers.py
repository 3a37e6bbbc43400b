"""Which type travels how: a table from types to reducers, asked by both encoders for each object they meet.

A reducer gets the encoder and the object, and returns what ``__reduce__`` would, or NotImplemented for pickle's own
way. It may attach descriptors to the message with ``encoder.attach``; the rebuilding function finds them by their index
with :func:`inbound_fd`.
"""

from __future__ import annotations

import io
import threading
import types
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np


class Encoder(Protocol):
    def attach(self, fd: int, owner: Any) -> int:
        """Let ``fd`` travel with the message; ``owner`` lives until it is sent. Returns its index."""
        ...


Reducer = Callable[[Encoder, Any], Any]

_exact: dict[type, Reducer] = {}
_families: list[tuple[type, Reducer]] = []


def register(cls: type, reducer: Reducer) -> None:
    """Let instances of exactly ``cls`` be reduced by ``reducer``."""
    _exact[cls] = reducer


def register_family(base: type, reducer: Reducer) -> None:
    """Let instances of subclasses of ``base`` that have no reducer of their own be reduced by ``reducer``."""
    _families.append((base, reducer))


def lookup(cls: type) -> Reducer | None:
    reducer = _exact.get(cls)
    if reducer is None:
        for base, of_family in _families:
            if base in cls.__mro__:
                return of_family
    return reducer


_inbound = threading.local()


class Unpacking:
    """The descriptors of the message that this thread is unpickling; closes those nobody has taken."""

    def __init__(self, fds: list[int]) -> None:
        self.fds = fds

    def __enter__(self) -> Unpacking:
        self._outer = getattr(_inbound, "fds", None)
        _inbound.fds = self.fds
        return self

    def __exit__(self, *exc: object) -> None:
        _inbound.fds = self._outer


def inbound_fd(index: int) -> int:
    """A descriptor of the message being unpickled; it stays the message's, which closes it."""
    return int(_inbound.fds[index])


def take_inbound_fd(index: int) -> int:
    """The same, but now it is the caller's."""
    fd, _inbound.fds[index] = _inbound.fds[index], -1
    return int(fd)


def _reduce_array(encoder: Encoder, array: np.ndarray[Any, Any]) -> Any:
    """A read-only array arrives as a writable copy, as every other array does."""
    if array.flags.writeable or array.dtype.hasobject:
        return NotImplemented
    return array.copy(order="K").__reduce_ex__(5)


def _refuse_file(encoder: Encoder, file: Any) -> Any:
    raise TypeError(f"an open file ({getattr(file, 'name', file)!r}) cannot be sent: send its path")


def _refuse_generator(encoder: Encoder, generator: Any) -> Any:
    raise TypeError("a generator cannot be sent: send the generator function and its arguments")


register(np.ndarray, _reduce_array)
register(types.GeneratorType, _refuse_generator)
for _file in (io.TextIOWrapper, io.BufferedReader, io.BufferedWriter, io.BufferedRandom, io.FileIO):
    register(_file, _refuse_file)
