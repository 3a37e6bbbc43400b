"""Encodes objects into messages and decodes them.

Two encoders, because the common case must be fast. The first is C pickle with one hook, which is called only for
objects that are not plain containers and scalars. It hands over to the second, cloudpickle's, when it meets a
function or class that has to travel by value, or anything that pickle cannot do.

Large ``bytes`` reach the output as they are, without a copy: the pickler writes them straight to its file, which
here is a list. Large numpy arrays leave out of band (protocol 5): each goes into a shared block, which the reader maps
copy-on-write. A pickle that is too large for a message goes into a block, too.

A message that refers to blocks ends with a list of them, before its trailer: number and size of each, and how many
there are. Their descriptors are the message's last ones, in the same order. A large pickle's message refers to the
block that the pickle is in, and all that has just been said of the message is said in there.
"""

from __future__ import annotations

import pickle
import struct
import types
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any, Final

import cloudpickle
import torch

from ..errors import ClosureError, MarshalError, ResourceError
from ..memory import anonymous, content, pool, recycling
from ..memory.arrivals import Arrivals
from ..memory.block import Block
from ..memory.content import Buffer
from ..memory.ledger import UNTRACKED
from ..memory.parcel import BLOCK, REFERENCES, TRAILER, Parcel
from ..transport import bag
from ..transport.endpoint import MAX_FDS
from ..transport.sockets import close_fds
from . import functions, locate, plain, reducers

#: Largest payload of a message to a worker: fits into a message of either transport.
CALL_LIMIT: Final = 16 * 1024 - 64
#: Buffers from this size on leave the pickle and are mapped by the reader instead of copied.
OUT_OF_BAND: Final = 32 * 1024
#: How long in its block the pickle is with the list of references behind it, and whether the descriptors are in a bag.
_HEAD: Final = struct.Struct("=Q?")
#: What may take the shortest way.
_PLAIN: Final = frozenset({torch.Tensor, dict, list, tuple})
#: Number and bytes of a block that a message refers to, and how many of these there are.
_REFERENCE: Final = struct.Struct("=QQ")
#: Set in the bytes of a block that is one of the pickle's buffers.
_BUFFER: Final = 1 << 63
_COUNT: Final = struct.Struct("=I")


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
        self.chunks: list[Any] = []
        self.fds: list[int] = []
        self.keep: list[Any] = []
        #: With their places in the message's list.
        self.blocks: dict[Block | Buffer, int] = {}
        #: Whether there is anything beside the pickle.
        self.more = False
        self.fresh: Container[Block] | None = None

    def clear(self) -> None:
        """Let go of everything; what has left in a payload is the payload's."""
        self.chunks.clear()
        self.fds, self.keep, self.blocks = [], [], {}
        self.more = False
        self.fresh = None

    def attach(self, fd: int, owner: Any) -> int:
        self.more = True
        self.fds.append(fd)
        self.keep.append(owner)
        return len(self.fds) - 1

    def refer(self, block: Block, storage: Any) -> int:
        index = self.blocks.get(block)
        if index is None:
            self.more = True
            if block.number == UNTRACKED:
                recycling.prepare_to_send(block)
            self.blocks[block] = index = len(self.blocks)
            self.keep.append(storage)
        return index

    def take_buffer(self, buffer: pickle.PickleBuffer) -> bool:
        """pickle's ``buffer_callback``: True leaves the buffer in the pickle."""
        raw = buffer.raw()
        if raw.nbytes < OUT_OF_BAND:
            return True
        found = content.block_with([raw], raw.nbytes)
        if found is None:
            return True
        block, storage = found
        self.more = True
        # A buffer of its own, also if a block has the content of two.
        self.blocks[Buffer(block)] = len(self.blocks)
        self.keep.append(storage)
        return False

    def payload(self, limit: int) -> bytes | Parcel:
        """What was collected, as one payload of at most ``limit`` bytes."""
        blocks = self.blocks
        fds = self.fds + [block.fd for block in blocks]
        in_bag = len(fds) > MAX_FDS - 4
        # A large buffer that had to stay in the pickle was written to it as it is.
        chunks = [chunk if isinstance(chunk, bytes) else memoryview(chunk).cast("B") for chunk in self.chunks]
        size = sum(map(len, chunks))
        if size + len(blocks) * _REFERENCE.size + _COUNT.size > limit or in_bag:
            return self._large_payload(chunks, fds, in_bag)
        if not blocks:
            pickled = b"".join(chunks)
            return Parcel(pickled, fds, self.keep) if fds else pickled
        data = b"".join((*chunks, *_references(blocks)))
        parcel = Parcel(data, fds, self.keep, REFERENCES, [block.number for block in blocks], not self.fds)
        parcel.nbytes += sum(block.nbytes for block in blocks)
        return parcel

    def _large_payload(self, pickled: list[bytes | memoryview], fds: list[int], in_bag: bool) -> Parcel:
        numbers = [block.number for block in self.blocks]
        chunks = [*pickled, *_references(self.blocks)]
        size = sum(map(len, chunks))
        if in_bag:
            sack = bag.pack(fds)
            fds, self.keep = [sack.fileno()], [*self.keep, sack]
        found = content.block_with(chunks, pool.capacity_for(size))
        if found is None:  # one descriptor, which is closed again as soon as the message has left, must be had
            fd, number, nbytes = anonymous.fill(chunks), UNTRACKED, size
            self.keep.append(anonymous.Descriptor(fd))
        else:
            block, storage = found
            fd, number, nbytes = block.fd, block.number, block.nbytes
            self.keep.append(storage)
        head = _HEAD.pack(size, in_bag) + _REFERENCE.pack(number, nbytes) + _COUNT.pack(1)
        parcel = Parcel(head, [*fds, fd], self.keep, BLOCK, [*numbers, number], not (self.fds or in_bag))
        parcel.nbytes += size + sum(block.nbytes for block in self.blocks)
        return parcel


