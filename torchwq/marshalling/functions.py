"""Functions travel as code: by name, or by value.

A function or class travels by name if its importable module has it under that name. Any other travels by value: one of
``__main__``, of a notebook or of a plugin, or one that was made inside a function. ``closure_rule`` says which of these
are refused.

A function that its module has under its name is defined once in each process, and keeps its attributes from message to
message: see Note [definitions]. A nested function or lambda is made anew from each message.
"""

from __future__ import annotations

import copyreg
import functools
import importlib
import sys
import types
from typing import Any, Final

from cloudpickle import cloudpickle

from . import definitions, importable, namespaces, reducers, updates

#: Types of methods that are bound to an object.
BOUND: Final = (types.BuiltinFunctionType, types.MethodType)


def module_of(obj: Any) -> Any:
    """The loaded module that an object's ``__module__`` names; None if there is none."""
    name = getattr(obj, "__module__", None)
    return sys.modules.get(name) if isinstance(name, str) else None


def is_importable(module: types.ModuleType) -> bool:
    """Whether another process can import the module under its ``__name__``."""
    found = sys.modules.get(module.__name__)
    return found is not None and importable.is_importable(module.__name__, found)


def name_of(obj: Any) -> str | None:
    """The object's name in its module, as far as it has one."""
    name = getattr(obj, "__qualname__", None) or getattr(obj, "__name__", None)
    return name if isinstance(name, str) else None


def goes_by_name(obj: Any) -> bool:
    """Whether the importable module of ``obj`` has it under its name."""
    module, name = module_of(obj), name_of(obj)
    if module is None or name is None or not importable.is_importable(obj.__module__, module):
        return False
    return namespaces.look_up(vars(module), name) is obj


def underlying_function(value: Any) -> types.FunctionType | None:
    """The function inside an attribute of a class, such as a method, property or partialmethod; None if it has none."""
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    elif isinstance(value, property):
        value = value.fget
    elif isinstance(value, (functools.cached_property, functools.partialmethod)):
        value = value.func
    return value if isinstance(value, types.FunctionType) else None


def find_import(obj: Any) -> tuple[str, str] | None:
    """The names of an importable module and of the attribute under which it has ``obj``; None if there are none.

    Built-in functions and bound methods such as ``torch.ones`` and ``random.random`` do not say where to import them.
    """
    names = {name for name in (getattr(obj, "__qualname__", None), getattr(obj, "__name__", None)) if name}
    own = getattr(obj, "__module__", None)
    for module_name in [own] if own in sys.modules else list(sys.modules):
        module = sys.modules.get(module_name)
        if isinstance(module, types.ModuleType):
            for name in names:
                if namespaces.look_up(vars(module), name) is obj and importable.is_importable(module_name, module):
                    return module_name, name
    return None


def import_name(module_name: str, name: str) -> Any:
    """The object that ``find_import`` has found, in the reader's process."""
    return namespaces.look_up(vars(importlib.import_module(module_name)), name)


def globals_module(function: types.FunctionType) -> str | None:
    """Name of the importable module whose globals the function uses; None for ``__main__`` and its like."""
    name = function.__globals__.get("__name__")
    if not isinstance(name, str):
        return None
    module = sys.modules.get(name)
    if getattr(module, "__dict__", None) is not function.__globals__ or importable.is_main(name, module):
        return None
    return name if importable.is_importable(name, module) else None


def code_of_file(filename: str, args: tuple[Any, ...]) -> types.CodeType:
    """Code with the name of its file, which cloudpickle drops: tracebacks and the closure rule need it."""
    return types.CodeType(*args).replace(co_filename=filename)


def module_globals(name: str) -> dict[str, Any]:
    """The globals of an importable module, which this imports."""
    __import__(name)
    return sys.modules[name].__dict__


def make_function(token: str | None, code: types.CodeType, globals_: dict[str, Any], name: str, cells: Any) -> Any:
    """The function with this token; if there is none, or no token, a new one without a state."""
    known = None if token is None else definitions.find(token)
    if known is not None:
        return known
    function = types.FunctionType(code, globals_, name, None, cells)
    return function if token is None else definitions.add_received(token, function)


def set_state(function: types.FunctionType, state: Any) -> None:
    """Set the state of a new function, or in a known one the parts that its home has changed.

    In both cases its globals get the values to which it refers.
    """
    attributes, slots = state[:2]
    namespaces.install(function.__globals__, slots["__globals__"].items())
    slots["__globals__"] = {}
    if len(state) == 2:  # a function without a token
        cloudpickle._function_setstate(function, state)
        return
    stamp = state[2]
    parts = _parts(attributes, slots)
    if definitions.is_complete(function):
        for key, value in updates.changes(function, stamp, parts, functools.partial(_part, function)):
            _set_part(function, key, value)
    else:
        del slots["__code__"]  # ``make_function`` has used it
        cloudpickle._function_setstate(function, (attributes, slots))
        updates.remember(function, stamp, parts)
        definitions.mark_complete(function, function.__globals__, function.__qualname__)


def _parts(attributes: dict[str, Any], slots: dict[str, Any]) -> dict[Any, Any]:
    """The parts of a function's state. Keys: slots a name, attributes a tuple of a name, cells a number."""
    parts: dict[Any, Any] = {name: value for name, value in slots.items() if name not in _NO_SLOTS}
    for name, value in attributes.items():
        parts[(name,)] = value
    for index, cell in enumerate(slots["__closure__"] or ()):
        if (content := updates.content_of(cell)) is not updates.MISSING:
            parts[index] = content
    return parts


_NO_SLOTS: Final = frozenset({"__globals__", "__closure__", "_cloudpickle_submodules"})


def _part(function: Any, key: Any) -> Any:
    if isinstance(key, str):
        return getattr(function, key)
    if isinstance(key, tuple):
        return vars(function).get(key[0], updates.MISSING)
    return updates.content_of(function.__closure__[key])


def _set_part(function: Any, key: Any, value: Any) -> None:
    owner, name = (function.__closure__[key], "cell_contents") if isinstance(key, int) else (function, key)
    if isinstance(key, tuple):
        name = key[0]
    if value is updates.MISSING:
        delattr(owner, name)
    else:
        setattr(owner, name, value)


def own_reduction(obj: Any) -> Any:
    """The result of the object's ``__reduce__`` if its class has one in Python; else NotImplemented.

    A string is the object's name in its module. pickle sends only that, so such an object is no data.
    """
    cls: Any = type(obj)
    reduce = cls.__reduce__ if cls.__reduce_ex__ is object.__reduce_ex__ else cls.__reduce_ex__
    if not isinstance(reduce, types.FunctionType) or cls in copyreg.dispatch_table:
        return NotImplemented
    return obj.__reduce_ex__(5)


def _reduce_bound(encoder: reducers.Encoder, function: Any) -> Any:
    """Send ``random.random`` by its name: it is a bound method, and its instance must not travel."""
    if isinstance(function.__self__, (type, types.ModuleType, type(None))):
        return NotImplemented
    found = find_import(function)
    return NotImplemented if found is None else (import_name, found)


def _rebuild_cached_property(function: Any, name: str | None) -> Any:
    rebuilt: Any = functools.cached_property(function)
    rebuilt.attrname = name
    return rebuilt


def _reduce_cached_property(encoder: reducers.Encoder, cached: Any) -> Any:
    """Send it without its lock, which it has before Python 3.12."""
    return _rebuild_cached_property, (cached.func, cached.attrname)


for _cls in BOUND:
    reducers.register(_cls, _reduce_bound)
reducers.register(functools.cached_property, _reduce_cached_property)
