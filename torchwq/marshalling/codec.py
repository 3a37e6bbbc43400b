"""Encodes objects into messages and decodes messages: the interface of this room.

``encode`` pickles a scalar, or a tuple of scalars, at once. ``fast_path`` encodes a tensor, or a flat collection of
tensors. One of the two ``encoders`` pickles everything else: the second one where the first fails, because cloudpickle
may know how. ``wire`` says what the messages look like.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Container, Sequence
from pickle import dumps
from types import FunctionType
from typing import Any, Final, NamedTuple, TypeAlias

from torch import Tensor

from .. import tracebacks
from ..errors import ClosureError, MarshalError, ResourceError
from ..memory.block import Block
from ..memory.message import Message
from ..transport import debug
from ..transport.capabilities import SAME_MACHINE, Capabilities
from ..transport.endpoint import NO_FDS
from ..transport.trailer import KIND
from . import fast_path, functions, locate, multiprocessing_objects, wire
from .attachments import Attachments
from .copies import COLLECTIONS, SCALARS, only_scalars, try_copy
from .encoders import CloudEncoder, FastEncoder
from .local_message import LOCAL_FDS, LocalMessage
from .value_message import ValueMessage
from .wire import DECODERS, References

#: The largest payload of a message to a worker, in bytes. Each kind of connection takes a message of that size.
CALL_LIMIT: Final = 16 * 1024 - 64
#: The limit of a message that stays in this process, or goes to a peer that shares no memory.
UNLIMITED: Final = 1 << 62
#: A longer str or bytes object is not pickled for a peer in this process: pickling would copy it twice.
_MAX_PICKLED_LOCALLY: Final = 4096

_encode_plain: Final = fast_path.encode_plain
_decode_plain: Final = fast_path.decode_plain
_prepare_tensor: Final = fast_path.prepare_tensor
_encode_tensor: Final = References.encode_tensor

Payload = bytes | Message | LocalMessage | ValueMessage
#: ``bytes | Message``; for a peer in this process any ``Payload``, or a collection that ``copies.try_copy`` has made.
Encoded: TypeAlias = Any


class _ReusableEncoder(NamedTuple):
    """The parts of a ``FastEncoder`` that ``encode`` needs, looked up once."""

    dump: Callable[[Any], None]
    clear_memo: Callable[[], None]
    chunks: list[bytes]
    out: Attachments


#: Encoders for the next calls. An encoder that has failed does not come back.
_idle: list[_ReusableEncoder] = []


@debug.runs_user_code
def encode(
    obj: Any,
    limit: int,
    *,
    upvalues: bool = False,
    owned_blocks: Container[Block] | None = None,
    peer: Capabilities = SAME_MACHINE,
    worker_resources: list[Any] | None = None,
    full_definitions: bool = False,
    tried_plain: bool = False,
) -> Encoded:
    """Turn ``obj`` into the payload of one message. Afterwards its tensors are in shared memory.

    Raises whatever pickling raises; :func:`encode_all` and the functions after it raise a MarshalError instead.

    Args:
        limit: how many bytes the payload may have, without the trailer. A larger one goes into a block. A message for a
            peer in this process, or for one that shares no memory, may have any size.
        upvalues: whether functions may drag data along.
        owned_blocks: if given, only tensors on these blocks go by reference. All others are copied, and stay private.
            For a peer that shares no memory, those on these blocks are copied when the message is sent, and all others
            at once; if not given, all are copied when the message is sent, which the caller does at once.
        peer: what the receiver is capable of.
        worker_resources: given if a worker begins with this message. The encoder adds to it what must live as long as
            that worker, and the message may contain ``multiprocessing_objects`` that processes inherit.
        full_definitions: whether functions and classes that came from another process travel as they are now, and under
            the closure rule; else they travel as they came, which costs little.
        tried_plain: whether the caller has tried ``fast_path.encode_plain``, which would look at ``obj`` again.
    """
    cls = type(obj)
    local = peer.same_process
    stable_blocks = None
    if not peer.shares_memory:
        limit, owned_blocks, stable_blocks = UNLIMITED, (), owned_blocks
    if local and (cls is str or cls is bytes) and len(obj) > _MAX_PICKLED_LOCALLY:
        return LocalMessage(None, (obj,))
    found: Payload | bytes | None = None
    if _encode_plain is not None and not tried_plain and owned_blocks is None and peer.shares_memory and not local:
        found = _encode_plain(obj, limit)
        if found is not None:
            return found
    if cls in SCALARS or (cls is tuple and only_scalars(map(type, obj))):
        bare = dumps(obj, 5)
        return bare if len(bare) <= limit else encode_large_pickle(bare, limit)
    elif cls is Tensor or fast_path.is_candidate(obj):
        if local:
            found = fast_path.encode_local(obj) if owned_blocks is None else None
        elif not peer.shares_memory:
            pass
        elif cls is Tensor:
            if (alone := _prepare_tensor(obj, owned_blocks)) is not None:
                found = _encode_tensor(*alone, limit)
        elif (parts := fast_path.prepare(obj, owned_blocks)) is not None:
            found = References.encode_plain(*parts, limit)
        if found is not None:
            return found
    try:
        encoder = _idle.pop()
    except IndexError:
        fast = FastEncoder()
        encoder = _ReusableEncoder(fast.dump, fast.clear_memo, fast.out.chunks, fast.out)
    out: Attachments | None
    dump, clear_memo, chunks, out = encoder
    try:
        if local or full_definitions or owned_blocks is not None:
            out.peer, out.owned_blocks, out.full_definitions = peer, owned_blocks, full_definitions
            out.stable_blocks = stable_blocks
        if worker_resources is None:
            dump(obj)
        else:
            out.worker_resources = worker_resources
            with multiprocessing_objects.spawning_context():
                dump(obj)
    except (MarshalError, ResourceError, MemoryError):
        raise
    except Exception:  # cloudpickle may know how, and raises the same again if not
        out = None
    if out is None:  # outside of the handler, so that the second error has no context
        cloud = CloudEncoder(upvalues, full_definitions)
        out = cloud.out
        out.peer, out.owned_blocks, out.worker_resources = peer, owned_blocks, worker_resources
        out.stable_blocks = stable_blocks
        with contextlib.nullcontext() if worker_resources is None else multiprocessing_objects.spawning_context():
            cloud.dump(obj)
        return out.payload(limit)
    if out.has_attachments or len(chunks) != 1 or len(chunks[0]) > limit:
        payload: Payload = out.payload(limit)
        out.clear()
    else:
        payload = chunks.pop()
        if local or full_definitions or owned_blocks is not None:
            out.peer, out.owned_blocks, out.full_definitions = SAME_MACHINE, None, False
            out.stable_blocks = None
        out.worker_resources = None
    clear_memo()
    _idle.append(encoder)
    return payload


def encode_large_pickle(pickled: bytes, limit: int) -> bytes | Message:
    """The payload of a pickle that is larger than ``limit`` bytes. Raises ResourceError."""
    out = Attachments()
    out.chunks.append(pickled)
    return out.shared_message(limit)


def encode_all(
    objs: Sequence[Any],
    limit: int,
    *,
    upvalues: bool = False,
    root: str = "args",
    peer: Capabilities = SAME_MACHINE,
    worker_resources: list[Any] | None = None,
) -> list[Encoded]:
    """Encode each of ``objs``, all before the caller sends the first.

    Raises MarshalError, which names the place of what cannot travel (``args[0]['model'].hook``), or ResourceError.
    """
    payloads = []
    for index, obj in enumerate(objs):
        try:
            payload = encode(
                obj, limit, upvalues=upvalues, peer=peer, worker_resources=worker_resources, full_definitions=upvalues
            )
        except Exception as error:
            options = {"upvalues": upvalues, "peer": peer, "worker_resources": worker_resources}
            raise _located(error, obj, f"{root}[{index}]", limit, **options)  # noqa: B904
        payloads.append(payload)
    return payloads


def encode_one(
    obj: Any,
    limit: int,
    root: str,
    *,
    upvalues: bool = True,
    owned_blocks: Container[Block] | None = None,
    peer: Capabilities = SAME_MACHINE,
    worker_resources: list[Any] | None = None,
    full_definitions: bool = False,
) -> Encoded:
    """Encode ``obj``; raises as :func:`encode_all` does. ``root`` is the name of ``obj`` in the error's text."""
    try:
        return encode(
            obj,
            limit,
            upvalues=upvalues,
            owned_blocks=owned_blocks,
            peer=peer,
            worker_resources=worker_resources,
            full_definitions=full_definitions,
        )
    except Exception as error:
        options = {"upvalues": upvalues, "peer": peer, "worker_resources": worker_resources}
        raise _located(error, obj, root, limit, **options)  # noqa: B904


