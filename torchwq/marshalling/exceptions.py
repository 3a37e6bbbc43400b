"""Packs an exception in a worker, so that its owner always gets an error, and unpacks it there.

A message has the pickle of the exception's *parts*, and beside it the exception's text. So the exception keeps its
type even if one of the parts cannot travel, which then stays behind, or if its class cannot be called with ``args``
again. If even that fails, the owner has the text. An exception with tensors or large arrays is part of the message
itself, as those are; ``pack`` tries out before that it can be rebuilt.

Invariant: whatever the user's classes do while an exception is packed or unpacked, the owner gets an error. Their
``sys.exit`` ends nothing. Only Ctrl-C, and the interruption of a worker that is a thread, pass.
"""

from __future__ import annotations

import contextlib
import functools
import pickle
import traceback
from collections.abc import Callable
from typing import Any, Final, NamedTuple, TypeVar

from .. import tracebacks
from ..errors import Interrupted, RemoteError, RemoteTraceback
from ..transport import debug
from ..transport.capabilities import SAME_MACHINE, Capabilities
from . import codec, reducers, subclass_state
from .copies import ATOMS

#: How deep, and in how long containers, ``pack`` looks for other exceptions in an exception.
_MAX_DEPTH: Final = 4
_MAX_ITEMS: Final = 1000
#: Flag of classes that are not static classes of C code.
_HEAP_TYPE: Final = 1 << 9
#: Exceptions that pass through all handlers of this module.
_PASS_THROUGH: Final = (KeyboardInterrupt, Interrupted)


T = TypeVar("T")


class PackedException(NamedTuple):
    #: The pickle of its parts; None if they cannot be pickled, or are ``whole``.
    pickled: bytes | None
    #: The exception itself, if the message has more of it than a pickle.
    whole: Any
    #: A pickle of its texts and numbers only; None if ``pickled`` has no other parts.
    bare: bytes | None
    kind: str
    summary: str
    text: str


@debug.runs_user_code
def pack(error: BaseException, *, peer: Capabilities = SAME_MACHINE) -> PackedException:
    """Pack a caught exception so that it travels to ``peer`` in any case."""
    pickled = whole = bare = None
    for usable in (lambda _: None, functools.partial(_try_encoding, peer)):
        try:
            parts = _Dissector(usable).of(error)
            payload = codec.encode(parts, codec.UNLIMITED, upvalues=True, peer=peer)
            if isinstance(payload, bytes):
                pickled = payload
            elif isinstance(codec.decode(*codec.deliver_local(payload)), BaseException):
                whole = parts
        except _PASS_THROUGH:
            raise
        except BaseException:
            continue  # next without the parts that cannot travel; in the end its text must do
        if pickled or whole:
            break
    if pickled is not None or whole is not None:
        dissection = _Dissector(_accept_atoms)
        with contextlib.suppress(Exception):
            parts = dissection.of(error)
            if dissection.has_left_out:
                encoded = codec.encode(parts, codec.UNLIMITED, upvalues=True)
                bare = encoded if isinstance(encoded, bytes) else None
    kind, summary = _kind(error), _summary(error)
    # It cannot be shown if its code has no line numbers, say.
    text = _guarded(lambda: "".join(traceback.format_exception(tracebacks.trim(error))), lambda _: f"{kind}: {summary}")
    return PackedException(pickled, whole, bare, kind, summary, text)


def pack_for(peer: Capabilities, error: BaseException) -> PackedException | BaseException:
    """As ``pack``; but for a peer in this process the exception itself."""
    return tracebacks.trim(error) if peer.same_process else pack(error, peer=peer)


def encode(error: PackedException | BaseException, limit: int, peer: Capabilities = SAME_MACHINE) -> codec.Encoded:
    """The payload that tells an owner of a worker's failure: no value, and the result of ``pack_for``."""
    if isinstance(error, BaseException):
        return None, error
    return codec.encode((None, error), limit, upvalues=True, peer=peer)


