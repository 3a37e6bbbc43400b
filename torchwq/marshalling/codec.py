"""Encodes objects into messages and decodes them.

Two encoders, because the common case must be fast. The first is C pickle with one hook, which is called only for
objects that are not plain containers and scalars. It hands over to the second, cloudpickle's, when it meets a
function or class that has to travel by value, or anything that pickle cannot do.

Large ``bytes`` reach the output as they are, without a copy: the pickler writes them straight to its file, which
here is a list. numpy arrays leave out of band (protocol 5). What is too large for a message goes into one shared
block, from which the reader's arrays are mapped copy-on-write.
"""

from __future__ import annotations

import pickle
import struct
import types
from collections.abc import Callable, Sequence
from typing import Any, Final

import cloudpickle

from ..errors import ClosureError, MarshalError, ResourceError
from ..memory import blocks
from ..memory.parcel import BLOCK, TRAILER, Parcel
from ..transport import bag
from ..transport.endpoint import MAX_FDS
from ..transport.sockets import close_fds
from . import functions, locate, reducers, tensors  # noqa: F401 - tensors registers its reducers

#: Largest payload of a message to a worker: fits into a message of either transport.
CALL_LIMIT: Final = 16 * 1024 - 64
#: Buffers from this size on leave the pickle and are mapped by the reader instead of copied.
OUT_OF_BAND: Final = 32 * 1024
#: Where in the block the table of its groups is, how many there are, whether the descriptors are in a bag.
_HEAD: Final = struct.Struct("=QI?")
_SPAN: Final = struct.Struct("=QQ")


class _NeedsCloud(Exception):
    """The object holds something that travels by value and only cloudpickle can take apart."""


class _Sink:
    """A file for a pickler that collects what is written, without copying it."""

    __slots__ = ("write",)

    def __init__(self, write: Callable[[Any], None]) -> None:
        self.write = write


class _Attachments:
    """What both encoders collect beside the pickle itself."""

    def __init__(self) -> None:
        self.chunks: list[bytes] = []
        self.buffers: list[memoryview] = []
        self.fds: list[int] = []
        self.keep: list[Any] = []
        #: Whether there is anything beside the pickle.
        self.more = False

    def attach(self, fd: int, owner: Any) -> int:
        self.more = True
        self.fds.append(fd)
        self.keep.append(owner)
        return len(self.fds) - 1

    def take_buffer(self, buffer: pickle.PickleBuffer) -> bool:
        """pickle's ``buffer_callback``: True leaves the buffer in the pickle."""
        raw = buffer.raw()
        if raw.nbytes < OUT_OF_BAND:
            return True
        self.more = True
        self.buffers.append(raw)
        return False

    def payload(self, limit: int) -> bytes | Parcel:
        """What was collected, as one payload of at most ``limit`` bytes."""
        size = sum(map(len, self.chunks))
        small = size <= limit and not self.buffers
        if small and not self.fds:
            return b"".join(self.chunks)
        in_bag = len(self.fds) > MAX_FDS - 4
        if in_bag:
            sack = bag.pack(self.fds)
            self.fds, self.keep = [sack.fileno()], [sack]
        if small and not in_bag:
            return Parcel(b"".join(self.chunks), self.fds, self.keep)
        spans = blocks.layout([size, *(buffer.nbytes for buffer in self.buffers), 0])
        table = b"".join(_SPAN.pack(*span) for span in spans[:-1])
        fd = blocks.fill([self.chunks, *([buffer] for buffer in self.buffers), [table]])
        self.attach(fd, blocks.Descriptor(fd))
        return Parcel(_HEAD.pack(spans[-1][0], len(spans) - 1, in_bag), self.fds, self.keep, BLOCK)


class _FastEncoder(pickle.Pickler):
    """C pickle. Used again and again: making a pickler costs more than pickling a small object.

    What it collects is an object of its own, which does not refer back: a cycle would keep descriptors and tensors
    alive until the collector comes by.
    """

    def __init__(self) -> None:
        self.out = out = _Attachments()
        super().__init__(_Sink(out.chunks.append), 5, buffer_callback=out.take_buffer)

    def reducer_override(self, obj: Any) -> Any:
        cls = type(obj)
        reducer = reducers.lookup(cls)
        if reducer is not None:
            return reducer(self.out, obj)
        if (cls is types.FunctionType or isinstance(obj, type)) and not functions.goes_by_name(obj):
            raise _NeedsCloud
        return NotImplemented


class _CloudEncoder(cloudpickle.Pickler):  # type: ignore[misc]
    """cloudpickle, with the closure rule in front of it."""

    def __init__(self, upvalues: bool) -> None:
        self.out = out = _Attachments()
        super().__init__(_Sink(out.chunks.append), 5, buffer_callback=out.take_buffer)
        self._upvalues = upvalues

    def reducer_override(self, obj: Any) -> Any:
        reducer = reducers.lookup(type(obj))
        if reducer is not None:
            return reducer(self.out, obj)
        if type(obj) is types.FunctionType:
            return NotImplemented if functions.goes_by_name(obj) else self._reduce_function(obj)
        return super().reducer_override(obj)

    def _reduce_function(self, function: types.FunctionType) -> Any:
        if not self._upvalues:
            functions.check(function)
        make, args, state, *rest = self._dynamic_function_reduce(function)
        slots = state[1]
        module = functions.own_module(function)
        if module is not None:
            args = (args[0], _ModuleGlobals(module), *args[2:])
            slots["__globals__"] = {}
        else:
            slots["__globals__"] = functions.used_globals(function, upvalues=self._upvalues)
        return make, args, state, *rest


