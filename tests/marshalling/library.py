"""An importable module with a life of its own, for tests of objects that travel by name."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

counter = 0
settings = {"level": 1}


def count() -> int:
    global counter
    counter += 1
    return counter


def plain(x: Any) -> Any:
    return x


@functools.lru_cache(maxsize=7)
def cached(x: int) -> int:
    return x + 1


class Cached:
    @staticmethod
    @functools.lru_cache
    def static(x: int) -> int:
        return x + 2

    @classmethod
    def make(cls) -> Cached:
        return cls()


#: A lambda that uses globals of this module: data here, but none of its own.
read_counter = [lambda: counter][0]
count_through_lambda = [lambda: count()][0]
change_level = [lambda level: settings.__setitem__("level", level)][0]


def level() -> int:
    return settings["level"]


def make_nested(captured: Any = None, *, capture: bool = False) -> Any:
    def nested() -> Any:
        return captured if capture else settings["level"]

    def nested_without_capture() -> Any:
        return settings["level"]

    return nested if capture else nested_without_capture


class Marked(torch.Tensor):
    """A tensor subclass."""


class MarkedParameter(torch.nn.Parameter):
    """A Parameter subclass."""


class SlottedTensor(torch.Tensor):
    __slots__ = ("__secret", "note")

    def secret(self, *value: Any) -> Any:
        if value:
            (self.__secret,) = value
        return self.__secret


class SlottedParameter(torch.nn.Parameter):
    __slots__ = ("note",)


class StatefulTensor(torch.Tensor):
    """Has a ``__getstate__``."""

    def __getstate__(self) -> Any:
        return {"told": self.note}

    def __setstate__(self, state: Any) -> None:
        self.note = f"told {state['told']}"


class SlottedArray(np.ndarray):
    __slots__ = ("note",)


class AttributedArray(np.ndarray):
    """Has attributes."""


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 3)
        self.tied = torch.nn.Linear(3, 3)
        self.tied.weight = self.layer.weight
        self.norm = torch.nn.BatchNorm1d(3)
        self.hook: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tied(self.norm(self.layer(x)))


class Slotted:
    __slots__ = ("__secret", "first", "second")

    def __init__(self, first: Any = None, second: Any = None, secret: Any = None) -> None:
        self.first = first
        self.second = second
        self.__secret = secret


class Holder:
    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)

    def method(self) -> None: ...


class WithoutText:
    """Its ``repr`` and its ``str`` raise."""

    def __init__(self, content: Any = None) -> None:
        self.content = content

    def __repr__(self) -> str:
        raise ValueError("no repr")


class BrokenMapping(Mapping[str, Any]):
    """Raises when it is inspected or sent."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __getitem__(self, key: str) -> Any:
        raise ValueError("no items")

    def __iter__(self) -> Iterator[str]:
        raise ValueError("no keys")

    def __len__(self) -> int:
        return 1


class BrokenSize:
    def __sizeof__(self) -> int:
        raise ValueError("no size")


class Unpicklable(Exception):
    """Has an attribute that cannot be pickled."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class Unrebuildable(Exception):
    """Pickles, but its constructor wants more than ``args``."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code}: {text}")


class EndsTheProcess(Exception):
    """Calls ``sys.exit`` when it is made from its ``args`` again."""

    def __init__(self, text: str, again: bool = False) -> None:
        if again:
            sys.exit(3)
        super().__init__(text, True)


class EndsTheProcessInReduce(Exception):
    def __reduce__(self) -> Any:
        sys.exit(0)


class Exits:
    """An attribute that ends the process when it is read."""

    def __reduce__(self) -> Any:
        return sys.exit, (0,)


class OwnOSError(OSError):
    def __init__(self, host: str) -> None:
        super().__init__(2, "no such host", host)
        self.host = host


class SlottedError(Exception):
    __slots__ = ("code",)


class BecomesText(Exception):
    def __reduce__(self) -> Any:
        return str, ("no longer an exception",)


class RaisesOnRebuild(Exception):
    def __reduce__(self) -> Any:
        return _fail, ()


def _fail() -> None:
    raise OSError("cannot be rebuilt here")


class BrokenText(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


class BrokenTextUnpicklable(BrokenText):
    def __init__(self) -> None:
        super().__init__("hidden")
        self.lock = threading.Lock()


class Carrier(Exception):
    """Carries data beside its text."""

    def __init__(self, text: str, data: Any) -> None:
        super().__init__(text, data)
        self.data = data


def with_settings(settings: Any) -> Any:
    """A decorator that closes over settings, and has no ``__wrapped__``."""

    def decorate(function: Any) -> Any:
        def wrapper(*args: Any) -> Any:
            return function(*args) if settings else None

        return wrapper

    return decorate


def with_method(data: Any) -> Any:
    """A decorator of classes, which get a method that closes over data."""

    def decorate(cls: Any) -> Any:
        def closed_over(self: Any) -> Any:
            return data

        cls.closed_over = closed_over
        return cls

    return decorate