def encode_result(value: Any, limit: int, root: str, *, peer: Capabilities = SAME_MACHINE) -> Encoded:
    """Encode ``(value, None)``: a worker sends it when its function has returned ``value``. See :func:`encode_one`."""
    if peer.same_process and (copy := try_copy((value, None))) is not None:
        return copy
    try:
        return encode((value, None), limit, peer=peer)
    except Exception as error:
        raise _located(error, value, root, limit, peer=peer)  # noqa: B904


def encode_call(
    function: Any,
    args: Sequence[Any],
    extra: Any,
    *,
    upvalues: bool = False,
    peer: Capabilities = SAME_MACHINE,
    worker_resources: list[Any] | None = None,
    is_sent_later: bool = False,
) -> Encoded:
    """Encode ``(function, args, extra)`` as one payload, so that objects which occur in several stay one object.

    ``is_sent_later`` says that the caller may change the arguments before the payload is sent. Raises as
    :func:`encode_all` does.
    """
    if peer.same_process and worker_resources is None and (copy := _try_copy_call(function, args, extra)) is not None:
        return copy
    options: dict[str, Any] = {"upvalues": upvalues, "peer": peer, "worker_resources": worker_resources}
    if is_sent_later and not peer.shares_memory:
        options["owned_blocks"] = ()
    try:
        return encode((function, tuple(args), extra), CALL_LIMIT, full_definitions=True, **options)
    except (ResourceError, MemoryError):
        raise
    except Exception as error:
        name = getattr(function, "__name__", None) or type(function).__name__
        root = f"function {name}" if callable(function) else f"the {name}"
        for part, place in ((function, root), *((a, f"args[{i}]") for i, a in enumerate(args))):
            try:
                encode(part, CALL_LIMIT, full_definitions=True, **options)
            except Exception as found:
                raise _located(found, part, place, CALL_LIMIT, **options)  # noqa: B904
        raise _located(error, extra, "the call", CALL_LIMIT, **options)  # noqa: B904


