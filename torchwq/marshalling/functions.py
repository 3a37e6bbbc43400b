"""Functions travel as code, not as data: what goes by name, what by value, and what is refused.

A function or class that its importable module gives under its name goes by that name. Any other (of ``__main__``, of a
notebook, of a plugin, made inside a function) goes by value. Such a function may use modules, and functions and
classes that go by name, and others that go by value, which are looked at in turn when the encoder meets them.
Anything else in its closure cells, or among the globals of ``__main__`` and its like that it uses, is data the caller
may not know it sends: refused, unless upvalues were asked for.

A nested function or lambda of an importable module gets that module's globals on the other side, so they are no data.
Nor is what a library's decorator closes over beside the function that it decorates, and what a library's methods of a
class do: those belong to the library.

What its home has under a function's name is defined once in each process (``definitions``), and is the same there, with
its attributes, from message to message. A nested function or lambda is made anew for each.
"""

from __future__ import annotations

import collections
import copyreg
import dataclasses
import dis
import enum
import functools
import importlib
import reprlib
import sys
import types
import typing
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import torch
from cloudpickle import cloudpickle

from ..errors import ClosureError
from . import definitions, importable, namespaces, reducers, updates

#: Attributes that every module has; a function that uses them does not capture data.
_MODULE_ATTRIBUTES: Final = frozenset(
    {
        "__name__",
        "__file__",
        "__doc__",
        "__package__",
        "__spec__",
        "__loader__",
        "__builtins__",
        "__annotations__",
    }
)
#: What is said of types, and has no data.
_TYPING_TYPES: Final[tuple[type, ...]] = (
    *(getattr(typing, name) for name in ("NewType", "TypeVar", "ParamSpec", "TypeVarTuple") if hasattr(typing, name)),
    types.GenericAlias,
    types.UnionType,
    type(typing.Union[int, str]),  # noqa: UP007 - another class than that of int | str
    *type(typing.ClassVar[int]).__mro__[:-1],
)
_BOUND: Final = (types.BuiltinFunctionType, types.MethodType)
_LruCache: Final = type(functools.lru_cache(len))
#: Modules of the standard library whose functions write methods of classes: what those close over belongs to the class.
_METHOD_GENERATORS: Final = frozenset(
    {dataclasses.__file__, collections.__file__, enum.__file__, functools.__file__, reprlib.__file__}
)
#: Free variables of the methods that ``dataclasses`` writes; they belong to the class.
_DATACLASS_CELLS: Final = ("__dataclass_", "_type_", "_dflt_", "_HAS_DEFAULT_FACTORY", "MISSING")


def module_of(obj: Any) -> Any:
    """The module that an object says it is of; None if there is none."""
    name = getattr(obj, "__module__", None)
    return sys.modules.get(name) if isinstance(name, str) else None


def is_importable(module: types.ModuleType) -> bool:
    """Whether another process can import the module under the name that it says it has."""
    found = sys.modules.get(module.__name__)
    return found is not None and importable.is_importable(module.__name__, found)


def name_of(obj: Any) -> str | None:
    """The name that an object says it has in its module; None if it says none."""
    name = getattr(obj, "__qualname__", None) or getattr(obj, "__name__", None)
    return name if isinstance(name, str) else None


def goes_by_name(obj: Any) -> bool:
    """Whether ``obj`` is what its importable module has under its name."""
    module, name = module_of(obj), name_of(obj)
    if module is None or name is None or not importable.is_importable(obj.__module__, module):
        return False
    return namespaces.look_up(vars(module), name) is obj


def underlying_function(value: Any) -> types.FunctionType | None:
    """The function that a class has under some name, without what makes a method of it; None if it is none."""
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    elif isinstance(value, property):
        value = value.fget
    elif isinstance(value, (functools.cached_property, functools.partialmethod)):
        value = value.func
    return value if isinstance(value, types.FunctionType) else None


def find_import(obj: Any) -> tuple[str, str] | None:
    """Module and name under which an importable module has ``obj``, whatever ``obj`` itself says.

    ``torch.ones`` and ``random.random`` are such: built-in functions and bound methods that do not know where they can
    be imported from.
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
    """What ``find_import`` has found, on the other side."""
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
    """Code with the name of the file it was written in, which cloudpickle drops: tracebacks and this module need it."""
    return types.CodeType(*args).replace(co_filename=filename)


def module_globals(name: str) -> dict[str, Any]:
    """The globals of an importable module, imported if need be."""
    __import__(name)
    return sys.modules[name].__dict__


def make_function(token: str | None, code: types.CodeType, globals_: dict[str, Any], name: str, cells: Any) -> Any:
    """The function with this token. If there is none, or no token, a new one without a state."""
    known = None if token is None else definitions.find(token)
    if known is not None:
        return known
    function = types.FunctionType(code, globals_, name, None, cells)
    return function if token is None else definitions.add_received(token, function)


def set_state(function: types.FunctionType, state: Any) -> None:
    """Set the state of a function; if it was there before, what its home has changed.

    Its globals get what it refers to, in any case.
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
        del slots["__code__"]  # it was made of that
        cloudpickle._function_setstate(function, (attributes, slots))
        updates.remember(function, stamp, parts)
        definitions.mark_complete(function, function.__globals__, function.__qualname__)


