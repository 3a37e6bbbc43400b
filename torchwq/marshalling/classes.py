"""Classes that travel by value, complete: private slots, metaclass, ``__init_subclass__`` and all.

cloudpickle says which parts a class has. It would put them together by running the metaclass and ``__init_subclass__``
on an empty class. Those of the script have run at home, and the class travels as they have left it, so this module does
not run them again. It runs those of libraries, which may keep what pickle cannot see, as ``abc`` does.
"""

from __future__ import annotations

import enum
import functools
import types
from collections.abc import Collection, Iterable
from typing import Any

from cloudpickle import cloudpickle

from . import definitions, functions, msgspec_structs, namespaces, updates


class _NoHooks:
    """Comes before a class's bases in the order of resolution, and hides their ``__init_subclass__``."""

    __slots__ = ()

    def __init_subclass__(cls, **kwargs: object) -> None: ...


def is_by_value(cls: type) -> bool:
    """Whether a class that does not go by name has a definition. A class of C code has none."""
    if cls in _BY_OTHER_NAMES or cls in cloudpickle._BUILTIN_TYPE_NAMES:
        return False
    return bool(cls.__flags__ & _HEAP_TYPE)


_HEAP_TYPE = 1 << 9
_BY_OTHER_NAMES = frozenset({type(None), type(Ellipsis), type(NotImplemented)})


def reduce(cls: type, sealing: bool) -> Any:
    """The definition of a class, as ``reducer_override`` returns it."""
    _, args, (attributes, _), *_ = cloudpickle._dynamic_class_reduce(cls)
    for name in [name for name, value in attributes.items() if isinstance(value, _DESCRIPTORS)]:
        if attributes[name].__objclass__ is cls:
            del attributes[name]
    globals_ = globals_of(cls)
    space = None if globals_ is None else namespaces.of(globals_)
    token = definitions.token_of(cls)
    made: tuple[Any, ...]
    extra: Any = None
    if msgspec_structs.is_struct(cls):
        made = msgspec_structs.reduce(cls, token, attributes)
    elif issubclass(cls, enum.Enum):
        members = dict(cls.__members__)
        for name in members:
            attributes.pop(name, None)
        values = {name: member.value for name, member in members.items()}
        made = _make_enum, (token, args[0], args[1], args[2], values, args[4])
        extra = {name: dict(vars(member)) for name, member in members.items()}
        for each in extra.values():
            each.pop("__objclass__", None)
    else:
        names: dict[str, Any] = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
        if (slots := _own_slots(cls)) is not None:
            names["__slots__"] = slots
        if isinstance(vars(cls).get("__dict__"), property):
            names["__dict__"] = vars(cls)["__dict__"]
        made = _make_class, (token, type(cls), cls.__name__, args[2], cls.__bases__, names)
    stamp = 0 if sealing else definitions.stamp_of(cls)
    return *made, (attributes, extra, space, cls.__qualname__, stamp), None, None, _set_state


_DESCRIPTORS = (types.MemberDescriptorType, types.GetSetDescriptorType)


def _own_slots(cls: type) -> tuple[str, ...] | None:
    """The slots that the class itself has, under their mangled names; None if it has no ``__slots__``."""
    names = vars(cls)
    if "__slots__" not in names:
        return None
    found = [n for n, v in names.items() if isinstance(v, types.MemberDescriptorType) and v.__objclass__ is cls]
    return (*found, *(name for name in ("__dict__", "__weakref__") if name in names))


def globals_of(cls: type) -> dict[str, Any] | None:
    """The globals, of a module that is not importable, that have the class under its name; None if there are none."""
    definition = definitions.of(cls)
    if definition is not None and definition.globals is not None:
        return definition.globals
    candidates: list[dict[str, Any] | None] = [getattr(functions.module_of(cls), "__dict__", None)]
    for value in vars(cls).values():
        function = functions.underlying_function(value)
        if function is not None and functions.globals_module(function) is None:
            candidates.append(function.__globals__)
    for globals_ in candidates:
        if globals_ is not None and namespaces.look_up(globals_, cls.__qualname__) is cls:
            return globals_
    return None


