"""Updates of definitions: a process takes over what their home has changed since it received them.

A living worker must compute with the owner's current attributes, defaults, methods and cells. So when a definition
comes again, this module compares its parts with those that the last message brought. It rests on Note [definitions].

Note [updates of definitions]

* A home takes over nothing. Elsewhere nothing older replaces anything newer: each state has a *stamp*, the moment at
  which its home has sent it. A process that passes it on keeps the stamp. A sealed state has none, and changes nothing.
* A part that has not changed at home stays. So a cache that the worker fills stays filled.
* A part that the worker itself has changed stays, too, as globals do.
* Of the last message only *fingerprints* remain. They do not keep alive the parts of a definition.
"""

from __future__ import annotations

import collections
import enum
import functools
import sys
import types
import typing
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Final

import cloudpickle
import numpy as np

from . import definitions, namespaces, reducers

#: The value of a part that does not exist.
MISSING: Final = types.SimpleNamespace()


def remember(obj: Any, stamp: int, parts: Mapping[Any, Any]) -> None:
    """Remember the parts of the first state of ``obj``."""
    definition = definitions.of(obj)
    if definition is not None and not definition.is_home:
        definition.stamp = stamp
        definition.fingerprints = _fingerprints(parts)


def is_newer(obj: Any, stamp: int) -> bool:
    """Whether ``obj`` has come from its home, before the state with this stamp left there."""
    definition = definitions.of(obj)
    return definition is not None and not definition.is_home and stamp > definition.stamp


def changes(obj: Any, stamp: int, parts: Mapping[Any, Any], current: Callable[[Any], Any]) -> list[tuple[Any, Any]]:
    """The parts that ``obj`` takes over from a state: keys and values, ``MISSING`` for a part that is gone.

    Args:
        current: returns the part that ``obj`` has under a key, or ``MISSING``.
    """
    definition = definitions.of(obj)
    if definition is None or not is_newer(obj, stamp):
        return []
    definition.stamp = stamp
    fingerprints = definition.fingerprints
    found: list[tuple[Any, Any]] = []
    arrived = _fingerprints(parts)
    if arrived == fingerprints:
        return []
    for key, fingerprint in arrived.items():
        before = fingerprints.get(key, _MISSING_FINGERPRINT)
        if fingerprint != before and _fingerprint(current(key)) == before:
            fingerprints[key] = fingerprint
            found.append((key, parts[key]))
    for key in [key for key in fingerprints if key not in parts]:
        if _fingerprint(current(key)) == fingerprints.pop(key):
            found.append((key, MISSING))
    if found:
        definitions.forget_sealed()
    return found


def _fingerprints(parts: Mapping[Any, Any]) -> dict[Any, Any]:
    return {key: value if type(value) in _OWN_FINGERPRINT else _fingerprint(value) for key, value in parts.items()}


class _Identity:
    """The fingerprint of an object by its identity: equals only that of the same object."""

    __slots__ = ("_id", "_reference")

    def __init__(self, obj: object) -> None:
        self._id = id(obj)
        try:
            self._reference: Any = weakref.ref(obj)
        except TypeError:
            self._reference = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Identity) or self._id != other._id:
            return False
        return self._reference is None or (self._reference() is not None and other._reference() is not None)

    def __hash__(self) -> int:
        return self._id


def _fingerprint(value: Any) -> Any:
    """A value that equals the fingerprint of an equal value, as far as this can be decided."""
    if value is MISSING:
        return _MISSING_FINGERPRINT
    try:
        return _fingerprint_of(value, [])
    except Exception:
        return _Identity(value)


#: Types whose values are their own fingerprints: no value equals one of another type.
_OWN_FINGERPRINT: Final = frozenset({str, bytes, type(None), types.CodeType})
_NUMBERS: Final = frozenset({int, bool, complex})
_COLLECTIONS: Final = frozenset({dict, list, tuple})
_BY_IDENTITY: Final = (types.ModuleType, types.BuiltinFunctionType, enum.Enum)
_PARTS_OF: Final[dict[type, tuple[str, ...]]] = {
    staticmethod: ("__func__",),
    classmethod: ("__func__",),
    property: ("fget", "fset", "fdel", "__doc__"),
    functools.cached_property: ("func", "attrname"),
    functools.partial: ("func", "args", "keywords"),
    types.MethodType: ("__func__", "__self__"),
}


