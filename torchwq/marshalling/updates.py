"""What a definition takes over when its home has changed it since it came: attributes, defaults, methods, cells.

A living worker must compute with what its owner has now. So a definition that is received again is compared, part by
part, with what the last message brought. Invariants:

* Nothing is taken over at home, nor what is older than what is there: each state has the *stamp* of the moment when its
  home sent it. Whoever passes it on keeps that stamp; what it has sealed has none, and changes nothing.
* A part that is the same at home as before stays as it is here. So a cache that the worker fills stays filled.
* A part that the worker itself has changed since, or has put other contents into, stays as well: as with globals.
* Of what was brought only *fingerprints* are kept. They do not keep alive what the definition consists of.
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

#: In the place of a part that is not there.
MISSING: Final = types.SimpleNamespace()


def remember(obj: Any, stamp: int, parts: Mapping[Any, Any]) -> None:
    """The state of ``obj`` has been set for the first time, of these parts."""
    definition = definitions.of(obj)
    if definition is not None and not definition.is_home:
        definition.stamp = stamp
        definition.fingerprints = _fingerprints(parts)


def is_newer(obj: Any, stamp: int) -> bool:
    """Whether ``obj`` came here from its home, and was sent before the state that has this stamp."""
    definition = definitions.of(obj)
    return definition is not None and not definition.is_home and stamp > definition.stamp


def changes(obj: Any, stamp: int, parts: Mapping[Any, Any], current: Callable[[Any], Any]) -> list[tuple[Any, Any]]:
    """What ``obj`` is to take over of a state that has come again: keys and values, or ``MISSING`` for what is gone.

    Args:
        current: gives what is there under a key, or ``MISSING``.
    """
    definition = definitions.of(obj)
    if definition is None or not is_newer(obj, stamp):
        return []
    definition.stamp = stamp
    fingerprints = definition.fingerprints
    found: list[tuple[Any, Any]] = []
    fingerprints_now = _fingerprints(parts)
    if fingerprints_now == fingerprints:
        return []
    for key, fingerprint in fingerprints_now.items():
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
    """Equals what stands for the very same object."""

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
    """What equals the fingerprint of the same when it comes again, as far as can be told."""
    if value is MISSING:
        return _MISSING_FINGERPRINT
    try:
        return _fingerprint_of(value, [])
    except Exception:
        return _Identity(value)


#: Those of which one never equals another's: they are their own fingerprint.
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


def _fingerprint_of(value: Any, around: list[Any]) -> Any:
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
    for depth, each in enumerate(around):
        if each is value:
            return "around", depth
    around.append(value)
    try:
        contents = _contents(value, cls, around)
        return _Identity(value) if contents is None else (_Identity(cls), *contents)
    finally:
        around.pop()


def _contents(value: Any, cls: Any, around: list[Any]) -> list[Any] | None:
    """What makes up the value; None if nobody but the value knows."""
    if cls is types.FunctionType:
        if _is_of_module(value):
            return None
        cells = [_cell(cell) for cell in value.__closure__ or ()]
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
        return [frozenset(_fingerprint_of(each, around) for each in value)]
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
    return [_fingerprint_of(each, around) for each in found]


def _is_of_module(function: types.FunctionType) -> bool:
    module = sys.modules.get(function.__module__)
    return module is not None and namespaces.look_up(vars(module), function.__qualname__) is function


def _cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return MISSING


_HEAP_TYPE: Final = 1 << 9


def _attributes(value: Any) -> list[Any]:
    """The attributes and slots of an object, their names among them. Runs nothing that its class may have for them."""
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
