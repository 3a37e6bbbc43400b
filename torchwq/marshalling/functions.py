"""Functions travel as code, not as data: what goes by name, what by value, and what is refused.

A function or class that its module gives under its name goes by that name. Any other (of ``__main__``, of a
notebook, made inside a function) goes by value, with cloudpickle. Such a function may use modules, and functions and
classes that go by name, and others that go by value, which are looked at in turn when the encoder meets them.
Anything else in its closure cells, or among the globals of ``__main__`` that it uses, is data the caller may not
know it sends: refused, unless upvalues were asked for.

A nested function or lambda of an importable module gets that module's globals on the other side, so they are no data.
"""

from __future__ import annotations

import collections
import dataclasses
import dis
import enum
import functools
import importlib
import reprlib
import sys
import types
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import torch

from ..errors import ClosureError
from . import reducers

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
_BOUND: Final = (types.BuiltinFunctionType, types.MethodType)
_LruCache: Final = type(functools.lru_cache(len))
#: Modules of the standard library whose functions write methods of classes: what those close over belongs to the class.
_WRITERS: Final = frozenset(
    {dataclasses.__file__, collections.__file__, enum.__file__, functools.__file__, reprlib.__file__}
)
#: Free variables of the methods that ``dataclasses`` writes; they belong to the class.
_DATACLASS_CELLS: Final = ("__dataclass_", "_type_", "_dflt_", "_HAS_DEFAULT_FACTORY", "MISSING")


#: Whether whoever reads what this process writes has the same ``__main__``: it was forked from it.
main_is_shared = False


def goes_by_name(obj: Any) -> bool:
    """Whether ``obj`` is what its importable module has under its name."""
    module = sys.modules.get(getattr(obj, "__module__", None) or "")
    name = getattr(obj, "__qualname__", None) or getattr(obj, "__name__", None)
    if module is None or not isinstance(name, str):
        return False
    if module is sys.modules.get("__main__") and not main_is_shared:
        return False
    return _find(module, name) is obj


def home(obj: Any) -> tuple[str, str] | None:
    """Module and name under which an importable module has ``obj``, whatever ``obj`` itself says.

    ``torch.ones`` and ``random.random`` are such: built-in functions and bound methods that do not know where they can
    be imported from.
    """
    names = {name for name in (getattr(obj, "__qualname__", None), getattr(obj, "__name__", None)) if name}
    own = getattr(obj, "__module__", None)
    for module_name in [own] if own in sys.modules else list(sys.modules):
        module = sys.modules.get(module_name)
        if isinstance(module, types.ModuleType) and module_name != "__main__":
            for name in names:
                if _find(module, name) is obj:
                    return module_name, name
    return None


def _find(module: types.ModuleType, name: str) -> Any:
    """What a module has under a dotted name; None if nothing. Runs no ``__getattr__`` of a module."""
    first, *rest = name.split(".")
    found = vars(module).get(first)
    for part in rest:
        found = getattr(found, part, None)
    return found


def imported(module_name: str, name: str) -> Any:
    """What ``home`` has found, on the other side."""
    return _find(importlib.import_module(module_name), name)


def own_module(function: types.FunctionType) -> str | None:
    """Name of the importable module whose globals the function uses; None for ``__main__`` and its like."""
    name = function.__globals__.get("__name__")
    if not isinstance(name, str) or name == "__main__":
        return None
    module = sys.modules.get(name)
    return name if module is not None and module.__dict__ is function.__globals__ else None


def code_of_file(filename: str, args: tuple[Any, ...]) -> types.CodeType:
    """Code with the name of the file it was written in, which cloudpickle drops: tracebacks and this module need it."""
    return types.CodeType(*args).replace(co_filename=filename)


def module_globals(name: str) -> dict[str, Any]:
    """The globals of an importable module, imported if need be."""
    __import__(name)
    return sys.modules[name].__dict__


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


def used_globals(function: types.FunctionType, *, upvalues: bool) -> dict[str, Any]:
    """The globals that travel with a function of ``__main__``: without upvalues, none that it sets itself."""
    read, set_ = _global_names(function.__code__)
    names = read | set_ if upvalues else read - set_
    return {name: function.__globals__[name] for name in names if name in function.__globals__}


def check(function: types.FunctionType) -> None:
    """Raise ClosureError if the function, which is about to travel by value, drags data along."""
    captured = [*_captured_cells(function), *_captured_globals(function)]
    if not captured:
        return
    listing = "\n".join(f"  {kind} {name}: {_describe(value)}" for kind, name, value in captured)
    raise ClosureError(
        f"the function {function.__qualname__!r} would drag along data that was not passed to it:\n{listing}\n"
        f"Either pass it as an argument, or send what the function captures too, with writeup() or upvalues=True."
    )


def _captured_cells(function: types.FunctionType) -> Iterator[tuple[str, str, Any]]:
    if function.__code__.co_filename in _WRITERS:
        return
    library = own_module(function) is not None
    written_by_dataclasses = function.__code__.co_filename == "<string>"
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if name == "__class__" or (written_by_dataclasses and name.startswith(_DATACLASS_CELLS)):
            continue
        try:
            value = cell.cell_contents
        except ValueError:
            continue
        if _is_data(value) and not (library and _is_method_of_library(value)):
            yield "closure variable", name, value


def _is_method_of_library(value: Any) -> bool:
    """What a library's decorator closes over beside the function, as that of ``torch.no_grad()`` does: no user's
    data."""
    return isinstance(value, types.MethodType) and goes_by_name(type(value.__self__))


def _captured_globals(function: types.FunctionType) -> Iterator[tuple[str, str, Any]]:
    if own_module(function) is not None:
        return
    read, set_ = _global_names(function.__code__)
    for name in sorted(read - set_ - _MODULE_ATTRIBUTES):
        if name in function.__globals__ and _is_data(function.__globals__[name]):
            yield "global variable", name, function.__globals__[name]


def _is_data(value: Any) -> bool:
    if isinstance(value, types.ModuleType):
        return value.__name__ not in sys.modules
    if isinstance(value, (types.FunctionType, type, _LruCache)):
        return False  # by name, or by value and then looked at when the encoder meets it
    if isinstance(getattr(value, "__self__", None), (type, types.ModuleType)) and isinstance(value, _BOUND):
        return False
    return not (callable(value) and (goes_by_name(value) or home(value) is not None))


def _describe(value: Any) -> str:
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    try:
        return _describe_as(kind, value)
    except Exception:  # what cannot even tell its size is described by its type
        return kind


def _describe_as(kind: str, value: Any) -> str:
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


def _rebuild_lru_cache(function: Any, maxsize: int | None, typed: bool) -> Any:
    return functools.lru_cache(maxsize, typed)(function)


def _reduce_lru_cache(encoder: reducers.Encoder, cached: Any) -> Any:
    """A cached function travels as its function, with an empty cache; pickle would only send its name."""
    if goes_by_name(cached):
        return NotImplemented
    parameters = cached.cache_parameters()
    return _rebuild_lru_cache, (cached.__wrapped__, parameters["maxsize"], parameters["typed"])


reducers.register(_LruCache, _reduce_lru_cache)


def _reduce_bound(encoder: reducers.Encoder, function: Any) -> Any:
    """``random.random`` is a bound method of an instance, which must not travel in its place."""
    if isinstance(function.__self__, (type, types.ModuleType, type(None))):
        return NotImplemented
    found = home(function)
    return NotImplemented if found is None else (imported, found)


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