def _fingerprint_of(value: Any, enclosing: list[Any]) -> Any:
    cls = type(value)
    if cls in _OWN_FINGERPRINT:
        return value
    if cls in _NUMBERS:
        return cls, value
    if cls in _COLLECTIONS and not value:
        return (cls,)
    if cls is float:
        return cls, value.hex()
    if cls is types.FunctionType and definitions.of(value) is not None:
        return weakref.ref(value)
    if issubclass(cls, type) or isinstance(value, _BY_IDENTITY) or definitions.of(value) is not None:
        return _Identity(value)
    for depth, each in enumerate(enclosing):
        if each is value:
            return "enclosing", depth
    enclosing.append(value)
    try:
        contents = _contents(value, cls, enclosing)
        return _Identity(value) if contents is None else (_Identity(cls), *contents)
    finally:
        enclosing.pop()


def _contents(value: Any, cls: Any, enclosing: list[Any]) -> list[Any] | None:
    """The fingerprints of the value's contents; None if this module does not know its type."""
    if cls is types.FunctionType:
        if _is_of_module(value):
            return None
        cells = [content_of(cell) for cell in value.__closure__ or ()]
        found = [value.__code__, value.__defaults__, value.__kwdefaults__, vars(value), cells]
    elif cls in _PARTS_OF:
        found = [getattr(value, name) for name in _PARTS_OF[cls]]
    elif cls is np.ndarray:
        return None if value.dtype.hasobject else [value.dtype, value.shape, hash(value.tobytes())]
    elif (origin := typing.get_origin(value)) is not None:
        found = [origin, typing.get_args(value)]
    elif isinstance(value, (dict, types.MappingProxyType)):
        found = [*value.keys(), *value.values(), *_attributes(value)]
        if isinstance(value, collections.defaultdict):
            found.append(value.default_factory)
    elif isinstance(value, (list, tuple, collections.deque)):
        found = [*value, *_attributes(value)]
    elif isinstance(value, (set, frozenset)):
        return [frozenset(_fingerprint_of(each, enclosing) for each in value)]
    elif (
        cls.__reduce_ex__ is object.__reduce_ex__
        and cls.__reduce__ is object.__reduce__
        and cls not in cloudpickle.Pickler.dispatch_table
        and reducers.lookup(cls) is None
    ):
        found = _attributes(value)
    elif cls.__hash__ not in (None, object.__hash__) and reducers.lookup(cls) is None and definitions.of(cls) is None:
        return [value]
    else:
        return None
    return [_fingerprint_of(each, enclosing) for each in found]


def _is_of_module(function: types.FunctionType) -> bool:
    module = sys.modules.get(function.__module__)
    return module is not None and namespaces.look_up(vars(module), function.__qualname__) is function


def content_of(cell: types.CellType) -> Any:
    """What a closure cell contains; ``MISSING`` if it is empty."""
    try:
        return cell.cell_contents
    except ValueError:
        return MISSING


_HEAP_TYPE: Final = 1 << 9


def _attributes(value: Any) -> list[Any]:
    """The attributes of an object, and the names and values of its slots. Runs no code of its class."""
    found: list[Any] = []
    if not type(value).__flags__ & _HEAP_TYPE:
        return found
    for cls in type(value).__mro__:
        if not cls.__flags__ & _HEAP_TYPE:
            continue
        for name, slot in list(vars(cls).items()):
            if isinstance(slot, types.MemberDescriptorType) and slot.__objclass__ is cls:
                try:
                    found += name, slot.__get__(value)
                except AttributeError:
                    continue
    try:
        found.append(object.__getattribute__(value, "__dict__"))
    except AttributeError:
        pass
    return found


_MISSING_FINGERPRINT: Final = _Identity(MISSING)
