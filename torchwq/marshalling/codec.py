"""Encodes objects into messages and decodes them.

Two encoders, because the common case must be fast. The first is C pickle with one hook, which is called only for
objects that are not plain containers and scalars. It hands over to the second, cloudpickle's, when it meets a
function or class that has to travel by value, or anything that pickle cannot do.

Large ``bytes`` reach the output as they are, without a copy: the pickler writes them straight to its file, which
here is a list. Large numpy arrays leave out of band (protocol 5): each goes into a shared block, which the reader maps
copy-on-write. A pickle that is too large for a message goes into a block, too.

What a message has beside the pickle is put together in ``payload``.
"""

from __future__ import annotations

import contextlib
import pickle
import types
from collections.abc import Callable, Container, Sequence
from multiprocessing.reduction import ForkingPickler
from pickle import dumps
from typing import Any, Final, Literal, TypeAlias, overload

import cloudpickle

from ..errors import ClosureError, MarshalError, ResourceError
from ..memory import recycling
from ..memory.arrivals import Arrivals
from ..memory.block import Block
from ..memory.parcel import BLOCK, REFERENCES, Parcel
from ..transport import bag
from ..transport.descriptors import close_fds
from ..transport.endpoint import NO_FDS
from ..transport.trailer import KIND, kind_of, size_of_payload
from . import classes, definitions, functions, inheritance, locate, named, namespaces, plain, reducers
from .letter import ENCLOSED, Letter
from .payload import HEAD, Attachments, arrivals_of, listed

#: Largest payload of a message to a worker: fits into a message of either transport.
CALL_LIMIT: Final = 16 * 1024 - 64
#: What has no size that it must keep to: a message that stays in this process.
UNLIMITED: Final = 1 << 62

#: What needs no hook: such an object, or a tuple of them, is most of what small messages are.
SCALARS: Final = frozenset({int, float, str, bool, type(None)})
only_scalars: Final = SCALARS.issuperset
#: The same and bytes, which are often long, and go into shared memory at once then: ``dumps`` would copy them first.
ATOMS: Final = SCALARS | {bytes}
only_atoms: Final = ATOMS.issuperset

#: Collections of them may be their own payload within this process: see ``copied``.
COPIES: Final = frozenset({tuple, list, dict})
#: How many dicts, lists and tuples in one object are copied so: pickling looks at more of them in less time.
_MOST_COPIED: Final = 32
#: Text of more characters than this, or more bytes, is not pickled for this process: that would copy it twice.
_LONG: Final = 4096

Payload = bytes | Parcel | Letter
#: ``bytes | Parcel``, or, if it stays here, any ``Payload``, or what ``copied`` gives.
Encoded: TypeAlias = Any


class _NeedsCloud(Exception):
    """The object holds something that travels by value and only cloudpickle can take apart."""


class _Sink:
    """A file for a pickler that collects what is written, without copying it."""

    __slots__ = ("write",)

    def __init__(self, write: Callable[[Any], None]) -> None:
        self.write = write


class _FastEncoder(pickle.Pickler):
    """C pickle. Used again and again: making a pickler costs more than pickling a small object.

    What it collects is an object of its own, which does not refer back: a cycle would keep descriptors and tensors
    alive until the collector comes by.
    """

    def __init__(self) -> None:
        self.out = out = Attachments()
        super().__init__(_Sink(out.chunks.append), 5, buffer_callback=out.take_buffer)

    def reducer_override(self, obj: Any) -> Any:
        cls = type(obj)
        reducer = reducers.lookup(cls)
        if reducer is not None:
            return reducer(self.out, obj)
        if cls is types.FunctionType:
            if obj in reducers.rebuilders:
                return NotImplemented
        elif not isinstance(obj, type):
            return NotImplemented if cls in named.ordinary else named.reduce_instance(obj, cls)
        if functions.goes_by_name(obj):
            return NotImplemented
        sealed = None if self.out.here or self.out.in_full else definitions.reduce_sealed(obj)
        if sealed is None:
            raise _NeedsCloud
        return sealed