def _make_class(
    token: str, meta: type, name: str, bases: tuple[Any, ...], resolved: tuple[type, ...], names: dict[str, Any]
) -> Any:
    known = definitions.find(token)
    if known is not None:
        return known
    if bases != resolved:
        names["__orig_bases__"] = bases
    cls = None
    if functions.goes_by_name(meta) and not _has_script_hooks(resolved):
        try:
            cls = types.new_class(name, resolved, {"metaclass": meta}, lambda namespace: namespace.update(names))
        except Exception:  # the metaclass expects attributes that the class does not have yet
            pass
    if cls is None:
        cls = _make_without_hooks(meta, name, resolved, names)
    return definitions.add_received(token, cloudpickle._lookup_class_or_track(token, cls))


def _has_script_hooks(bases: tuple[type, ...]) -> bool:
    """Whether one of the bases has an ``__init_subclass__`` of the script."""
    hooks = [functions.underlying_function(getattr(base.__init_subclass__, "__func__", None)) for base in bases]
    return any(hook is not None and functions.globals_module(hook) is None for hook in hooks)


def _make_without_hooks(meta: type, name: str, bases: tuple[type, ...], names: dict[str, Any]) -> type:
    """Make a class, and run no hook but the metaclass of a library."""

    def mro(cls: Any) -> list[type]:
        found: list[type] = of_meta.mro(cls)
        return [found[0], _NoHooks, *found[1:]]

    of_meta: Any = meta
    of_library: Any = next(each for each in meta.__mro__ if functions.goes_by_name(each))
    if all(isinstance(base.__init_subclass__, types.BuiltinMethodType) for base in bases):
        return of_library.__new__(meta, name, bases, names)  # type: ignore[no-any-return]
    cls: Any = of_library.__new__(type(meta)("_NoHooks", (meta,), {"mro": mro}), name, bases, names)
    cls.__class__ = meta
    cls.__bases__ = bases  # computes the order of resolution again
    return cls  # type: ignore[no-any-return]


def _make_enum(
    token: str, bases: tuple[type, ...], name: str, qualname: str, members: dict[str, Any], module: str
) -> Any:
    known = definitions.find(token)
    if known is not None:
        return known
    meta: Any = type(bases[-1])
    names = meta.__prepare__(name, bases)
    for member, value in members.items():
        names[member] = value
    cls = meta.__new__(meta, name, bases, names)
    cls.__module__, cls.__qualname__ = module, qualname
    return definitions.add_received(token, cloudpickle._lookup_class_or_track(token, cls))


def _set_state(cls: Any, state: tuple[dict[str, Any], Any, dict[str, Any] | None, str, int]) -> Any:
    attributes, members, globals_, qualname, stamp = state
    registered = attributes.pop("_abc_impl", ())
    parts: dict[Any, Any] = dict(attributes)
    for member, values in (members or {}).items():
        parts.update(((member, name), value) for name, value in values.items())
    if not definitions.is_complete(cls):
        _set_parts(cls, parts.items(), registered)
        updates.remember(cls, stamp, parts)
    elif updates.is_newer(cls, stamp):
        registered = [each for each in registered if not issubclass(each, cls)]
        _set_parts(cls, updates.changes(cls, stamp, parts, functools.partial(_part, cls)), registered)
    definitions.mark_complete(cls, globals_, qualname)
    return cls


def _part(cls: Any, key: Any) -> Any:
    """The attribute of a class (the key is a name), or of an enumeration's member (a pair of names)."""
    member, name = (None, key) if isinstance(key, str) else key
    owner = cls if member is None else cls.__members__.get(member)
    return updates.MISSING if owner is None else vars(owner).get(name, updates.MISSING)


def _set_parts(cls: Any, parts: Collection[tuple[Any, Any]], registered: Iterable[type]) -> None:
    line = vars(cls).get("__firstlineno__")
    for key, value in parts:
        member, name = (None, key) if isinstance(key, str) else key
        if member is not None:
            if value is updates.MISSING:
                del vars(cls.__members__[member])[name]
            else:
                vars(cls.__members__[member])[name] = value
        elif value is updates.MISSING:
            type.__delattr__(cls, name)
        else:
            type.__setattr__(cls, name, value)
            line = value if name == "__firstlineno__" else line
    if line is not None and parts:  # from Python 3.13 on, setting another attribute of a class deletes it
        type.__setattr__(cls, "__firstlineno__", line)
    for subclass in registered:
        cls.register(subclass)