@debug.runs_user_code
def unpack(packed: PackedException | BaseException) -> BaseException:
    """The exception with the worker's traceback: as its cause, or, from a thread, as its own."""
    if isinstance(packed, BaseException):
        return packed
    error: object = packed.whole
    for pickled in (packed.pickled, packed.bare):
        if isinstance(error, BaseException) or pickled is None:
            continue
        error = _guarded(functools.partial(pickle.loads, pickled), lambda _: None)
    if not isinstance(error, BaseException):
        error = RemoteError(f"{packed.kind}: {packed.summary}")
    tracebacks.set_cause(error, RemoteTraceback(packed.text))
    return error


def decode_answer(data: Any, fds: list[int]) -> tuple[Any, BaseException | None]:
    """Value and error of a worker's answer, the message ``(value, packed error)``.

    ``data`` may also be the error with which receiving the answer has failed.
    """

    def decode() -> tuple[Any, BaseException | None]:
        if isinstance(data, BaseException):
            raise data
        value, packed = codec.decode(data, fds)
        return value, None if packed is None else unpack(packed)

    return _guarded(decode, lambda raised: (None, raised))


def discard_answer(data: Any, fds: list[int]) -> None:
    """Discard a worker's answer."""
    if not isinstance(data, BaseException):
        codec.discard(data, fds)


def _guarded(run: Callable[[], T], fallback: Callable[[BaseException], T]) -> T:
    """The result of ``run``, which calls user code. If it raises, even SystemExit, the result of ``fallback``."""
    try:
        return run()
    except _PASS_THROUGH:
        raise
    except BaseException as raised:
        return fallback(raised)


def _kind(error: BaseException) -> str:
    return f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")


def _summary(error: BaseException) -> str:
    return _guarded(lambda: str(error), lambda _: "(its text cannot be had)")


def _accept_atoms(part: Any) -> str | None:
    return None if type(part) in ATOMS else f"a {type(part).__qualname__}"


def _try_encoding(peer: Capabilities, part: Any) -> str | None:
    """Why a part cannot travel: the error with which encoding fails."""

    def encode_part() -> None:
        codec.encode(part, codec.UNLIMITED, upvalues=True, peer=peer)

    return _guarded(encode_part, lambda error: f"{type(error).__name__}: {_summary(error)}")


class _Parts:
    """The parts of an exception. They pickle as the exception that ``_put_together`` makes of them."""

    make: Any
    made_of: tuple[Any, ...]
    args: tuple[Any, ...]
    state: Any = None

    def __init__(self, error: BaseException) -> None:
        self.cls = type(error)
        self.fallback_text = _kind(error), _summary(error)
        #: The places of the parts that stay behind, and why.
        self.missing: list[str] = []

    def __reduce__(self) -> Any:
        same = self.made_of is self.args
        args = self.cls, self.make, None if same else self.made_of, self.args, self.fallback_text
        return _put_together, args, (self.state, self.missing), None, None, _put_state


