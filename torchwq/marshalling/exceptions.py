"""Carries an exception from a worker to its owner, whatever it is.

The exception is pickled by itself inside the message, beside its text. If its class cannot be pickled, cannot be
unpickled on the other side, or comes out as something else, the text is still there.
"""

from __future__ import annotations

import pickle
import traceback
from typing import NamedTuple

from ..errors import RemoteError, RemoteTraceback
from ..memory.parcel import Parcel
from . import codec


class PackedException(NamedTuple):
    pickled: bytes | None
    kind: str
    summary: str
    text: str


def pack(error: BaseException) -> PackedException:
    """Turn a caught exception into something that always travels."""
    kind = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
    try:
        summary = str(error)
    except Exception:
        summary = "(its text cannot be had)"
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    try:
        payload = codec.encode(error, 2**62, upvalues=True)
        pickled = payload if not isinstance(payload, Parcel) else None
    except Exception:
        pickled = None
    return PackedException(pickled, kind, summary, text)


def unpack(packed: PackedException) -> BaseException:
    """The exception, with the worker's traceback as its cause."""
    error: object = None
    if packed.pickled is not None:
        try:
            error = pickle.loads(packed.pickled)
        except Exception:
            error = None
    if not isinstance(error, BaseException):
        error = RemoteError(f"{packed.kind}: {packed.summary}")
    error.__cause__ = RemoteTraceback(packed.text)
    return error
