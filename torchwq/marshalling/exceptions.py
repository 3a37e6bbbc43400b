"""Carries an exception from a worker to its owner, whatever it is.

The exception is pickled by itself inside the message, beside its text. If its class cannot be pickled, cannot be
unpickled on the other side, or comes out as something else, the text is still there. One that holds tensors or large
arrays is part of the message itself, as those are; that it can be rebuilt is tried out before.
"""

from __future__ import annotations

import pickle
import traceback
from typing import NamedTuple

from ..errors import RemoteError, RemoteTraceback
from . import codec
from .letter import Letter

#: An exception is pickled into the message, whatever its size: only what leaves the pickle makes a parcel of it.
_NO_LIMIT = 2**62


class PackedException(NamedTuple):
    pickled: bytes | None
    whole: BaseException | None
    kind: str
    summary: str
    text: str


def pack(error: BaseException, *, here: bool = False) -> PackedException:
    """Turn a caught exception into something that always travels, or stays ``here``."""
    kind = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
    try:
        summary = str(error)
    except Exception:
        summary = "(its text cannot be had)"
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    pickled = whole = None
    try:
        payload = codec.encode(error, _NO_LIMIT, upvalues=True, here=here)
        if isinstance(payload, bytes):
            pickled = payload
        elif isinstance(codec.decode(*codec.received(payload)), BaseException):
            whole = error
    except Exception:
        pass  # then its text has to do
    return PackedException(pickled, whole, kind, summary, text)


def encode(error: BaseException, limit: int, *, here: bool = False) -> codec.Encoded:
    """The payload with which a worker tells its owner that it has failed: no value, and the packed exception.

    A worker that is ``here``, a thread, has no need to pack it: it is the exception itself.
    """
    if here:
        return Letter(None, [(None, error)])
    return codec.encode((None, pack(error)), limit, upvalues=True)


def unpack(packed: PackedException | BaseException) -> BaseException:
    """The exception, with the worker's traceback: as its cause, or, from a thread, its own."""
    if isinstance(packed, BaseException):
        return packed
    error: object = packed.whole
    if packed.pickled is not None:
        try:
            error = pickle.loads(packed.pickled)
        except Exception:
            error = None
    if not isinstance(error, BaseException):
        error = RemoteError(f"{packed.kind}: {packed.summary}")
    error.__cause__ = RemoteTraceback(packed.text)
    return error


def add_note(error: BaseException, note: str) -> None:
    """Add a note, if the error does not have it yet. Python 3.10 does not show notes, but they are there."""
    notes = getattr(error, "__notes__", None)
    if notes is None:
        notes = []
        setattr(error, "__notes__", notes)  # noqa: B010 - add_note came with Python 3.11
    if note not in notes:
        notes.append(note)
