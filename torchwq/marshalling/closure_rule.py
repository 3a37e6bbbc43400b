"""The closure rule: which data a function captures, and the refusal to send it.

Looked at are functions that travel by value. Such a function may use modules, functions and classes; the encoder looks
at those that travel by value when it meets them. Anything else in its closure cells, or among the globals of
``__main__`` and its like that it uses, is *data*, which its user may not mean to send: :func:`check` refuses it.

These are no data:

* the globals of a nested function or lambda of an importable module, because its reader has that module;
* the closure cells of a wrapper that a library's decorator has made, apart from the function that it wraps, and those
  of methods that a library has written for a class: both belong to the library.
"""

from __future__ import annotations

import collections
import dataclasses
import dis
import enum
import functools
import reprlib
import sys
import types
import typing
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import torch

from ..errors import ClosureError
from . import functions, updates

#: Attributes of every module. A function that uses them captures no data.
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
#: Types of the objects of ``typing``, which have no data.
_TYPING_TYPES: Final[tuple[type, ...]] = (
    *(getattr(typing, name) for name in ("NewType", "TypeVar", "ParamSpec", "TypeVarTuple") if hasattr(typing, name)),
    types.GenericAlias,
    types.UnionType,
    type(typing.Union[int, str]),  # noqa: UP007 - another class than that of int | str
    *type(typing.ClassVar[int]).__mro__[:-1],
)
_LruCache: Final = type(functools.lru_cache(len))
#: Modules of the standard library that write methods of classes. The cells of these belong to the class.
_METHOD_GENERATORS: Final = frozenset(
    {dataclasses.__file__, collections.__file__, enum.__file__, functools.__file__, reprlib.__file__}
)
#: How the names of cells begin in methods that ``dataclasses`` writes. These cells belong to the class.
_DATACLASS_CELLS: Final = ("__dataclass_", "_type_", "_dflt_", "_HAS_DEFAULT_FACTORY", "MISSING")


@functools.lru_cache(maxsize=4096)
def _global_names(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """The global names that a code object, inner functions included, reads, and those that it sets."""
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
    """The globals that travel with a function of ``__main__``.

    Args:
        upvalues: True includes those that the function sets.
        data: False leaves out data.
    """
    read, set_ = _global_names(function.__code__)
    names = (read | set_ if upvalues else read - set_) - {"__builtins__"}
    globals_ = function.__globals__
    return {name: globals_[name] for name in names if name in globals_ and (data or not _is_data(globals_[name]))}


def added_globals(function: types.FunctionType) -> dict[str, Any]:
    """The globals that a function of an importable module uses although the module's source does not set them.

    pytest adds them to a module whose assertions it rewrites, under names that are no identifiers.
    """
    names = [name for name in _global_names(function.__code__)[0] if not name.isidentifier()]
    return {name: function.__globals__[name] for name in names if name in function.__globals__}


def check(function: types.FunctionType, *, of_library: bool = False) -> None:
    """Raise ClosureError if a function that travels by value captures data.

    Args:
        of_library: whether its closure cells belong to a library.
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
    if functions.globals_module(function) is None:
        return False
    return "__wrapped__" in vars(function) or any(
        isinstance(value, (types.FunctionType, type)) and not functions.goes_by_name(value)
        for _, value in _cells(function)
    )


def generated_methods(cls: type) -> Iterator[types.FunctionType]:
    """The methods that a library has written for a class of somebody else."""
    for value in vars(cls).values():
        parts = (
            (value.fget, value.fset, value.fdel)
            if isinstance(value, property)
            else (functions.underlying_function(value),)
        )
        for function in parts:
            if isinstance(function, types.FunctionType) and functions.globals_module(function) is not None:
                yield function


def library_functions_in(function: types.FunctionType) -> Iterator[types.FunctionType]:
    """The nested functions of libraries in a function's closure cells."""
    for _, value in _cells(function):
        if isinstance(value, types.FunctionType) and functions.globals_module(value) is not None:
            yield value


def _cells(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Name and content of each closure cell that is not empty."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if (content := updates.content_of(cell)) is not updates.MISSING:
            yield name, content


def _is_generated(function: types.FunctionType) -> bool:
    """Whether a library has written the function's code and given it globals of its own, as attrs does."""
    filename = function.__code__.co_filename
    return filename.startswith("<") and "generated" in filename


def _captured_globals(function: types.FunctionType) -> Iterator[tuple[str, str, Any]]:
    if functions.globals_module(function) is not None or _is_generated(function):
        return
    read, set_ = _global_names(function.__code__)
    for name in sorted(read - set_ - _MODULE_ATTRIBUTES):
        if name in function.__globals__ and _is_data(function.__globals__[name]):
            yield "global variable", name, function.__globals__[name]


def _is_data(value: Any) -> bool:
    if isinstance(value, types.ModuleType):
        return not functions.is_importable(value)
    if isinstance(value, (types.FunctionType, type, _LruCache)):
        return False  # the encoder looks at it when it meets it
    if type(value) is tuple and value:
        return any(map(_is_data, value))
    if isinstance(value, _TYPING_TYPES) or type(value) is object or _has_name(value):
        return False
    if isinstance(getattr(value, "__self__", None), (type, types.ModuleType)) and isinstance(value, functions.BOUND):
        return False
    return not (callable(value) and (functions.goes_by_name(value) or functions.find_import(value) is not None))


def _has_name(value: Any) -> bool:
    try:
        return isinstance(functions.own_reduction(value), str)
    except Exception:  # pickle will raise it, too
        return False


def _describe(value: Any) -> str:
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    try:
        return _describe_as(kind, value)
    except Exception:  # user code may raise anything
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
    if nbytes < 1000:
        return f"{nbytes:.0f} bytes"
    for unit in ("KB", "MB"):
        nbytes /= 1000
        if nbytes < 1000:
            return f"{nbytes:.1f} {unit}"
    return f"{nbytes / 1000:.1f} GB"