class _CloudEncoder(cloudpickle.Pickler):  # type: ignore[misc]
    """cloudpickle, with the closure rule in front of it.

    Args:
        upvalues: what functions drag along travels, too.
        in_full: what this process has received travels as it is now; else as it was sealed.
        sealing: what is encoded is a definition that was received. What its functions drag along stays here.
    """

    def __init__(self, upvalues: bool, in_full: bool = False, sealing: bool = False) -> None:
        self.out = out = Attachments()
        super().__init__(_Sink(out.chunks.append), 5, buffer_callback=None if sealing else out.take_buffer)
        self._upvalues = upvalues
        self._in_full = in_full or sealing
        self._sealing = sealing
        #: Classes that stay here, of which it is looked at only what they drag along.
        self._looked_at: set[type] = set()
        #: Functions that a library has written for a class: what they close over is the library's.
        self._of_library: set[types.FunctionType] = set()

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
        if cls is types.ModuleType and not self.out.here and not functions.is_importable(obj):
            return namespaces.reduce_module(obj)
        return named.reduce_instance(obj, cls) if cls not in self.dispatch_table else super().reducer_override(obj)

    def _reduce_class(self, cls: type) -> Any:
        if self.out.here:
            return self._reduce_class_here(cls)
        found = None if self._in_full else definitions.reduce_received(cls, _seal)
        if found is not None:
            return found
        self._of_library.update(functions.written_by_library(cls))
        return classes.reduce(cls, self._sealing)

    def _reduce_class_here(self, cls: type) -> Any:
        """A class that goes by value is the same class in its own process: rebuilding it would reset its attributes."""
        if not self._upvalues and cls not in self._looked_at:
            look = _CloudEncoder(False)
            look._looked_at = self._looked_at
            self._looked_at.add(cls)
            look.dump(cls)
        return reducers.enclosed, (self.out.enclose(cls),)

    def _reduce_function(self, function: types.FunctionType) -> Any:
        if named.is_dispatcher(function):
            return named.reduce_dispatcher(function, self._sealing)
        found = None if self._in_full or self.out.here else definitions.reduce_received(function, _seal)
        if found is not None:
            return found
        if not self._upvalues and not self._sealing:
            of_library = function in self._of_library or functions.is_wrapper(function)
            functions.check(function, of_library=of_library)
            if of_library:
                self._of_library.update(functions.parts_of_library(function))
        (code, _, _, _, cells), state = self._dynamic_function_reduce(function)[1:3]
        slots = state[1]
        globals_ = function.__globals__
        space: Any
        if (module := functions.own_module(function)) is not None:
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
        return functions.make, (token, code, space, function.__name__, cells), state, None, None, functions.finish


def _seal(obj: Any) -> bytes:
    encoder = _CloudEncoder(True, sealing=True)
    encoder.dump(obj)
    return b"" if encoder.out.more else b"".join(encoder.out.chunks)


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


definitions.on_first.append(_bring_to_processes_of_multiprocessing)


