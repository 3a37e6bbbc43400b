"""The two encoders: they turn an object into a pickle, and collect what goes beside it.

Two, because the common case must be fast. :class:`FastEncoder` is C pickle with one hook, which is called only for
objects that are not plain containers and scalars. It raises ``NeedsCloudpickle`` when it meets a function or
class that has to travel by value. :class:`CloudEncoder` is cloudpickle with the closure rule in front of it.

Large ``bytes`` reach the output as they are, without a copy: the pickler writes them straight to its file, which
here is a list. Large numpy arrays leave out of band (protocol 5): each goes into a shared block, which the reader maps
copy-on-write.
"""

from __future__ import annotations

import pickle
import types
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import cloudpickle

from . import classes, definitions, functions, named, namespaces, reducers
from .attachments import Attachments


class NeedsCloudpickle(Exception):
    """The object holds something that travels by value and only cloudpickle can take apart."""


class _ChunkWriter:
    """A file for a pickler that collects what is written, without copying it."""

    __slots__ = ("write",)

    def __init__(self, write: Callable[[Any], None]) -> None:
        self.write = write


class FastEncoder(pickle.Pickler):
    """C pickle. Used again and again: making a pickler costs more than pickling a small object.

    What it collects is an object of its own, which does not refer back: a cycle would keep descriptors and tensors
    alive until the collector comes by.
    """

    def __init__(self) -> None:
        self.out = out = Attachments()
        super().__init__(_ChunkWriter(out.chunks.append), 5, buffer_callback=out.take_buffer)

    def reducer_override(self, obj: Any) -> Any:
        cls = type(obj)
        reducer = reducers.lookup(cls)
        if reducer is not None:
            return reducer(self.out, obj)
        if cls is types.FunctionType:
            if obj in reducers.rebuilders:
                return NotImplemented
        elif not isinstance(obj, type):
            return NotImplemented if cls in named.never_by_name else named.reduce_instance(obj, cls)
        if functions.goes_by_name(obj):
            return NotImplemented
        sealed = None if self.out.peer.same_process or self.out.full_definitions else definitions.reduce_sealed(obj)
        if sealed is None:
            raise NeedsCloudpickle
        return sealed


class CloudEncoder(cloudpickle.Pickler):  # type: ignore[misc]
    """cloudpickle, with the closure rule in front of it.

    Args:
        upvalues: what functions drag along travels, too.
        full_definitions: what this process has received travels as it is now; else as it was sealed.
        sealing: what is encoded is a definition that was received. What its functions drag along stays here.
    """

    def __init__(self, upvalues: bool, full_definitions: bool = False, sealing: bool = False) -> None:
        self.out = out = Attachments()
        super().__init__(_ChunkWriter(out.chunks.append), 5, buffer_callback=None if sealing else out.take_buffer)
        self._upvalues = upvalues
        self._in_full = full_definitions or sealing
        self._sealing = sealing
        #: Classes that stay here, of which it is looked at only what they drag along.
        self._checked_classes: set[type] = set()
        #: Functions that a library has written for a class: what they close over is the library's.
        self._library_functions: set[types.FunctionType] = set()

    def reducer_override(self, obj: Any) -> Any:
        cls = type(obj)
        reducer = reducers.lookup(cls)
        if reducer is not None:
            return reducer(self.out, obj)
        if cls is types.FunctionType:
            return (
                NotImplemented
                if obj in reducers.rebuilders or functions.goes_by_name(obj)
                else self._reduce_function(obj)
            )
        if isinstance(obj, type):
            if functions.goes_by_name(obj) or not classes.is_by_value(obj):
                return super().reducer_override(obj)
            return self._reduce_class(obj)
        if cls is types.CodeType:
            _, args = self.dispatch_table[types.CodeType](obj)
            return functions.code_of_file, (obj.co_filename, args)
        if cls is types.ModuleType and not self.out.peer.same_process and not functions.is_importable(obj):
            return namespaces.reduce_module(obj)
        return named.reduce_instance(obj, cls) if cls not in self.dispatch_table else super().reducer_override(obj)

    def _reduce_class(self, cls: type) -> Any:
        if self.out.peer.same_process:
            return self._reduce_class_local(cls)
        found = None if self._in_full else definitions.reduce_received(cls, _seal)
        if found is not None:
            return found
        self._library_functions.update(functions.generated_methods(cls))
        return classes.reduce(cls, self._sealing)

    def _reduce_class_local(self, cls: type) -> Any:
        """A class that goes by value is the same class in its own process: rebuilding it would reset its attributes."""
        if not self._upvalues and cls not in self._checked_classes:
            look = CloudEncoder(False)
            look._checked_classes = self._checked_classes
            self._checked_classes.add(cls)
            look.dump(cls)
        return reducers.attached_object, (self.out.attach_object(cls),)

    def _reduce_function(self, function: types.FunctionType) -> Any:
        if named.is_dispatcher(function):
            return named.reduce_dispatcher(function, self._sealing)
        found = None if self._in_full or self.out.peer.same_process else definitions.reduce_received(function, _seal)
        if found is not None:
            return found
        if not self._upvalues and not self._sealing:
            of_library = function in self._library_functions or functions.is_wrapper(function)
            functions.check_closure(function, of_library=of_library)
            if of_library:
                self._library_functions.update(functions.library_functions_in(function))
        (code, _, _, _, cells), state = self._dynamic_function_reduce(function)[1:3]
        slots = state[1]
        globals_ = function.__globals__
        space: Any
        if (module := functions.globals_module(function)) is not None:
            space = _ModuleGlobals(module)
            slots["__globals__"] = functions.added_globals(function)
        else:
            space = namespaces.of(globals_)
            slots["__globals__"] = functions.used_globals(function, upvalues=self._upvalues, data=not self._sealing)
        is_home_name = module is None and namespaces.look_up(globals_, function.__qualname__) is function
        token = definitions.token_of(function) if is_home_name else None
        if token is not None:
            slots["__code__"] = code  # should it be set anew at home
            state = *state, 0 if self._sealing else definitions.stamp_of(function)
        return (
            functions.make_function,
            (token, code, space, function.__name__, cells),
            state,
            None,
            None,
            functions.set_state,
        )


def _seal(obj: Any) -> bytes:
    encoder = CloudEncoder(True, sealing=True)
    encoder.dump(obj)
    return b"" if encoder.out.has_attachments else b"".join(encoder.out.chunks)


def _bring_to_processes_of_multiprocessing() -> None:
    """Let what multiprocessing sends from here bring the definitions that have come here.

    Processes that it forks from a worker have them. But those that it spawns look for the script of ``__main__``, and
    a worker's ``__main__`` has none.
    """
    pickler: Any = ForkingPickler
    if not hasattr(pickler, "reducer_override"):
        pickler.reducer_override = _reduce_for_multiprocessing


def _reduce_for_multiprocessing(pickler: Any, obj: Any) -> Any:
    if not isinstance(obj, (type, types.FunctionType)):
        return NotImplemented
    found = definitions.reduce_received(obj, _seal)
    return NotImplemented if found is None else found


definitions.on_first_received.append(_bring_to_processes_of_multiprocessing)


class _ModuleGlobals:
    """Stands for the globals of a module, and becomes them on the other side."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __reduce__(self) -> Any:
        return functions.module_globals, (self._name,)