class _ModuleGlobals:
    """Stands for the globals of a module, and becomes them on the other side."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __reduce__(self) -> Any:
        return functions.module_globals, (self._name,)


class _Tools(tuple[Callable[[Any], None], Callable[[], None], list[bytes], _Attachments]):
    """What ``encode`` needs of an encoder, looked up once."""

    __slots__ = ()

    def __new__(cls, encoder: _FastEncoder) -> _Tools:
        return super().__new__(cls, (encoder.dump, encoder.clear_memo, encoder.out.chunks, encoder.out))


#: Encoders for the next calls. One that has failed, or holds something, does not come back.
_idle: list[_Tools] = []


def encode(obj: Any, limit: int, *, upvalues: bool = False) -> bytes | Parcel:
    """Turn ``obj`` into the payload of one message of at most ``limit`` bytes, trailer not counted.

    A tensor in it is in shared memory afterwards. Raises whatever pickling it raises; :func:`encode_all` turns that
    into a MarshalError that names the place.
    """
    try:
        tools = _idle.pop()
    except IndexError:
        tools = _Tools(_FastEncoder())
    out: _Attachments | None
    dump, clear_memo, chunks, out = tools
    try:
        dump(obj)
    except (MarshalError, ResourceError, MemoryError):
        raise
    except Exception:  # cloudpickle may know how, and raises the same again if not
        out = None
    if out is None:
        cloud = _CloudEncoder(upvalues)
        cloud.dump(obj)
        return cloud.out.payload(limit)
    if out.more or len(chunks) != 1 or len(chunks[0]) > limit:
        return out.payload(limit)
    clear_memo()
    _idle.append(tools)
    return chunks.pop()


def encode_all(objs: Sequence[Any], limit: int, *, upvalues: bool = False, root: str = "args") -> list[bytes | Parcel]:
    """Encode each of ``objs``, all before the first is used.

    Raises MarshalError, with the place of what cannot travel (``args[0]['model'].hook``), or ResourceError.
    """
    payloads = []
    for index, obj in enumerate(objs):
        try:
            payloads.append(encode(obj, limit, upvalues=upvalues))
        except (ResourceError, MemoryError):
            raise
        except Exception as error:
            raise _located(error, obj, f"{root}[{index}]", limit, upvalues)  # noqa: B904 - it has its cause already
    return payloads


def encode_result(value: Any, limit: int, root: str) -> bytes | Parcel:
    """Encode ``(value, None)``, what a worker sends when its function has returned ``value``.

    Raises MarshalError, which names the place in ``value`` of what cannot travel, or ResourceError.
    """
    try:
        return encode((value, None), limit)
    except (ResourceError, MemoryError):
        raise
    except Exception as error:
        raise _located(error, value, root, limit, False)  # noqa: B904 - it has its cause already


def encode_call(
    function: Any, args: Sequence[Any], extra: Any, limit: int, *, upvalues: bool = False
) -> bytes | Parcel:
    """Encode ``(function, args, extra)`` as one payload, so that what they share stays shared.

    Raises MarshalError, which names the place (``args[0]['model'].hook``), or ResourceError.
    """
    try:
        return encode((function, tuple(args), extra), limit, upvalues=upvalues)
    except (ResourceError, MemoryError):
        raise
    except Exception as error:
        name = getattr(function, "__name__", None) or type(function).__name__
        what = f"function {name}" if callable(function) else f"the {name}"
        for part, place in ((function, what), *((a, f"args[{i}]") for i, a in enumerate(args))):
            try:
                encode(part, limit, upvalues=upvalues)
            except Exception as found:
                raise _located(found, part, place, limit, upvalues)  # noqa: B904 - it has its cause already
        raise _located(error, extra, "the call", limit, upvalues)  # noqa: B904 - it has its cause already


def _located(error: Exception, obj: Any, name: str, limit: int, upvalues: bool) -> MarshalError:
    def failure(candidate: Any) -> Exception | None:
        try:
            encode(candidate, limit, upvalues=upvalues)
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


def decode(data: bytes, fds: list[int]) -> Any:
    """The object in a message, with its trailer if it has one. Takes over ``fds``.

    Raises whatever unpickling it raises; the message is used up either way.
    """
    if not fds and data[-1] != BLOCK:
        return pickle.loads(data)
    try:
        if data[-1] != BLOCK:
            with reducers.Unpacking(fds):
                return pickle.loads(data)
        return _decode_block(data[:-TRAILER], fds)
    finally:
        discard(fds)


def _decode_block(head: bytes, fds: list[int]) -> Any:
    table, count, in_bag = _HEAD.unpack(head)
    block = blocks.map_private(fds[-1])
    spans = [_SPAN.unpack_from(block, table + index * _SPAN.size) for index in range(count)]
    groups = [block[offset : offset + nbytes] for offset, nbytes in spans]
    if in_bag:
        sack, fds[0] = fds[0], -1
        fds[:1] = bag.unpack(sack)
    with reducers.Unpacking(fds):
        return pickle.loads(groups[0], buffers=groups[1:])


def discard(fds: list[int]) -> None:
    """Close the descriptors of a message that nobody will decode."""
    close_fds([fd for fd in fds if fd >= 0])
    fds.clear()
