"""Functions, classes and named values that go by value are defined once in each process, and known by a token.

Pickle refers to such a thing by its module and name; where the other side has no such module, its definition travels,
with a token that its home has given it. Invariants:

* Where the token is known, what comes in is the object that has it. At home its definition is not looked at: the
  owner's class is the class of the answers that a worker sends, no attribute of it is set again, and no metaclass runs.
  Elsewhere it takes over what its home has changed since (see ``updates``).
* A definition counts as *complete* when its state has been set. Two threads may rebuild the same one at the same time:
  both get the one that came first, and whoever does not find it complete sets its state, too, before using it.
* What a process has received it passes on as *sealed* bytes, made once: answers with instances of the owner's classes
  cost about what a name would. Calls (``encode_call``) carry definitions as they are now instead.
* Tokens do not keep alive what they stand for.
"""

from __future__ import annotations

import functools
import pickle
import sys
import time
import types
import uuid
import weakref
from collections.abc import Callable
from typing import Any, Final

from . import importable, namespaces

#: What a worker that is a thread has of its own.
_WITH_GLOBALS: Final = (types.FunctionType, type(functools.lru_cache(len)))


class Definition:
    """What is known of one object that is defined by value."""

    __slots__ = ("complete", "fingerprints", "globals", "is_home", "object", "sealed", "stamp", "token")

    def __init__(self, token: str, obj: Any, is_home: bool) -> None:
        self.token = token
        self.object = weakref.ref(obj)
        self.is_home = self.complete = is_home
        #: Its pickle, made to be passed on; None if there is none yet, b"" if there can be none.
        self.sealed: bytes | None = None
        #: Those of the namespace that has it under its name.
        self.globals: dict[str, Any] | None = None
        #: When its home sent the state that it has; 0 if that came sealed.
        self.stamp = 0
        #: Of which parts that state was, for ``updates``: their outlines.
        self.fingerprints: dict[Any, Any] = {}


class _Registry:
    def __init__(self) -> None:
        self.by_token: dict[str, Definition] = {}
        self.by_id: dict[int, Definition] = {}

    def of(self, obj: Any) -> Definition | None:
        definition = self.by_id.get(id(obj))
        return definition if definition is not None and definition.object() is obj else None

    def add(self, token: str, obj: Any, is_home: bool) -> Definition:
        """The first definition with this token, be it this or one that another thread has just added."""
        definition = Definition(token, obj, is_home)
        first = self.by_token.setdefault(token, definition)
        if first is not definition and first.object() is not None:
            return first
        self.by_token[token] = self.by_id[id(obj)] = definition
        weakref.finalize(obj, self._forget, token, id(obj), definition).atexit = False
        return definition

    def _forget(self, token: str, address: int, definition: Definition) -> None:
        tables: Any = (self.by_token, token), (self.by_id, address)
        for table, key in tables:
            if table.get(key) is definition:
                table.pop(key, None)


_process = _Registry()


def _registries() -> tuple[_Registry, ...]:
    """Where to look: a worker that is a thread has functions of its own, and the classes of its process."""
    kept = namespaces.thread_state()
    if kept is None:
        return (_process,)
    own: _Registry = kept.setdefault("definitions", _Registry())
    return own, _process


def of(obj: Any) -> Definition | None:
    """What is known of an object; None if it is not defined by value, or has no token yet."""
    for registry in _registries():
        definition = registry.of(obj)
        if definition is not None:
            return definition
    return None


def token_of(obj: Any) -> str:
    """The object's token. One that has none gets it, and this process is its home."""
    definition = of(obj) or _process.add(uuid.uuid4().hex, obj, True)
    return definition.token


def stamp_of(obj: Any) -> int:
    """When the state that is about to be sent was the one at the object's home: on a clock that all processes share."""
    definition = of(obj)
    if definition is None:
        return 0
    return time.monotonic_ns() if definition.is_home else definition.stamp


def forget_sealed() -> None:
    """Some definition is no longer what it was when it was sealed, by itself or as a part of others."""
    for registry in _registries():
        for definition in list(registry.by_token.values()):
            definition.sealed = None


def give_tokens_to_main() -> None:
    """Let a process that is about to be forked call the script's functions and classes as this one does."""
    main = sys.modules.get("__main__")
    for obj in list(getattr(main, "__dict__", {}).values()):
        if isinstance(obj, (type, types.FunctionType)) and obj.__module__ in importable.MAIN:
            token_of(obj)


def find(token: str) -> Any:
    """The object with this token; None if this process does not know it.

    A thread that is a worker does not get the functions of its process, whose globals are others.
    """
    registries = _registries()
    for registry in registries:
        definition = registry.by_token.get(token)
        if definition is not None:
            obj = definition.object()
            if registry is registries[0] or not isinstance(obj, _WITH_GLOBALS):
                return obj
    return None


def add_received(token: str, obj: Any) -> Any:
    """``obj`` was rebuilt to have this token. Returns the object that has it."""
    definition = _registries()[0].add(token, obj, False)
    first = definition.object()
    return obj if first is None else first


def mark_complete(obj: Any, globals_: dict[str, Any] | None, name: str) -> None:
    """Its state has been set. Its namespace gets it, under its name."""
    definition = of(obj)
    if definition is not None and not definition.complete:
        definition.complete = True
        definition.globals = globals_
        while on_first_received:
            on_first_received.pop()()
    if globals_ is not None:
        if "." in name:
            namespaces.install_nested(globals_, name, obj)
        else:
            namespaces.install(globals_, [(name, obj)])


def is_complete(obj: Any) -> bool:
    definition = of(obj)
    return definition is not None and definition.complete


def unseal(token: str, name: str, sealed: bytes) -> Any:
    """What ``Definition.sealed`` defines, on the other side."""
    obj = find(token)
    if obj is None or not is_complete(obj):
        obj = pickle.loads(sealed)
        definition = of(obj)
        if definition is not None and not definition.is_home:
            definition.sealed = sealed
    return obj


def reduce_sealed(obj: Any) -> Any:
    """How an object that was received is passed on; None if it was not, or has not been sealed."""
    definition = of(obj)
    if definition is None or definition.is_home or not definition.sealed:
        return None
    return unseal, (definition.token, obj.__name__, definition.sealed)


def reduce_received(obj: Any, seal: Callable[[Any], bytes]) -> Any:
    """The same; ``seal`` makes its bytes if there are none yet. None if it can only travel as it is now."""
    definition = of(obj)
    if definition is None or definition.is_home or not definition.complete:
        return None
    if definition.sealed is None:
        definition.sealed = b""  # should anything in it lead here again
        definition.sealed = seal(obj)
    return reduce_sealed(obj)


#: Called when the first definition has come to this process.
on_first_received: list[Callable[[], None]] = []
