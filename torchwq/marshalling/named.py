"""Objects that pickle would send by name although they are neither functions nor classes.

These are type variables and new types, functions with a cache, functions that dispatch by type, and sentinels
(``object()``, or an object whose ``__reduce__`` returns its name). If another process can import their module, their
name travels. If not, each is defined once in a process, as functions and classes are, so that ``is`` has the same
result everywhere.
"""

from __future__ import annotations

import enum
import functools
import types
import typing
from collections.abc import Callable
from typing import Any, Final

from cloudpickle import cloudpickle

from . import definitions, functions, importable, namespaces, reducers, subclass_state, updates

_LruCache: Final = type(functools.lru_cache(len))
_Globals = dict[str, Any]


def _globals_with(obj: Any, name: str, module: Any = None) -> _Globals | None:
    """The globals, of a module that is not importable, that have ``obj`` under ``name``; None if there are none."""
    definition = definitions.of(obj)
    if definition is not None and definition.globals is not None:
        return definition.globals
    globals_: _Globals | None = getattr(module or functions.module_of(obj), "__dict__", None)
    return globals_ if globals_ is not None and namespaces.look_up(globals_, name) is obj else None


def make_named(
    token: str, globals_: _Globals | None, name: str, build: Callable[..., Any], args: tuple[Any, ...], stamp: int
) -> Any:
    """The object with this token, which this builds if the process does not have it."""
    attributes = args[1] if build is _rebuild_sentinel else {}
    known = definitions.find(token)
    if known is not None:
        for key, value in updates.changes(known, stamp, attributes, lambda key: getattr(known, key, updates.MISSING)):
            object.__delattr__(known, key) if value is updates.MISSING else object.__setattr__(known, key, value)
        return known
    made = definitions.add_received(token, build(*args))
    updates.remember(made, stamp, attributes)
    definitions.mark_complete(made, globals_, name)
    return made