def _references(blocks: Iterable[Block | Buffer]) -> list[bytes]:
    parts = [_REFERENCE.pack(each.number, each.nbytes | _BUFFER * isinstance(each, Buffer)) for each in blocks]
    return [*parts, _COUNT.pack(len(parts))]


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
        by_name = obj in reducers.rebuilders if cls is types.FunctionType else not isinstance(obj, type)
        if not by_name and not functions.goes_by_name(obj):
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
            return (
                NotImplemented
                if obj in reducers.rebuilders or functions.goes_by_name(obj)
                else self._reduce_function(obj)
            )
        if type(obj) is types.CodeType:
            _, args = self.dispatch_table[types.CodeType](obj)
            return functions.code_of_file, (obj.co_filename, args)
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


def encode(obj: Any, limit: int, *, upvalues: bool = False, fresh: Container[Block] | None = None) -> bytes | Parcel:
    """Turn ``obj`` into the payload of one message of at most ``limit`` bytes, trailer not counted.

    A tensor in it is in shared memory afterwards; but if ``fresh`` is given, only those on these blocks go by
    reference, and copies of all others, which stay as they are. Raises whatever pickling it raises; :func:`encode_all`
    turns that into a MarshalError that names the place.
    """
    if type(obj) in _PLAIN:
        parcel = plain.encode(obj, limit, fresh)
        if parcel is not None:
            return parcel
    try:
        tools = _idle.pop()
    except IndexError:
        tools = _Tools(_FastEncoder())
    out: _Attachments | None
    dump, clear_memo, chunks, out = tools
    try:
        out.fresh = fresh
        dump(obj)
    except (MarshalError, ResourceError, MemoryError):
        raise
    except Exception:  # cloudpickle may know how, and raises the same again if not
        out = None
    if out is None:
        cloud = _CloudEncoder(upvalues)
        cloud.out.fresh = fresh
        cloud.dump(obj)
        return cloud.out.payload(limit)
    if out.more or len(chunks) != 1 or len(chunks[0]) > limit:
        payload: bytes | Parcel = out.payload(limit)
        out.clear()
    else:
        payload = chunks.pop()
    clear_memo()
    _idle.append(tools)
    return payload


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


def encode_one(obj: Any, limit: int, root: str, *, fresh: Container[Block] | None = None) -> bytes | Parcel:
    """Encode ``obj``; functions in it may be closures. ``fresh`` as for :func:`encode`.

    Raises MarshalError, which names the place in ``obj`` of what cannot travel, or ResourceError.
    """
    try:
        return encode(obj, limit, upvalues=True, fresh=fresh)
    except (ResourceError, MemoryError):
        raise
    except Exception as error:
        raise _located(error, obj, root, limit, True)  # noqa: B904 - it has its cause already


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
    kind = data[-1]
    if not fds and kind not in (REFERENCES, BLOCK):
        return pickle.loads(data)
    try:
        if kind == REFERENCES:
            obj = plain.decode(data)
            if obj is None:
                obj = _loads(data, _arrivals(data, len(data) - TRAILER, fds), fds)
                plain.learn(obj)
            return obj
        if kind == BLOCK:
            return _decode_block(data, fds)
        return _loads(data, None, fds)
    finally:
        close_fds(fds)


def _arrivals(data: bytes | memoryview, end: int, fds: list[int]) -> Arrivals:
    """Take out the blocks that are listed in what ends at ``end``."""
    references = _listed(data, end)
    buffers = [index for index, (_, nbytes) in enumerate(references) if nbytes & _BUFFER]
    if buffers:
        references = [(number, nbytes & ~_BUFFER) for number, nbytes in references]
    return Arrivals(references, fds and fds[len(fds) - len(references) :], buffers)


def _listed(data: bytes | memoryview, end: int) -> list[tuple[int, int]]:
    (count,) = _COUNT.unpack_from(data, end - _COUNT.size)
    start = end - _COUNT.size - count * _REFERENCE.size
    if count == 1:
        return [_REFERENCE.unpack_from(data, start)]
    return list(_REFERENCE.iter_unpack(data[start : start + count * _REFERENCE.size]))


def _loads(data: bytes | memoryview, arrivals: Arrivals | None, fds: list[int]) -> Any:
    if arrivals is None:
        with reducers.Unpacking(fds, None):
            return pickle.loads(data)
    try:
        with reducers.Unpacking(fds, arrivals):
            return pickle.loads(data, buffers=map(arrivals.private_memory, arrivals.buffers))
    finally:
        arrivals.done()


def _decode_block(data: bytes, fds: list[int]) -> Any:
    block = _arrivals(data, len(data) - TRAILER, fds)
    try:
        size, in_bag = _HEAD.unpack_from(data)
        memory = block.memory(0)[:size]
        if in_bag:
            sack, fds[0] = fds[0], -1
            fds[:1] = bag.unpack(sack)
        return _loads(memory, _arrivals(memory, size, fds[:-1]), fds)
    finally:
        block.done()


def discard(data: bytes, fds: list[int]) -> None:
    """Throw a message away that nobody will decode: its blocks can be used again. Takes over ``fds``."""
    if data[-1] in (REFERENCES, BLOCK):
        try:
            references = _listed(data, len(data) - TRAILER)
            if data[-1] == BLOCK:
                block = _arrivals(data, len(data) - TRAILER, fds)
                try:
                    references = _listed(block.memory(0), _HEAD.unpack_from(data)[0])
                finally:
                    block.done()
            recycling.note_lost([number for number, _ in references])
        except Exception:
            pass  # then they are believed to be lost after a while
    close_fds(fds)
