"""Encodes objects into messages and decodes them: what the other rooms call.

A scalar, or a tuple of scalars, is pickled at once. ``fast_path`` encodes a tensor, or a flat collection of tensors.
All else goes through one of the two ``encoders``: the second when the first cannot, since cloudpickle may know how.

What the messages look like is in ``wire``.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Container, Sequence
from pickle import dumps
from typing import Any, Final, TypeAlias, overload

from torch import Tensor

from ..errors import ClosureError, MarshalError, ResourceError
from ..memory.block import Block
from ..memory.message import Message
from ..transport import debug
from ..transport.capabilities import SAME_MACHINE, Capabilities
from ..transport.endpoint import NO_FDS
from ..transport.trailer import KIND
from . import fast_path, locate, multiprocessing_objects, wire
from .attachments import Attachments
from .copies import COLLECTIONS, SCALARS, only_scalars
from .encoders import CloudEncoder, FastEncoder
from .local_message import LOCAL_FDS, LocalMessage
from .wire import DECODERS, References

#: Largest payload of a message to a worker: fits into a message of either transport.
CALL_LIMIT: Final = 16 * 1024 - 64
#: What has no size that it must keep to: a message that stays in this process.
UNLIMITED: Final = 1 << 62
#: Text of more characters than this, or more bytes, is not pickled for this process: that would copy it twice.
_LONG: Final = 4096

_take_tensor_apart: Final = fast_path.prepare_tensor
_encode_tensor: Final = References.encode_tensor

Payload = bytes | Message | LocalMessage
#: ``bytes | Message``, or, if it stays here, any ``Payload``, or what ``copies.try_copy`` gives.
Encoded: TypeAlias = Any


class _ReusableEncoder(tuple[Callable[[Any], None], Callable[[], None], list[bytes], Attachments]):
    """What ``encode`` needs of an encoder, looked up once."""

    __slots__ = ()

    def __new__(cls, encoder: FastEncoder) -> _ReusableEncoder:
        return super().__new__(cls, (encoder.dump, encoder.clear_memo, encoder.out.chunks, encoder.out))


#: Encoders for the next calls. One that has failed, or holds something, does not come back.
_idle: list[_ReusableEncoder] = []


@overload
def encode(
    obj: Any,
    limit: int,
    *,
    upvalues: bool = False,
    owned_blocks: Container[Block] | None = None,
    worker_resources: list[Any] | None = None,
    full_definitions: bool = False,
) -> bytes | Message: ...
@overload
def encode(
    obj: Any,
    limit: int,
    *,
    upvalues: bool = False,
    owned_blocks: Container[Block] | None = None,
    peer: Capabilities,
    worker_resources: list[Any] | None = None,
    full_definitions: bool = False,
) -> Payload: ...
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
) -> Payload:
    """Turn ``obj`` into the payload of one message of at most ``limit`` bytes, trailer not counted.

    A message for a ``peer`` in this process may be of any size, and its tensors stay where they are. One for a peer
    that shares no memory has everything in it, whatever its size.

    Functions and classes that came from another process and go by value travel as they came, at little cost; or, with
    ``full_definitions``, as they are now, and under the closure rule.

    A tensor in it is in shared memory afterwards; but if ``owned_blocks`` is given, only those on these blocks go by
    reference, and copies of all others, which stay as they are. If a worker is to begin with the message,
    ``worker_resources`` is a list to which is added what must live as long as that worker; then what processes inherit
    from each other with multiprocessing may be in it (see ``multiprocessing_objects``). Raises whatever pickling it
    raises; :func:`encode_all` turns that into a MarshalError that names the place.
    """
    cls = type(obj)
    here = peer.same_process
    if not peer.shares_memory:
        limit, owned_blocks = UNLIMITED, ()
    if here and (cls is str or cls is bytes) and len(obj) > _LONG:
        return LocalMessage(None, (obj,))
    if cls in SCALARS or (cls is tuple and only_scalars(map(type, obj))):
        bare = dumps(obj, 5)
        return bare if len(bare) <= limit else encode_large_pickle(bare, limit)
    elif cls is Tensor or fast_path.is_candidate(obj):
        found: Payload | None = None
        if here:
            found = fast_path.encode_local(obj) if owned_blocks is None else None
        elif not peer.shares_memory:
            pass
        elif cls is Tensor:
            if (alone := _take_tensor_apart(obj, owned_blocks)) is not None:
                found = _encode_tensor(*alone, limit)
        elif (parts := fast_path.prepare(obj, owned_blocks)) is not None:
            found = References.encode_plain(*parts, limit)
        if found is not None:
            return found
    try:
        tools = _idle.pop()
    except IndexError:
        tools = _ReusableEncoder(FastEncoder())
    out: Attachments | None
    dump, clear_memo, chunks, out = tools
    try:
        if here or full_definitions or owned_blocks is not None:
            out.peer, out.owned_blocks, out.full_definitions = peer, owned_blocks, full_definitions
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
    if out is None:
        cloud = CloudEncoder(upvalues, full_definitions)
        cloud.out.owned_blocks = owned_blocks
        cloud.out.peer = peer
        cloud.out.worker_resources = worker_resources
        with contextlib.nullcontext() if worker_resources is None else multiprocessing_objects.spawning_context():
            cloud.dump(obj)
        return cloud.out.local_message() if here else cloud.out.payload(limit)
    if out.has_attachments or len(chunks) != 1 or len(chunks[0]) > limit:
        payload: Payload = out.local_message() if here else out.payload(limit)
        out.clear()
    else:
        payload = chunks.pop()
        if here or full_definitions or owned_blocks is not None:
            out.peer, out.owned_blocks, out.full_definitions = SAME_MACHINE, None, False
        out.worker_resources = None
    clear_memo()
    _idle.append(tools)
    return payload


def encode_large_pickle(pickled: bytes, limit: int) -> bytes | Message:
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
    peer: Capabilities = SAME_MACHINE,
    worker_resources: list[Any] | None = None,
) -> list[Encoded]:
    """Encode each of ``objs``, all before the first is used.

    Raises MarshalError, with the place of what cannot travel (``args[0]['model'].hook``), or ResourceError.
    """
    payloads = []
    for index, obj in enumerate(objs):
        try:
            payloads.append(
                encode(
                    obj,
                    limit,
                    upvalues=upvalues,
                    peer=peer,
                    worker_resources=worker_resources,
                    full_definitions=upvalues,
                )
            )
        except (ResourceError, MemoryError):
            raise
        except Exception as error:
            raise _located(error, obj, f"{root}[{index}]", limit, upvalues, peer, worker_resources)  # noqa: B904 - it has its cause already
    return payloads


def encode_one(
    obj: Any,
    limit: int,
    root: str,
    *,
    upvalues: bool = True,
    owned_blocks: Container[Block] | None = None,
    peer: Capabilities = SAME_MACHINE,
) -> Encoded:
    """Encode ``obj``, as :func:`encode` does.

    Raises MarshalError, which names the place in ``obj`` of what cannot travel, or ResourceError.
    """
    try:
        return encode(obj, limit, upvalues=upvalues, owned_blocks=owned_blocks, peer=peer)
    except (ResourceError, MemoryError):
        raise
    except Exception as error:
        raise _located(error, obj, root, limit, upvalues, peer)  # noqa: B904 - it has its cause already


def encode_result(value: Any, limit: int, root: str, *, peer: Capabilities = SAME_MACHINE) -> Encoded:
    """Encode ``(value, None)``, what a worker sends when its function has returned ``value``.

    Raises MarshalError, which names the place in ``value`` of what cannot travel, or ResourceError.
    """
    try:
        return encode((value, None), limit, peer=peer)
    except (ResourceError, MemoryError):
        raise
    except Exception as error:
        raise _located(error, value, root, limit, False, peer)  # noqa: B904 - it has its cause already


def encode_call(
    function: Any,
    args: Sequence[Any],
    extra: Any,
    *,
    upvalues: bool = False,
    peer: Capabilities = SAME_MACHINE,
    worker_resources: list[Any] | None = None,
) -> Encoded:
    """Encode ``(function, args, extra)`` as one payload, so that what they share stays shared.

    Raises MarshalError, which names the place (``args[0]['model'].hook``), or ResourceError.
    """
    limit = CALL_LIMIT
    try:
        return encode(
            (function, tuple(args), extra),
            limit,
            upvalues=upvalues,
            peer=peer,
            worker_resources=worker_resources,
            full_definitions=True,
        )
    except (ResourceError, MemoryError):
        raise
    except Exception as error:
        name = getattr(function, "__name__", None) or type(function).__name__
        what = f"function {name}" if callable(function) else f"the {name}"
        for part, place in ((function, what), *((a, f"args[{i}]") for i, a in enumerate(args))):
            try:
                encode(
                    part, limit, upvalues=upvalues, peer=peer, worker_resources=worker_resources, full_definitions=True
                )
            except Exception as found:
                raise _located(found, part, place, limit, upvalues, peer, worker_resources)  # noqa: B904 - it has its cause already
        raise _located(error, extra, "the call", limit, upvalues, peer, worker_resources)  # noqa: B904 - it has its cause already


def _located(
    error: Exception,
    obj: Any,
    name: str,
    limit: int,
    upvalues: bool,
    peer: Capabilities,
    worker_resources: list[Any] | None = None,
) -> MarshalError:
    def failure(candidate: Any) -> Exception | None:
        try:
            encode(
                candidate, limit, upvalues=upvalues, peer=peer, worker_resources=worker_resources, full_definitions=True
            )
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


def deliver_local(payload: Encoded) -> tuple[Any, list[int]]:
    """A payload that stays here as its reader gets it, for ``decode``."""
    cls = type(payload)
    if cls is bytes:
        return payload, NO_FDS
    if cls in COLLECTIONS or isinstance(payload, LocalMessage):
        return payload, LOCAL_FDS
    found: tuple[Any, list[int]] = payload.copy()
    return found


def for_other_processes(payload: Encoded, limit: int) -> Encoded:
    """A payload that was encoded to stay here, for other processes. Raises as ``encode`` does."""
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

    Raises whatever unpickling it raises; the message is used up either way.
    """
    if type(data) is bytes:
        return DECODERS[data[KIND]](data, fds)
    return data.decode() if isinstance(data, LocalMessage) else data


def discard(data: Any, fds: list[int]) -> None:
    """Throw a message away that nobody will decode: its blocks can be used again. Takes over ``fds``."""
    if type(data) is bytes:
        wire.discard(data, fds)