def _reduced(obj: Any, globals_: _Globals | None, name: str, build: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    space = None if globals_ is None else namespaces.of(globals_)
    token = definitions.token_of(obj)
    return make_named, (token, space, name, build, args, definitions.stamp_of(obj))


# --- objects of typing -----------------------------------------------------------------------------


def _reduce_new_type(encoder: reducers.Encoder, new: Any) -> Any:
    if functions.goes_by_name(new):
        return NotImplemented
    name = new.__name__
    args = new.__module__, typing.NewType, (name, new.__supertype__)
    return _reduced(new, _globals_with(new, name), name, _make_typing_object, args)


def _reduce_type_variable(encoder: reducers.Encoder, variable: Any) -> Any:
    if functions.goes_by_name(variable):
        return NotImplemented
    name = variable.__name__
    args: tuple[Any, ...]
    if isinstance(variable, typing.TypeVar):
        args = (_make_type_variable, cloudpickle._decompose_typevar(variable)[:-1])
    elif isinstance(variable, typing.ParamSpec):
        args = (_make_param_spec, (name, variable.__bound__, variable.__covariant__, variable.__contravariant__))
    else:
        args = (type(variable), (name,))
    return _reduced(variable, _globals_with(variable, name), name, _make_typing_object, (variable.__module__, *args))


def _make_typing_object(module: str, build: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    made = build(*args)
    made.__module__ = module  # ``build`` has set the caller's
    return made


def _make_type_variable(*args: Any) -> Any:
    return cloudpickle._make_typevar(*args, None)


def _make_param_spec(name: str, bound: Any, covariant: bool, contravariant: bool) -> Any:
    return typing.ParamSpec(name, bound=bound, covariant=covariant, contravariant=contravariant)


reducers.register(typing.NewType, _reduce_new_type)
for _name in ("TypeVar", "ParamSpec", "TypeVarTuple"):
    if hasattr(typing, _name):
        reducers.register(getattr(typing, _name), _reduce_type_variable)


# --- wrapped functions -----------------------------------------------------------------------------


def _rebuild_lru_cache(function: Any, maxsize: int | None, typed: bool) -> Any:
    return functools.lru_cache(maxsize, typed)(function)


def _reduce_lru_cache(encoder: reducers.Encoder, cached: Any) -> Any:
    """Send a cached function as the function inside, with an empty cache."""
    if functions.goes_by_name(cached):
        return NotImplemented
    parameters = cached.cache_parameters()
    args = cached.__wrapped__, parameters["maxsize"], parameters["typed"]
    globals_ = getattr(cached.__wrapped__, "__globals__", {})
    name = functions.name_of(cached) or ""
    if namespaces.look_up(globals_, name) is not cached:
        return _rebuild_lru_cache, args
    return _reduced(cached, globals_, name, _rebuild_lru_cache, args)


reducers.register(_LruCache, _reduce_lru_cache)


def is_dispatcher(function: types.FunctionType) -> bool:
    """Whether ``functools.singledispatch`` has made the function."""
    return function.__code__ is _DISPATCHER and "registry" in vars(function)


def reduce_dispatcher(function: Any, sealing: bool) -> Any:
    """Send a function that dispatches by type as its implementations."""
    original = function.registry[object]
    name, globals_ = function.__qualname__, getattr(original, "__globals__", {})
    top_level = namespaces.look_up(globals_, name) is function
    token = definitions.token_of(function) if top_level else None
    attributes = {key: value for key, value in vars(function).items() if key not in _OF_DISPATCHER}
    attributes.update((key, getattr(function, key)) for key in functools.WRAPPER_ASSIGNMENTS if hasattr(function, key))
    space = namespaces.of(globals_) if top_level and functions.globals_module(original) is None else None
    stamp = 0 if sealing or not top_level else definitions.stamp_of(function)
    state = list(function.registry.items()), attributes, space, stamp
    return _make_dispatcher, (token, function.__name__), state, None, None, _finish_dispatcher


def _make_dispatcher(token: str | None, name: str) -> Any:
    known = None if token is None else definitions.find(token)
    if known is not None:
        return known

    def original(*args: Any, **kwargs: Any) -> Any: ...

    original.__name__ = name
    made = functools.singledispatch(original)
    return made if token is None else definitions.add_received(token, made)


def _finish_dispatcher(
    function: Any, state: tuple[list[tuple[type, Any]], dict[str, Any], _Globals | None, int]
) -> None:
    implementations, attributes, globals_, stamp = state
    types_ = {id(cls): cls for cls, _ in implementations}  # no part may keep a type alive
    parts: dict[Any, Any] = {**{id(cls): value for cls, value in implementations}, **attributes}
    if definitions.is_complete(function):
        changed = updates.changes(function, stamp, parts, functools.partial(_part_of_dispatcher, function, types_))
    else:
        changed = list(parts.items())
    for key, value in changed:
        if not isinstance(key, str):
            if value is not updates.MISSING:  # singledispatch cannot unregister
                function.register(types_[key], value)
        elif value is updates.MISSING:
            delattr(function, key)
        else:
            setattr(function, key, value)
    if not definitions.is_complete(function):
        updates.remember(function, stamp, parts)
        definitions.mark_complete(function, globals_, function.__qualname__)


def _part_of_dispatcher(function: Any, types_: dict[int, type], key: Any) -> Any:
    if isinstance(key, str):
        return getattr(function, key, updates.MISSING)
    return function.registry.get(types_.get(key), updates.MISSING)


_any_dispatcher: Any = functools.singledispatch(len)
_DISPATCHER: Final = _any_dispatcher.__code__
_OF_DISPATCHER: Final = frozenset(vars(_any_dispatcher)) - {"__wrapped__"}


# --- sentinels -------------------------------------------------------------------------------------


def _reduce_bare_object(encoder: reducers.Encoder, obj: object) -> Any:
    """Send a bare object, which programs compare with ``is``, by its name in the script: it is the same everywhere."""
    if encoder.peer.same_process:
        return reducers.attached_object, (encoder.attach_object(obj),)
    for space in namespaces.all_namespaces():
        for name, value in list(space.globals.items()):
            if value is obj:
                return _sentinel, (space, name)
    return NotImplemented


def _sentinel(globals_: _Globals, name: str) -> Any:
    namespaces.install(globals_, [(name, globals_.get(name, object()))])
    return globals_[name]


reducers.register(object, _reduce_bare_object)

#: Importable classes whose instances pickle never sends by name.
never_by_name: set[type] = set()


def reduce_instance(obj: Any, cls: type) -> Any:
    """Reduce an object whose class has its own ``__reduce__``, which may return a name; else NotImplemented."""
    reduced = functions.own_reduction(obj)
    if reduced is NotImplemented and functions.goes_by_name(cls):
        never_by_name.add(cls)
    if not isinstance(reduced, str):
        return reduced
    module = functions.module_of(obj)
    if module is None or importable.is_importable(obj.__module__, module):
        return NotImplemented  # pickle finds the name's module
    globals_ = _globals_with(obj, reduced, module)
    if globals_ is None:
        return NotImplemented
    if isinstance(obj, enum.Enum):
        return _reduced(obj, globals_, reduced, cls, (obj.value,))
    attributes = {**getattr(obj, "__dict__", {}), **subclass_state.slots_of(obj)}
    return _reduced(obj, globals_, reduced, _rebuild_sentinel, (cls, attributes))


def _rebuild_sentinel(cls: Any, attributes: dict[str, Any]) -> Any:
    made = object.__new__(cls)
    for name, value in attributes.items():
        object.__setattr__(made, name, value)
    return made