class _Dissector:
    """Takes an exception apart, with the exceptions in it. ``usable`` returns why a part cannot travel, or None."""

    def __init__(self, usable: Callable[[Any], str | None]) -> None:
        self._usable = usable
        self._done: dict[int, _Parts] = {}
        self.has_left_out = False

    def of(self, error: BaseException) -> _Parts:
        found = self._done.get(id(error))
        if found is not None:
            return found
        parts = self._done[id(error)] = _Parts(error)
        make, made_of, state = _reduced(error)
        parts.make = make
        parts.args = self._all(error.args, "args", parts.missing)
        parts.made_of = parts.args if made_of is error.args else self._all(made_of, "args", parts.missing)
        if isinstance(state, dict):
            parts.state = {}
            for name, value in state.items():
                part, lost = self._part(value, f".{name}", parts.missing)
                if not lost:
                    parts.state[name] = part
        elif state is not None:
            part, lost = self._part(state, "its state", parts.missing)
            parts.state = None if lost else part
        return parts

    def _all(self, values: tuple[Any, ...], name: str, missing: list[str]) -> tuple[Any, ...]:
        found = [self._part(value, f"{name}[{index}]", missing)[0] for index, value in enumerate(values)]
        return tuple(found) if any(new is not old for new, old in zip(found, values, strict=True)) else values

    def _part(self, value: Any, place: str, missing: list[str], depth: int = 0) -> tuple[Any, bool]:
        """The object that travels in place of ``value``, and whether that is only a text."""
        if isinstance(value, BaseException):
            return self.of(value), False
        reason = None
        cls = type(value)
        if cls in (list, tuple, dict) and depth < _MAX_DEPTH and len(value) < _MAX_ITEMS:
            keys = list(value) if cls is dict else range(len(value))
            reason = next((reason for key in keys if (reason := self._usable(key))), None)
            if reason is None:
                found = [self._part(value[key], f"{place}[{key!r:.40}]", missing, depth + 1)[0] for key in keys]
                if all(new is value[key] for key, new in zip(keys, found, strict=True)):
                    return value, False
                return (dict(zip(keys, found, strict=True)) if cls is dict else cls(found)), False
        reason = reason or self._usable(value)
        if reason is None:
            return value, False
        missing.append(f"{place} ({reason})")
        self.has_left_out = True
        return _guarded(lambda: f"{value!r:.200}", lambda _: f"<{cls.__qualname__}>"), True


def _reduced(error: BaseException) -> tuple[Any, tuple[Any, ...], Any]:
    """The function that makes such an exception, its arguments, and the state; from ``__reduce__`` if that works."""
    cls = type(error)
    make, made_of, state = cls, error.args, None
    reduce = reducers.registered.get(cls, lambda error: error.__reduce_ex__(4))
    reduced: Any = _guarded(lambda: reduce(error), lambda _: None)
    if isinstance(reduced, tuple) and len(reduced) in (2, 3) and isinstance(reduced[1], tuple):
        make, made_of, *rest = reduced
        state = rest[0] if rest else None
    else:
        state = error.__dict__
    if state is None or state is error.__dict__:
        state = {**(state or {}), **subclass_state.slots_of(error)} or None
    return make, made_of, state


def _put_together(
    cls: Any, make: Any, made_of: tuple[Any, ...] | None, args: tuple[Any, ...], fallback_text: tuple[str, str]
) -> BaseException:
    """Make the exception as its ``__reduce__`` says; if that fails, without its ``__init__``."""
    parts = args if made_of is None else made_of
    error = _guarded(
        lambda: make(*parts), lambda raised: _without_init(cls, parts, args, raised) if make is cls else None
    )
    return error if isinstance(error, BaseException) else RemoteError(": ".join(fallback_text))


def _without_init(
    cls: Any, made_of: tuple[Any, ...], args: tuple[Any, ...], raised: BaseException
) -> BaseException | None:
    base: Any = next(base for base in cls.__mro__ if not base.__flags__ & _HEAP_TYPE)
    try:
        error: BaseException = base.__new__(cls, *made_of)
        with contextlib.suppress(Exception):
            base.__init__(error, *made_of)
        error.args = args
    except Exception:
        return None
    add_note(error, f"made here without its __init__, which raised {type(raised).__name__}: {_summary(raised)}")
    return error


def _put_state(error: BaseException, found: tuple[Any, list[str]]) -> None:
    state, missing = found
    notes = list(getattr(error, "__notes__", ()))
    if state is not None:
        _guarded(
            lambda: error.__setstate__(state),
            lambda _: vars(error).update(state) if isinstance(state, dict) else None,
        )
    if missing:
        notes.append(f"left behind in the worker, because it cannot be sent: {', '.join(missing)}")
    for note in notes:
        add_note(error, note)


def add_note(error: BaseException, note: str) -> None:
    """Add a note, unless the error has it. Python 3.10 keeps notes, but does not show them."""
    notes = getattr(error, "__notes__", None)
    if notes is None:
        notes = []
        object.__setattr__(error, "__notes__", notes)  # add_note came with Python 3.11, and its class may be frozen
    if note not in notes:
        notes.append(note)
