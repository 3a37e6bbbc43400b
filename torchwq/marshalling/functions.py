"""Functions travel as code, not as data: what goes by name, what by value, and what is refused.

A function or class that its module gives under its name goes by that name. Any other (of ``__main__``, of a
notebook, made inside a function) goes by value, with cloudpickle. Such a function may use modules, and functions and
classes that go by name, and others that go by value, which are looked at in turn when the encoder meets them.
Anything else in its closure cells, or among the globals of ``__main__`` that it uses, is data the caller may not
know it sends: refused, unless upvalues were asked for.

A nested function or lambda of an importable module gets that module's globals on the other side, so they are no data.
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import pickle
import sys
import types
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import torch

from ..errors import ClosureError

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
#: Free variables of the methods that ``dataclasses`` writes; they belong to the class.
_DATACLASS_CELLS: Final = ("__dataclass_", "_type_", "_dflt_", "_HAS_DEFAULT_FACTORY", "MISSING")


def goes_by_name(obj: Any) -> bool:
    """Whether ``obj`` is what its importable module has under its name."""
    name = getattr(obj, "__qualname__", None) or getattr(obj, "__name__", None)
    if not isinstance(name, str):
        return False
    module_name = getattr(obj, "__module__", None)
    if not isinstance(module_name, str):
        module_name = pickle.whichmodule(obj, name)  # type: ignore[attr-defined]
    module = sys.modules.get(module_name)
    if module is None or module_name == "__main__":
        return False
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is obj


def own_module(function: types.FunctionType) -> str | None:
    """Name of the importable module whose globals the function uses; None for ``__main__`` and its like."""
    name = function.__globals__.get("__name__")
    if not isinstance(name, str) or name == "__main__":
        return None
    module = sys.modules.get(name)
    return name if module is not None and module.__dict__ is function.__globals__ else None


def module_globals(name: str) -> dict[str, Any]:
    """The globals of an importable module, imported if need be."""
    __import__(name)
    return sys.modules[name].__dict__


@functools.lru_cache(maxsize=4096)
def _global_names(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """The global names that a code object reads, and those that it sets; inner functions included."""
    read, set_ = set(), set()
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            read.add(instruction.argval)
        elif instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            set_.add(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner_read, inner_set = _global_names(constant)
            read |= inner_read
            set_ |= inner_set
    return frozenset(read), frozenset(set_)


def set_globals(function: types.FunctionType) -> frozenset[str]:
    """The globals that the function itself sets, and so brings no value for."""
    return _global_names(function.__code__)[1]


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
    if function.__code__.co_filename == dataclasses.__file__:
        return
    written_by_dataclasses = function.__code__.co_filename == "<string>"
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if name == "__class__" or (written_by_dataclasses and name.startswith(_DATACLASS_CELLS)):
            continue
        try:
            value = cell.cell_contents
        except ValueError:
            continue
        if _is_data(value):
            yield "closure variable", name, value


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
    if isinstance(value, (types.FunctionType, type)):
        return False  # by name, or by value and then looked at when the encoder meets it
    if isinstance(value, types.MethodType) and isinstance(value.__self__, type):
        return False
    if isinstance(value, type(functools.lru_cache(len))):
        return False
    return not (callable(value) and goes_by_name(value))


def _describe(value: Any) -> str:
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
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
