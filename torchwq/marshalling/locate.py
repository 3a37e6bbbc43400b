"""Finds the place, inside an object, of what cannot be sent.

Runs only after encoding has failed, so it may be slow: it tries the parts of the object one by one and goes down
into the first that fails by itself, until none of the parts does.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from . import reducers

#: Deep enough for real objects; an end for endless ones.
_MAX_DEPTH: Final = 50
_MAX_PARTS: Final = 10_000


def place_of_failure(
    obj: Any, name: str, error: Exception, failure: Callable[[Any], Exception | None]
) -> tuple[str, Exception]:
    """Where in ``obj``, which cannot be encoded because of ``error``, the cause sits, and its error.

    ``failure`` tries to encode an object and returns the error.
    """
    seen: set[int] = set()
    for _ in range(_MAX_DEPTH):
        seen.add(id(obj))
        for step, part in _parts(obj):
            if id(part) in seen:
                continue
            part_error = failure(part)
            if part_error is not None:
                name, obj, error = name + step, part, part_error
                break
        else:
            break
    return name, error


def _parts(obj: Any) -> Iterator[tuple[str, Any]]:
    for count, part in enumerate(_all_parts(obj)):
        if count == _MAX_PARTS:
            return
        yield part


def _all_parts(obj: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(obj, (str, bytes, bytearray, type, types.FunctionType, types.ModuleType)):
        return
    if reducers.lookup(type(obj)) is not None:
        return  # what it is made of is this library's business
    if isinstance(obj, Mapping):
        for key, value in obj.items():
            yield f"[{key!r:.60}]", value
            yield f".keys()[{key!r:.60}]", key
    elif isinstance(obj, (list, tuple)):
        fields = getattr(obj, "_fields", None)
        for index, value in enumerate(obj):
            yield (f".{fields[index]}" if fields else f"[{index}]"), value
    elif isinstance(obj, (set, frozenset)):
        for value in obj:
            yield f"{{{value!r:.60}}}", value
    elif isinstance(obj, functools.partial):
        yield ".func", obj.func
        for index, value in enumerate(obj.args):
            yield f".args[{index}]", value
        for key, value in obj.keywords.items():
            yield f".keywords[{key!r}]", value
    elif isinstance(obj, types.MethodType):
        yield ".__self__", obj.__self__
    yield from _attributes(obj)


def _attributes(obj: Any) -> Iterator[tuple[str, Any]]:
    attributes = getattr(obj, "__dict__", None)
    if isinstance(attributes, dict):
        for key, value in list(attributes.items()):
            # A module's own containers are shown as they are written: model.layer, not model._modules['layer'].
            if key in ("_modules", "_parameters", "_buffers") and isinstance(value, dict):
                for inner, part in value.items():
                    yield f".{inner}", part
            else:
                yield f".{key}", value
    for cls in type(obj).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            if hasattr(obj, slot):
                yield f".{slot}", getattr(obj, slot)
