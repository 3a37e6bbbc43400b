"""The two encoders: they pickle an object, and collect in ``attachments`` what travels beside the pickle.

There are two because the common case must be fast. :class:`FastEncoder` is C pickle with one hook, which pickle calls
only for objects that are not plain containers and scalars. The hook raises ``NeedsCloudpickle`` when it meets a
function or class that must travel by value. :class:`CloudEncoder` is cloudpickle under the closure rule.

The pickler writes large ``bytes`` straight to its file, which here is a list: it does not copy them. Large numpy arrays
leave the pickle out of band (protocol 5): each goes into a shared block, which the reader maps copy-on-write.
"""

from __future__ import annotations

import pickle
import types
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import cloudpickle

from . import classes, closure_rule, definitions, functions, named, namespaces, reducers
from .attachments import Attachments


class NeedsCloudpickle(Exception):
    """The object contains a function or class that only cloudpickle can pickle."""


class _ChunkWriter:
    """A file for a pickler; it passes each chunk on without copying it."""

    __slots__ = ("write",)

    def __init__(self, write: Callable[[Any], None]) -> None:
        self.write = write


class FastEncoder(pickle.Pickler):
    """C pickle. ``codec`` uses an encoder many times: making a pickler costs more than pickling a small object.

    ``out`` does not refer to the encoder: a cycle would keep descriptors and tensors alive until the garbage collector
    runs.
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
            if cls in named.never_by_name:
                return NotImplemented
            if getattr(cls, "__module__", None) == "__main__":
                self._reduce_definition(cls)  # may raise, before a user's code has reduced the object in vain
            return named.reduce_instance(obj, cls)
        return self._reduce_definition(obj)

    def _reduce_definition(self, obj: Any) -> Any:
        """Reduce a function or class. Raises NeedsCloudpickle if it travels by value."""
        if functions.goes_by_name(obj):
            return NotImplemented
        sealed = None if self.out.peer.same_process or self.out.full_definitions else definitions.reduce_sealed(obj)
        if sealed is None:
            raise NeedsCloudpickle
        return sealed


class CloudEncoder(cloudpickle.Pickler):  # type: ignore[misc]
    """cloudpickle under the closure rule.

    Args:
        upvalues: whether captured data travels too.
        full_definitions: whether definitions that this process has received travel as they are now; else sealed.
        sealing: whether the encoder seals a definition. Then the data that its functions capture stays here.
    """

    def __init__(self, upvalues: bool, full_definitions: bool = False, sealing: bool = False) -> None:
        self.out = out = Attachments()
        super().__init__(_ChunkWriter(out.chunks.append), 5, buffer_callback=None if sealing else out.take_buffer)
        self._upvalues = upvalues
        self._full_definitions = full_definitions or sealing
        self._sealing = sealing
        #: Classes that a local message refers to, after the check that their functions capture no data.
        self._checked_classes: set[type] = set()
        #: Functions that a library has written for a class: their closure cells belong to the library.
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
        found = None if self._full_definitions else definitions.reduce_received(cls, _seal)
        if found is not None:
            return found
        self._library_functions.update(closure_rule.generated_methods(cls))
        return classes.reduce(cls, self._sealing)

    def _reduce_class_local(self, cls: type) -> Any:
        """In its own process a class arrives as itself: rebuilding it would reset its attributes."""
        if not self._upvalues and cls not in self._checked_classes:
            checker = CloudEncoder(False)
            checker._checked_classes = self._checked_classes
            self._checked_classes.add(cls)
            checker.dump(cls)
        return reducers.attached_object, (self.out.attach_object(cls),)

    def _reduce_function(self, function: types.FunctionType) -> Any:
        if named.is_dispatcher(function):
            return named.reduce_dispatcher(function, self._sealing)
        found = (
            None
            if self._full_definitions or self.out.peer.same_process
            else definitions.reduce_received(function, _seal)
        )
        if found is not None:
            return found
        if not self._upvalues and not self._sealing:
            of_library = function in self._library_functions or closure_rule.is_wrapper(function)
            closure_rule.check(function, of_library=of_library)
            if of_library:
                self._library_functions.update(closure_rule.library_functions_in(function))
        (code, _, _, _, cells), state = self._dynamic_function_reduce(function)[1:3]
        slots = state[1]
        globals_ = function.__globals__
        space: Any
        if (module := functions.globals_module(function)) is not None:
            space = _ModuleGlobals(module)
            slots["__globals__"] = closure_rule.added_globals(function)
        else:
            space = namespaces.of(globals_)
            slots["__globals__"] = closure_rule.used_globals(function, upvalues=self._upvalues, data=not self._sealing)
        is_home_name = module is None and namespaces.look_up(globals_, function.__qualname__) is function
        token = definitions.token_of(function) if is_home_name else None
        if token is not None:
            slots["__code__"] = code  # its home may set another one later
            state = *state, 0 if self._sealing else definitions.stamp_of(function)
        args = token, code, space, function.__name__, cells
        return functions.make_function, args, state, None, None, functions.set_state


def _seal(obj: Any) -> bytes:
    encoder = CloudEncoder(True, sealing=True)
    encoder.dump(obj)
    return b"" if encoder.out.has_attachments else b"".join(encoder.out.chunks)


def _bring_to_processes_of_multiprocessing() -> None:
    """Let multiprocessing send the definitions that this process has received.

    A process that multiprocessing forks from a worker has them. One that it spawns would look for the script of
    ``__main__``, and a worker's ``__main__`` has none.
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
    """Pickles as the globals of a module, which the reader imports."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __reduce__(self) -> Any:
        return functions.module_globals, (self._name,)