def _try_copy_call(function: Any, args: Sequence[Any], extra: Any) -> Any:
    """The call itself, with a copy of its arguments as ``try_copy`` makes it; None if pickling must do it.

    Pickling would send the function's name, and find the same function by it.
    """
    if type(function) is not FunctionType:
        return None
    try:
        if not functions.goes_by_name(function):
            return None
    except Exception:  # of a class of the user that has the function; pickling fails, too
        return None
    if extra is None:
        copy = try_copy(tuple(args))
        return None if copy is None else (function, copy, None)
    copies = try_copy((tuple(args), extra))
    return None if copies is None else (function, *copies)


def _located(error: Exception, obj: Any, root: str, limit: int, **options: Any) -> Exception:
    """A MarshalError with the place in ``obj`` of what cannot travel; ``error`` itself if resources ran out.

    It has its cause, and no variable of the caller's may have it: its traceback keeps the caller's frame.
    """
    if isinstance(error, (ResourceError, MemoryError)):
        return tracebacks.trim(error)

    def failure(candidate: Any) -> Exception | None:
        try:
            encode(candidate, limit, full_definitions=True, **options)
        except Exception as raised:
            tracebacks.detach(raised, error)
            return raised
        return None

    place, cause = locate.place_of_failure(obj, root, error, failure)
    if isinstance(cause, ClosureError) and place == root and place.startswith("function "):
        found: Exception = ClosureError(str(cause))  # its text names the function
    elif isinstance(cause, MarshalError):
        found = type(cause)(f"{place}: {cause}")
    else:
        found = MarshalError(f"{place} cannot be sent: {type(cause).__name__}: {cause}")
        found.__cause__ = tracebacks.trim(cause)
    found.__suppress_context__ = True
    return found


def deliver_local(payload: Encoded) -> tuple[Any, list[int]]:
    """A payload for a peer in this process, in the form in which ``decode`` takes it."""
    cls = type(payload)
    if cls is bytes:
        return payload, NO_FDS
    if cls in COLLECTIONS or isinstance(payload, LocalMessage):
        return payload, LOCAL_FDS
    if isinstance(payload, ValueMessage):
        return payload, NO_FDS
    found: tuple[Any, list[int]] = payload.copy()
    return found


def for_other_processes(payload: Encoded, limit: int) -> Encoded:
    """Encode a payload again that was for a peer in this process. Raises as ``encode`` does."""
    if type(payload) in COLLECTIONS:
        return encode(payload, limit)
    if isinstance(payload, LocalMessage):
        return encode_one(payload.copy().decode(original_tensors=True), limit, "an object that was written before")
    if isinstance(payload, bytes) and len(payload) > limit:
        return encode(pickle.loads(payload), limit, upvalues=True)
    return payload


@debug.runs_user_code
def decode(data: Any, fds: list[int]) -> Any:
    """The object in a message. Takes over ``fds``.

    Raises whatever unpickling raises; no message can be decoded twice.
    """
    if type(data) is bytes and _decode_plain is not None and (obj := _decode_plain(data, fds)) is not NotImplemented:
        return obj
    return decode_any(data, fds)


def decode_any(data: Any, fds: list[int]) -> Any:
    """The same, where ``fast_path.decode_plain`` has left the message to its twin."""
    if type(data) is bytes:
        return DECODERS[data[KIND]](data, fds)
    return data.decode() if isinstance(data, (LocalMessage, ValueMessage)) else data


def discard(data: Any, fds: list[int]) -> None:
    """Free what a message holds that nobody will decode. Takes over ``fds``."""
    if type(data) is bytes:
        wire.discard(data, fds)
