"""Describes a pickle in a few words, without importing or running anything that it names.

Errors use it to say what a dead worker was working on: rebuilding a message that may have killed a worker is no option.
"""

from __future__ import annotations

import io
import itertools
import pickle
import reprlib
from typing import Any, Final

_MAX_CHARS: Final = 200
#: Functions that rebuild objects which users know under other names.
_DISPLAY_NAMES: Final = {
    "rebuild": "tensor",
    "_rebuild_leaf": "tensor",
    "_rebuild_copy": "tensor",
    "_rebuild_dense": "tensor",
    "_reconstruct": "array",
    "_frombuffer": "array",
}


class _Named(type):
    """A class whose ``repr`` is the name of the object that it replaces."""

    _name: str

    def __repr__(cls) -> str:
        return f"<{cls._name}>"


class _Placeholder(metaclass=_Named):
    """Takes the place of any object of any class."""

    _name = "object"

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def __setstate__(self, state: Any) -> None: ...
    def append(self, item: Any) -> None: ...
    def extend(self, items: Any) -> None: ...
    def __setitem__(self, key: Any, value: Any) -> None: ...
    def __call__(self, *args: Any, **kwargs: Any) -> _Placeholder:
        return self

    def __repr__(self) -> str:
        return f"<{self._name}>"


#: Functions that rebuild a script's definitions, and the index of the argument with the name.
_DEFINING: Final = {
    ("torchwq.marshalling.functions", "make_function"): 3,
    ("torchwq.marshalling.classes", "_make_class"): 2,
    ("torchwq.marshalling.classes", "_make_enum"): 2,
    ("torchwq.marshalling.named", "make_named"): 2,
    ("torchwq.marshalling.definitions", "unseal"): 1,
}


def _named(shown: str) -> Any:
    # The name of the class is always the same: reprlib would take one called "array" for an array.
    return _Named("placeholder", (_Placeholder,), {"_name": shown})


class _Describer(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        place = _DEFINING.get((module, name))
        if place is not None:
            return lambda *args: _named(str(args[place]))
        return _named(_DISPLAY_NAMES.get(name, name))

    def persistent_load(self, pid: Any) -> Any:
        return _Placeholder()


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def describe_pickle(data: bytes) -> str:
    """A short description of a message that begins with a pickle. A damaged pickle may raise anything."""
    return _short.repr(_Describer(io.BytesIO(data), buffers=itertools.repeat(b"")).load())[:_MAX_CHARS]
