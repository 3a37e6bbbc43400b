"""Finds the place in an object of a part that cannot be sent.

It runs only after encoding has failed, so it may be slow: it tries the parts of the object one by one, goes down into
the first that fails by itself, and stops where no part does.
"""

from __future__ import annotations

import collections
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from . import reducers

#: More than real objects need; some objects have no end.
_MAX_DEPTH: Final = 50
_MAX_PARTS: Final = 10_000


def place_of_failure(
    obj: Any, name: str, error: Exception, failure: Callable[[Any], Exception | None]
) -> tuple[str, Exception]:
    """The place in ``obj`` of the part that causes ``error``, and the error of that part.

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
    """The parts of ``obj`` with their names, as far as its class allows."""
    for source in (_items, _dictionary, _slots):
        try:
            for count, part in enumerate(source(obj)):
                if count == _MAX_PARTS:
                    break
                yield part
        except Exception:  # user code may raise anything; the search goes on elsewhere
            continue


def _short_repr(obj: Any) -> str:
    try:
        text = repr(obj)
    except Exception:  # as above
        text = f"<{type(obj).__name__}>"
    return text[:60]


def _items(obj: Any) -> Iterator[tuple[str, Any]]:
    if _is_opaque(obj):
        return
    if isinstance(obj, Mapping):
        for key, value in obj.items():
            yield f"[{_short_repr(key)}]", value
            yield f".keys()[{_short_repr(key)}]", key
    elif isinstance(obj, (list, tuple, collections.deque)):
        fields = getattr(obj, "_fields", None)
        for index, value in enumerate(obj):
            yield (f".{fields[index]}" if fields else f"[{index}]"), value
    elif isinstance(obj, (set, frozenset)):
        for value in obj:
            yield f"{{{_short_repr(value)}}}", value
    elif isinstance(obj, functools.partial):
        yield ".func", obj.func
        for index, value in enumerate(obj.args):
            yield f".args[{index}]", value
        for key, value in obj.keywords.items():
            yield f".keywords[{key!r}]", value
    elif isinstance(obj, types.MethodType):
        yield ".__self__", obj.__self__


def _is_opaque(obj: Any) -> bool:
    """Whether ``obj`` has no parts to name: a scalar, code, or an object that a reducer of torchwq takes apart."""
    if isinstance(obj, (str, bytes, bytearray, type, types.FunctionType, types.ModuleType)):
        return True
    return not isinstance(obj, types.MethodType) and reducers.lookup(type(obj)) is not None


def _dictionary(obj: Any) -> Iterator[tuple[str, Any]]:
    attributes = getattr(obj, "__dict__", None)
    if _is_opaque(obj) or not isinstance(attributes, dict):
        return
    for key, value in list(attributes.items()):
        # Users write model.layer, not model._modules['layer'].
        if key in ("_modules", "_parameters", "_buffers") and isinstance(value, dict):
            for inner, part in value.items():
                yield f".{inner}", part
        else:
            yield f".{key}", value


def _slots(obj: Any) -> Iterator[tuple[str, Any]]:
    if _is_opaque(obj):
        return
    for cls in type(obj).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            private = slot.startswith("__") and not slot.endswith("__")
            name = f"_{cls.__name__.lstrip('_')}{slot}" if private else slot
            try:
                yield f".{name}", getattr(obj, name)
            except Exception:  # not set, or user code has raised
                continue
