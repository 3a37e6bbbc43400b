"""``torchwq.marshal``: an object marshalled once, to be read many times.

It is a local message, of which each reading decodes a copy. When it travels in another message, its objects travel as
always: tensors by reference.
"""

from __future__ import annotations

from typing import Any, final

import numpy as np

from .marshalling import codec, reducers
from .marshalling.fast_path import LocalTensors
from .marshalling.local_message import LocalMessage
from .transport.capabilities import SAME_PROCESS


@final
class Marshalled:
    """An object that was marshalled by :func:`torchwq.marshal`. Can be sent as any other object can.

    Source: what torch-ipc's ``ipc.marshal`` returns.
    """

    __slots__ = ("_message",)

    def __init__(self, message: LocalMessage) -> None:
        self._message = message

    def read(self) -> Any:
        """The object. Values are a new copy each time; tensors share the memory of those that were marshalled.

        Raises whatever unpickling the object raises.

        Source: torch-ipc's ``read`` of a marshalled object.
        """
        return self._message.copy().decode()

    @property
    def nbytes(self) -> int:
        """Its size in bytes, without the tensors."""
        return len(self._message.data or b"") + sum(map(len, self._message.buffers))

    def __repr__(self) -> str:
        return f"<torchwq.Marshalled, {self.nbytes} bytes, {len(self._message.objects)} tensors and handles>"

    def __reduce__(self) -> Any:
        raise TypeError("what torchwq.marshal has made can only be sent by torchwq, in a message or as an argument")


def marshal(obj: Any, upvalues: bool = False) -> Marshalled:
    """Marshal an object now, to be read as often as you like, in this process and in any worker that gets it.

    Pays for an object that is sent to many workers, or restored again and again: pickling it is done once.

    Args:
        obj: any object that a queue's ``write`` takes.
        upvalues: whether functions in it may be closures, as with ``writeup``.

    Returns:
        A :class:`Marshalled`; its ``read()`` gives the object.

    Raises:
        MarshalError: something in the object cannot travel; the message names its place.
        ClosureError: a function in it captures data, and ``upvalues`` is False.

    Source: torch-ipc's ``ipc.marshal``.
    """
    payload = codec.encode_one(obj, codec.UNLIMITED, "obj", upvalues=upvalues, peer=SAME_PROCESS)
    return Marshalled(payload if isinstance(payload, LocalMessage) else LocalMessage(payload, ()))


def _reduce(encoder: reducers.Encoder, marshalled: Marshalled) -> Any:
    message = marshalled._message
    if isinstance(message, LocalTensors):
        return marshal, (message.decode(),)
    buffers = [np.frombuffer(buffer, np.uint8) for buffer in message.buffers]
    return _rebuild, (message.data, list(message.objects), buffers)


def _rebuild(data: bytes, objects: list[Any], buffers: list[Any]) -> Marshalled:
    return Marshalled(LocalMessage(data, objects, [bytearray(buffer) for buffer in buffers]))


reducers.register(Marshalled, _reduce)