class _ModuleGlobals:
    """Stands for the globals of a module, and becomes them on the other side."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __reduce__(self) -> Any:
        return functions.module_globals, (self._name,)


class _Tools(tuple[Callable[[Any], None], Callable[[], None], list[bytes], Attachments]):
    """What ``encode`` needs of an encoder, looked up once."""

    __slots__ = ()

    def __new__(cls, encoder: _FastEncoder) -> _Tools:
        return super().__new__(cls, (encoder.dump, encoder.clear_memo, encoder.out.chunks, encoder.out))


#: Encoders for the next calls. One that has failed, or holds something, does not come back.
_idle: list[_Tools] = []


@overload
def encode(
    obj: Any,
    limit: int,
    *,
    upvalues: bool = False,
    fresh: Container[Block] | None = None,
    here: Literal[False] = False,
    starting: list[Any] | None = None,
    in_full: bool = False,
) -> bytes | Parcel: ...
@overload
def encode(
    obj: Any,
    limit: int,
    *,
    upvalues: bool = False,
    fresh: Container[Block] | None = None,
    here: bool,
    starting: list[Any] | None = None,
    in_full: bool = False,
) -> Payload: ...
def encode(
    obj: Any,
    limit: int,
    *,
    upvalues: bool = False,
    fresh: Container[Block] | None = None,
    here: bool = False,
    starting: list[Any] | None = None,
    in_full: bool = False,
) -> Payload:
    """Turn ``obj`` into the payload of one message of at most ``limit`` bytes, trailer not counted.

    If the message stays ``here``, in this process, it may be of any size, and its tensors stay where they are.

    Functions and classes that came from another process and go by value travel as they came, at little cost; or, with
    ``in_full``, as they are now, and under the closure rule.

    A tensor in it is in shared memory afterwards; but if ``fresh`` is given, only those on these blocks go by
    reference, and copies of all others, which stay as they are. If a worker is to begin with the message, ``starting``
    is a list to which is added what must live as long as that worker; then what processes inherit from each other with
    multiprocessing may be in it (see ``inheritance``). Raises whatever pickling it raises; :func:`encode_all`
    turns that into a MarshalError that names the place.
    """
    cls = type(obj)
    if here and (cls is str or cls is bytes) and len(obj) > _LONG:
        return Letter(None, (obj,))
    if cls in SCALARS or (cls is tuple and only_scalars(map(type, obj))):
        bare = dumps(obj, 5)
        return bare if len(bare) <= limit else large(bare, limit)
    elif plain.may_be(obj):
        found = plain.encode(obj, limit, fresh) if not here else plain.encode_here(obj) if fresh is None else None
        if found is not None:
            return found
    try:
        tools = _idle.pop()
    except IndexError:
        tools = _Tools(_FastEncoder())
    out: Attachments | None
    dump, clear_memo, chunks, out = tools
    try:
        if here or in_full or fresh is not None:
            out.here, out.fresh, out.in_full = here, fresh, in_full
        if starting is None:
            dump(obj)
        else:
            out.starting = starting
            with inheritance.playing_popen():
                dump(obj)
    except (MarshalError, ResourceError, MemoryError):
        raise
    except Exception:  # cloudpickle may know how, and raises the same again if not
        out = None
    if out is None:
        cloud = _CloudEncoder(upvalues, in_full)
        cloud.out.fresh = fresh
        cloud.out.here = here
        cloud.out.starting = starting
        with contextlib.nullcontext() if starting is None else inheritance.playing_popen():
            cloud.dump(obj)
        return cloud.out.letter() if here else cloud.out.payload(limit)
    if out.more or len(chunks) != 1 or len(chunks[0]) > limit:
        payload: Payload = out.letter() if here else out.payload(limit)
        out.clear()
    else:
        payload = chunks.pop()
        if here or in_full or fresh is not None:
            out.here, out.fresh, out.in_full = False, None, False
        out.starting = None
    clear_memo()
    _idle.append(tools)
    return payload


def large(pickled: bytes, limit: int) -> bytes | Parcel:
    """The payload with a pickle that is too large for a message. Raises ResourceError."""
    out = Attachments()
    out.chunks.append(pickled)
    return out.payload(limit)


def encode_all(
    objs: Sequence[Any],
    limit: int,
    *,
    upvalues: bool = False,
    root: str = "args",
    here: bool = False,
    starting: list[Any] | None = None,
) -> list[Encoded]:
    """Encode each of ``objs``, all before the first is used.

    Raises MarshalError, with the place of what cannot travel (``args[0]['model'].hook``), or ResourceError.
    """
    payloads = []
    for index, obj in enumerate(objs):
        try:
            payloads.append(encode(obj, limit, upvalues=upvalues, here=here, starting=starting, in_full=upvalues))
        except (ResourceError, MemoryError):
            raise
        except Exception as error:
            raise _located(error, obj, f"{root}[{index}]", limit, upvalues, here, starting)  # noqa: B904 - it has its cause already
    return payloads


def encode_one(
    obj: Any,
    limit: int,
    root: str,
    *,
    upvalues: bool = True,
    fresh: Container[Block] | None = None,
    here: bool = False,
) -> Encoded:
    """Encode ``obj``, as :func:`encode` does.

    Raises MarshalError, which names the place in ``obj`` of what cannot travel, or ResourceError.
    """
    try:
        return encode(obj, limit, upvalues=upvalues, fresh=fresh, here=here)
    except (ResourceError, MemoryError):
        raise
    except Exception as error:
        raise _located(error, obj, root, limit, upvalues, here)  # noqa: B904 - it has its cause already


def encode_result(value: Any, limit: int, root: str, *, here: bool = False) -> Encoded:
    """Encode ``(value, None)``, what a worker sends when its function has returned ``value``.

    Raises MarshalError, which names the place in ``value`` of what cannot travel, or ResourceError.
    """
    try:
        return encode((value, None), limit, here=here)
    except (ResourceError, MemoryError):
        raise
    except Exception as error:
        raise _located(error, value, root, limit, False, here)  # noqa: B904 - it has its cause already


def encode_call(
    function: Any,
    args: Sequence[Any],
    extra: Any,
    limit: int,
    *,
    upvalues: bool = False,
    here: bool = False,
    starting: list[Any] | None = None,
) -> Encoded:
    """Encode ``(function, args, extra)`` as one payload, so that what they share stays shared.

    Raises MarshalError, which names the place (``args[0]['model'].hook``), or ResourceError.
    """
    try:
        return encode(
            (function, tuple(args), extra), limit, upvalues=upvalues, here=here, starting=starting, in_full=True
        )
    except (ResourceError, MemoryError):
        raise
    except Exception as error:
        name = getattr(function, "__name__", None) or type(function).__name__
        what = f"function {name}" if callable(function) else f"the {name}"
        for part, place in ((function, what), *((a, f"args[{i}]") for i, a in enumerate(args))):
            try:
                encode(part, limit, upvalues=upvalues, here=here, starting=starting, in_full=True)
            except Exception as found:
                raise _located(found, part, place, limit, upvalues, here, starting)  # noqa: B904 - it has its cause already
        raise _located(error, extra, "the call", limit, upvalues, here, starting)  # noqa: B904 - it has its cause already


def _located(
    error: Exception, obj: Any, name: str, limit: int, upvalues: bool, here: bool, starting: list[Any] | None = None
) -> MarshalError:
    def failure(candidate: Any) -> Exception | None:
        try:
            encode(candidate, limit, upvalues=upvalues, here=here, starting=starting, in_full=True)
        except Exception as raised:
            return raised
        return None

    place, cause = locate.place_of_failure(obj, name, error, failure)
    located: MarshalError
    if isinstance(cause, ClosureError) and place == name and place.startswith("function "):
        located = ClosureError(str(cause))  # it names the function already
    elif isinstance(cause, MarshalError):
        located = type(cause)(f"{place}: {cause}")
    else:
        located = MarshalError(f"{place} cannot be sent: {type(cause).__name__}: {cause}")
        located.__cause__ = cause
    located.__suppress_context__ = True  # the encoders' own attempts tell a reader nothing
    return located


def copied(obj: Any) -> Any:
    """``obj``'s payload within this process, if it is dicts, lists and tuples of ``ATOMS``: a copy of it, not pickled.

    A tuple of nothing else is its own: it cannot change, and nor can what is in it, so nobody can tell it from a copy.
    None for whatever else, and where pickling would not be dearer, or would keep what is in there twice the same.
    """
    cls = type(obj)
    if cls is not dict and cls is not list and cls is not tuple:
        return None
    try:
        return _copied(obj, set())
    except (TypeError, RecursionError):  # the class of some class cannot be hashed
        return None


def _copied(obj: Any, seen: set[int]) -> Any:
    cls = type(obj)
    copy: Any
    places: Any
    if cls is tuple:
        if only_atoms(map(type, obj)):
            return obj
        copy = list(obj)
        places = enumerate(copy)
    elif cls is list:
        copy = obj.copy()  # before anything is looked at, for other threads may change it
        places = None if only_atoms(map(type, copy)) else enumerate(copy)
    elif cls is dict:
        copy = obj.copy()
        if not only_atoms(map(type, copy)):
            return None
        places = None if only_atoms(map(type, copy.values())) else copy.items()
    else:
        return None
    if id(obj) in seen or len(seen) >= _MOST_COPIED:
        return None
    seen.add(id(obj))
    if places is not None:
        for place, each in places:
            if type(each) not in ATOMS:
                copy[place] = inner = _copied(each, seen)
                if inner is None:
                    return None
    return tuple(copy) if cls is tuple else copy


def received(payload: Encoded) -> tuple[Any, list[int]]:
    """A payload that stays here as its reader gets it, for ``decode``."""
    cls = type(payload)
    if cls is bytes:
        return payload, NO_FDS
    if cls in COPIES or isinstance(payload, Letter):
        return payload, ENCLOSED
    found: tuple[Any, list[int]] = payload.copy()
    return found


def for_others(payload: Encoded, limit: int) -> Encoded:
    """A payload that was encoded to stay here, for other processes. Raises as ``encode`` does."""
    if type(payload) in COPIES:
        return encode(payload, limit)
    if isinstance(payload, Letter):
        return encode_one(payload.copy().open(as_it_is=True), limit, "an object that was written before")
    if isinstance(payload, bytes) and len(payload) > limit:
        return encode(pickle.loads(payload), limit, upvalues=True)
    return payload


def decode(data: Any, fds: list[int]) -> Any:
    """The object in a message, with its trailer if it has one. Takes over ``fds``.

    Raises whatever unpickling it raises; the message is used up either way.
    """
    if type(data) in COPIES:
        return data
    if isinstance(data, Letter):
        return data.open()
    kind = data[KIND]
    if not fds and kind not in (REFERENCES, BLOCK):
        return pickle.loads(data)
    try:
        if kind == REFERENCES:
            obj = plain.decode(data)
            if obj is None:
                obj = _loads(data, arrivals_of(data, size_of_payload(data), fds), fds)
                plain.learn(obj, data)
            return obj
        if kind == BLOCK:
            return _decode_block(data, fds)
        return _loads(data, None, fds)
    finally:
        close_fds(fds)


def _loads(data: bytes | memoryview, arrivals: Arrivals | None, fds: list[int]) -> Any:
    if arrivals is None:
        with reducers.Unpacking(fds, None):
            return pickle.loads(data)
    try:
        with reducers.Unpacking(fds, arrivals):
            return pickle.loads(data, buffers=arrivals.buffers())
    finally:
        arrivals.done()


def _decode_block(data: bytes, fds: list[int]) -> Any:
    block = arrivals_of(data, size_of_payload(data), fds)
    try:
        size, in_bag = HEAD.unpack_from(data)
        memory = block.memory(0)[:size]
        if in_bag:
            sack, fds[0] = fds[0], -1
            fds[:1] = bag.unpack(sack)
        return _loads(memory, arrivals_of(memory, size, fds, behind=1), fds)
    finally:
        block.done()


def discard(data: Any, fds: list[int]) -> None:
    """Throw a message away that nobody will decode: its blocks can be used again. Takes over ``fds``."""
    if type(data) in COPIES or isinstance(data, Letter):
        return
    kind = kind_of(data)
    if kind in (REFERENCES, BLOCK):
        try:
            references = listed(data, size_of_payload(data))
            if kind == BLOCK:
                block = arrivals_of(data, size_of_payload(data), fds)
                try:
                    references = listed(block.memory(0), HEAD.unpack_from(data)[0])
                finally:
                    block.done()
            recycling.note_lost([number for number, _ in references])
        except Exception:
            pass  # then they are believed to be lost after a while
    close_fds(fds)
