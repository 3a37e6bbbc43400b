"""Functions, classes and named values that go by value: each is defined once in a process, and known by a token.

Pickle refers to such an object by its module and name. Where the reader has no such module, the object's definition
travels, with a token from the process that has made the object, its *home*.

Note [definitions]

* Where the token is known, the object that has it arrives. Its home does not look at the definition: a worker's answer
  refers to the owner's own class, of which no attribute changes and for which no metaclass runs. Other processes take
  over what the home has changed since (``updates``).
* A definition is *complete* when its state has been set. Two threads may rebuild one at the same time. Both get the
  object that was first, and a thread that does not find it complete sets its state before using it.
* A process passes a received definition on as *sealed* bytes, which it makes once: answers with instances of the
  owner's classes cost about as much as a name. Calls (``encode_call``) carry current definitions instead.
* Tokens do not keep their objects alive.
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

#: Types of objects with globals, of which each worker that is a thread has its own.
_WITH_GLOBALS: Final = (types.FunctionType, type(functools.lru_cache(len)))


class Definition:
    """The state of one object that is defined by value."""

    __slots__ = ("complete", "fingerprints", "globals", "is_home", "object", "sealed", "stamp", "token")

    def __init__(self, token: str, obj: Any, is_home: bool) -> None:
        self.token = token
        self.object = weakref.ref(obj)
        self.is_home = self.complete = is_home
        #: The pickle with which this process passes it on; None if there is none yet, b"" if there can be none.
        self.sealed: bytes | None = None
        #: The globals of the namespace that has it under its name.
        self.globals: dict[str, Any] | None = None
        #: When its home has sent its state; 0 if the state came sealed.
        self.stamp = 0
        #: The fingerprints of that state's parts, for ``updates``.
        self.fingerprints: dict[Any, Any] = {}


class _Registry:
    def __init__(self) -> None:
        self.by_token: dict[str, Definition] = {}
        self.by_id: dict[int, Definition] = {}

    def of(self, obj: Any) -> Definition | None:
        definition = self.by_id.get(id(obj))
        return definition if definition is not None and definition.object() is obj else None

    def add(self, token: str, obj: Any, is_home: bool) -> Definition:
        """Add a definition, unless another thread has added one with this token. Returns the one that was first."""
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
    """The registries to search, the first for new ones. A worker that is a thread has its own before its process's."""
    state = namespaces.thread_state()
    if state is None:
        return (_process,)
    own: _Registry = state.setdefault("definitions", _Registry())
    return own, _process


def of(obj: Any) -> Definition | None:
    """The definition of an object; None if it is not defined by value, or has no token yet."""
    for registry in _registries():
        definition = registry.of(obj)
        if definition is not None:
            return definition
    return None


def token_of(obj: Any) -> str:
    """The object's token. An object without one gets it now, and this process is its home."""
    definition = of(obj) or _process.add(uuid.uuid4().hex, obj, True)
    return definition.token


def stamp_of(obj: Any) -> int:
    """When the object's home had the state that this process is about to send, on a clock that all processes share."""
    definition = of(obj)
    if definition is None:
        return 0
    return time.monotonic_ns() if definition.is_home else definition.stamp


def forget_sealed() -> None:
    """Discard all sealed bytes, because a definition, which others may contain, has changed."""
    for registry in _registries():
        for definition in list(registry.by_token.values()):
            definition.sealed = None


def give_tokens_to_main() -> None:
    """Give tokens to the script's functions and classes, so that a process forked afterwards has the same ones."""
    main = sys.modules.get("__main__")
    for obj in list(getattr(main, "__dict__", {}).values()):
        if isinstance(obj, (type, types.FunctionType)) and obj.__module__ in importable.MAIN:
            token_of(obj)


def find(token: str) -> Any:
    """The object with this token; None if this process does not know it.

    A worker that is a thread does not get the functions of its process, which have other globals.
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
    """Add ``obj``, rebuilt for this token. Returns the object that was first."""
    definition = _registries()[0].add(token, obj, False)
    first = definition.object()
    return obj if first is None else first


def mark_complete(obj: Any, globals_: dict[str, Any] | None, name: str) -> None:
    """The state of ``obj`` has been set. Its namespace gets it under its name."""
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
    """The object that ``Definition.sealed`` defines, in the reader's process."""
    obj = find(token)
    if obj is None or not is_complete(obj):
        obj = pickle.loads(sealed)
        definition = of(obj)
        if definition is not None and not definition.is_home:
            definition.sealed = sealed
    return obj


def reduce_sealed(obj: Any) -> Any:
    """Reduce a received object to its sealed bytes; None if it was not received, or has none."""
    definition = of(obj)
    if definition is None or definition.is_home or not definition.sealed:
        return None
    return unseal, (definition.token, obj.__name__, definition.sealed)


def reduce_received(obj: Any, seal: Callable[[Any], bytes]) -> Any:
    """As ``reduce_sealed``, but ``seal`` makes the bytes if there are none yet. None if nothing can seal the object."""
    definition = of(obj)
    if definition is None or definition.is_home or not definition.complete:
        return None
    if definition.sealed is None:
        definition.sealed = b""  # for a part that refers back to the object
        definition.sealed = seal(obj)
    return reduce_sealed(obj)


#: ``mark_complete`` calls these when this process has received its first definition.
on_first_received: list[Callable[[], None]] = []