def _parts(attributes: dict[str, Any], slots: dict[str, Any]) -> dict[Any, Any]:
    """Of what the state of a function consists: slots by name, attributes by name in a tuple, cells by number."""
    parts: dict[Any, Any] = {name: value for name, value in slots.items() if name not in _NO_SLOTS}
    for name, value in attributes.items():
        parts[(name,)] = value
    for index, cell in enumerate(slots["__closure__"] or ()):
        try:
            parts[index] = cell.cell_contents
        except ValueError:
            continue
    return parts


_NO_SLOTS: Final = frozenset({"__globals__", "__closure__", "_cloudpickle_submodules"})


def _part(function: Any, key: Any) -> Any:
    if isinstance(key, str):
        return getattr(function, key)
    if isinstance(key, tuple):
        return vars(function).get(key[0], updates.MISSING)
    try:
        return function.__closure__[key].cell_contents
    except ValueError:
        return updates.MISSING


def _set_part(function: Any, key: Any, value: Any) -> None:
    owner, name = (function.__closure__[key], "cell_contents") if isinstance(key, int) else (function, key)
    if isinstance(key, tuple):
        name = key[0]
    if value is updates.MISSING:
        delattr(owner, name)
    else:
        setattr(owner, name, value)


@functools.lru_cache(maxsize=4096)
def _global_names(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """The global names that a code object reads, and those that it sets; inner functions included."""
    read, set_ = set(), set()
    own: set[str] = set()  # a class body looks up names in itself first
    for instruction in dis.get_instructions(code):
        if instruction.opname == "STORE_NAME":
            own.add(instruction.argval)
        elif instruction.opname == "LOAD_GLOBAL" or (
            instruction.opname == "LOAD_NAME" and instruction.argval not in own
        ):
            read.add(instruction.argval)
        elif instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            set_.add(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner_read, inner_set = _global_names(constant)
            read |= inner_read
            set_ |= inner_set
    return frozenset(read), frozenset(set_)


def used_globals(function: types.FunctionType, *, upvalues: bool, data: bool = True) -> dict[str, Any]:
    """The globals that travel with a function of ``__main__``: without upvalues, none that it sets itself.

    Args:
        data: False leaves out what is data, too.
    """
    read, set_ = _global_names(function.__code__)
    names = (read | set_ if upvalues else read - set_) - {"__builtins__"}
    globals_ = function.__globals__
    return {name: globals_[name] for name in names if name in globals_ and (data or not _is_data(globals_[name]))}


def added_globals(function: types.FunctionType) -> dict[str, Any]:
    """What a function of an importable module finds in its globals although the module does not set it.

    pytest gives those to a module whose assertions it has rewritten, under names that no program can have.
    """
    names = [name for name in _global_names(function.__code__)[0] if not name.isidentifier()]
    return {name: function.__globals__[name] for name in names if name in function.__globals__}


def check_closure(function: types.FunctionType, *, of_library: bool = False) -> None:
    """Raise ClosureError if the function, which is about to travel by value, drags data along.

    Args:
        of_library: whether what it closes over is a library's, in any case.
    """
    cells = () if of_library else _captured_cells(function)
    captured = [*cells, *_captured_globals(function)]
    if not captured:
        return
    listing = "\n".join(f"  {kind} {name}: {_describe(value)}" for kind, name, value in captured)
    raise ClosureError(
        f"the function {function.__qualname__!r} would drag along data that was not passed to it:\n{listing}\n"
        f"Either pass it as an argument, or send what the function captures too, with writeup() or upvalues=True."
    )


def _captured_cells(function: types.FunctionType) -> Iterator[tuple[str, str, Any]]:
    if function.__code__.co_filename in _METHOD_GENERATORS:
        return
    written_by_dataclasses = function.__code__.co_filename == "<string>"
    for name, value in _cells(function):
        of_class = name == "__class__" or (written_by_dataclasses and name.startswith(_DATACLASS_CELLS))
        if not of_class and _is_data(value):
            yield "closure variable", name, value


def is_wrapper(function: types.FunctionType) -> bool:
    """Whether a library's decorator has made the function."""
    if globals_module(function) is None:
        return False
    return "__wrapped__" in vars(function) or any(
        isinstance(value, (types.FunctionType, type)) and not goes_by_name(value) for _, value in _cells(function)
    )


def generated_methods(cls: type) -> Iterator[types.FunctionType]:
    """The functions that a library has written into a class that is not the library's."""
    for value in vars(cls).values():
        parts = (value.fget, value.fset, value.fdel) if isinstance(value, property) else (underlying_function(value),)
        for function in parts:
            if isinstance(function, types.FunctionType) and globals_module(function) is not None:
                yield function


def library_functions_in(function: types.FunctionType) -> Iterator[types.FunctionType]:
    """The nested functions of libraries that such a function closes over."""
    for _, value in _cells(function):
        if isinstance(value, types.FunctionType) and globals_module(value) is not None:
            yield value


def _cells(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """The closure cells of a function that have something in them, with their names."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:
            continue


def _is_generated(function: types.FunctionType) -> bool:
    """Whether a library has written the function's code and given it globals of its own, as attrs does."""
    filename = function.__code__.co_filename
    return filename.startswith("<") and "generated" in filename


def _captured_globals(function: types.FunctionType) -> Iterator[tuple[str, str, Any]]:
    if globals_module(function) is not None or _is_generated(function):
        return
    read, set_ = _global_names(function.__code__)
    for name in sorted(read - set_ - _MODULE_ATTRIBUTES):
        if name in function.__globals__ and _is_data(function.__globals__[name]):
            yield "global variable", name, function.__globals__[name]


def _is_data(value: Any) -> bool:
    if isinstance(value, types.ModuleType):
        return not is_importable(value)
    if isinstance(value, (types.FunctionType, type, _LruCache)):
        return False  # by name, or by value and then looked at when the encoder meets it
    if type(value) is tuple and value:
        return any(map(_is_data, value))
    if isinstance(value, _TYPING_TYPES) or type(value) is object or _has_name(value):
        return False
    if isinstance(getattr(value, "__self__", None), (type, types.ModuleType)) and isinstance(value, _BOUND):
        return False
    return not (callable(value) and (goes_by_name(value) or find_import(value) is not None))


def _has_name(value: Any) -> bool:
    try:
        return isinstance(own_reduction(value), str)
    except Exception:  # pickle will say so, if the closure rule does not
        return False


def own_reduction(obj: Any) -> Any:
    """What ``__reduce__`` of the object returns if its class has written one in Python; else NotImplemented.

    A string means that pickle sends the name that the object has in its module: whatever that holds, it is no data.
    """
    cls: Any = type(obj)
    reduce = cls.__reduce__ if cls.__reduce_ex__ is object.__reduce_ex__ else cls.__reduce_ex__
    if not isinstance(reduce, types.FunctionType) or cls in copyreg.dispatch_table:
        return NotImplemented
    return obj.__reduce_ex__(5)


def _describe(value: Any) -> str:
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    try:
        return _describe_as(kind, value)
    except Exception:  # what cannot even tell its size is described by its type
        return kind


def _describe_as(kind: str, value: Any) -> str:
    if isinstance(value, types.ModuleType):
        return f"module {value.__name__!r}, which no other process can import"
    if isinstance(value, torch.Tensor):
        return f"{kind} of shape {tuple(value.shape)}, {_size(value.numel() * value.element_size())}"
    if isinstance(value, np.ndarray):
        return f"{kind} of shape {value.shape}, {_size(value.nbytes)}"
    size = sys.getsizeof(value, 0)
    if isinstance(value, (list, tuple, dict, set, frozenset)):
        return f"{kind} of {len(value)} items, {_size(size)} without them"
    return f"{kind}, {_size(size)}"


def _size(nbytes: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            return f"{nbytes:.0f} {unit}" if unit == "bytes" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    raise AssertionError


def _reduce_bound(encoder: reducers.Encoder, function: Any) -> Any:
    """``random.random`` is a bound method of an instance, which must not travel in its place."""
    if isinstance(function.__self__, (type, types.ModuleType, type(None))):
        return NotImplemented
    found = find_import(function)
    return NotImplemented if found is None else (import_name, found)


def _rebuild_cached_property(function: Any, name: str | None) -> Any:
    rebuilt: Any = functools.cached_property(function)
    rebuilt.attrname = name
    return rebuilt


def _reduce_cached_property(encoder: reducers.Encoder, cached: Any) -> Any:
    """Without the lock that it holds before Python 3.12."""
    return _rebuild_cached_property, (cached.func, cached.attrname)


for _cls in _BOUND:
    reducers.register(_cls, _reduce_bound)
reducers.register(functools.cached_property, _reduce_cached_property)
