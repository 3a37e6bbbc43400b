"""The globals of modules that cannot be imported elsewhere, above all the script's, and what stands for them there.

A function that travels by value needs globals on the other side. All functions of one script have the same there as
well: so what one of them sets the next one finds, in a pool's worker as in that of ``concurrent.futures``.

* A namespace has a *token*, given where the namespace comes from, its *home*. It has the same everywhere, also in
  processes forked from there.
* At home a message changes nothing in it, whatever it brings: what comes back finds the namespace as it is.
* Elsewhere it begins empty. A message installs what its functions refer to, under the names that they use, unless the
  worker itself has set that name since: its own value stays.
* A worker that is a thread of its owner's process has namespaces of its own.

In a worker process a module stands in ``sys.modules`` for each module whose definitions have come along, so pickle
finds them by name: see :class:`ProxyModule`.
"""

from __future__ import annotations

import builtins
import sys
import threading
import types
import uuid
import weakref
from collections.abc import Iterable
from typing import Any, Final

from . import importable

#: Under which name a namespace that is not ``__main__``'s holds what is known of it.
_KEY: Final = "__torchwq_namespace__"
_ATTRIBUTES: Final = ("__package__", "__file__", "__path__")
_MISSING: Final = object()


class Namespace:
    """What is known of the globals of a module, or of something that runs code like one."""

    __slots__ = ("__weakref__", "globals", "installed", "is_home", "module", "placeholders", "token")

    def __init__(self, token: str, globals_: dict[str, Any], is_home: bool) -> None:
        self.token = token
        self.globals = globals_
        self.is_home = is_home
        #: What messages have set, by name.
        self.installed: dict[str, Any] = {}
        #: What stands for classes that have not come, while something nested in them has.
        self.placeholders: dict[str, Any] = {}
        #: The module, if that itself was sent from here.
        self.module: weakref.ref[types.ModuleType] | None = None

    def __reduce__(self) -> Any:
        name = self.globals.get("__name__", "")
        module = sys.modules.get(name)
        has_module = isinstance(module, ProxyModule) or getattr(module, "__dict__", None) is self.globals
        attributes = {key: self.globals[key] for key in _ATTRIBUTES if key in self.globals}
        return find_or_create, (self.token, name, has_module, attributes)


_spaces: weakref.WeakValueDictionary[str, Namespace] = weakref.WeakValueDictionary()
_of_main: Namespace | None = None


def thread_state() -> dict[str, Any] | None:
    """What belongs to this thread alone if it is a worker, which ``workers.threads`` marks so; else None."""
    thread = threading.current_thread()
    kept: dict[str, Any] | None = getattr(thread, "torchwq_definitions", None)
    return kept


def existing(globals_: dict[str, Any]) -> Namespace | None:
    """The namespace that has these globals, if one has been made of them."""
    if _of_main is not None and _of_main.globals is globals_:
        return _of_main
    space = globals_.get(_KEY)
    # Globals that were copied, as runpy does, are others.
    return space if isinstance(space, Namespace) and space.globals is globals_ else None


def of(globals_: dict[str, Any]) -> Namespace:
    """The namespace that has these globals. If there is none, this process is its home."""
    global _of_main
    space = existing(globals_)
    if space is None:
        space = Namespace(uuid.uuid4().hex, globals_, True)
        if getattr(sys.modules.get("__main__"), "__dict__", None) is globals_:
            _of_main = space  # outside of it: the program's own names are its own
        else:
            globals_[_KEY] = space
        _spaces[space.token] = space
    return space


def find_or_create(token: str, name: str, has_module: bool, attributes: dict[str, Any]) -> dict[str, Any]:
    """The globals of the namespace with this token in this process, or in this thread if it is a worker."""
    kept = thread_state()
    spaces: Any = _spaces if kept is None else kept.setdefault("", {})
    space: Namespace | None = spaces.get(token)
    if space is None:
        globals_ = {"__builtins__": builtins, **attributes}
        if name:
            globals_["__name__"] = name
        space = Namespace(token, globals_, False)
        globals_[_KEY] = space
        space = spaces.setdefault(token, space)
        if kept is None:
            _install_proxy(name, space, has_module)
    globals_ = space.globals
    return globals_


def all_namespaces() -> list[Namespace]:
    """The namespaces that this process, or this thread if it is a worker, has so far: the script's among them."""
    kept = thread_state()
    if kept is not None:
        return list(kept.get("", {}).values())
    main = sys.modules.get("__main__")
    if isinstance(main, types.ModuleType) and not isinstance(main, ProxyModule):
        of(vars(main))
    return list(_spaces.values())


def look_up(globals_: dict[str, Any], name: str) -> Any:
    """What globals have under a dotted name; None if nothing. Runs no ``__getattr__`` of a module."""
    first, *rest = name.split(".")
    value = globals_.get(first)
    for part in rest:
        value = getattr(value, part, None)
    return value


def install(globals_: dict[str, Any], values: Iterable[tuple[str, Any]]) -> None:
    """Set what a message brings for these globals, by the rules above."""
    space = existing(globals_)
    if space is None:  # those of an importable module, which has what its code needs
        for name, value in values:
            globals_.setdefault(name, value)
    elif not space.is_home:
        installed = space.installed
        for name, value in values:
            current = globals_.get(name, _MISSING)
            if current is _MISSING or (name in installed and installed[name] is current):
                globals_[name] = installed[name] = value
                space.placeholders.pop(name, None)


def install_nested(globals_: dict[str, Any], name: str, value: Any) -> None:
    """Let pickle find ``value`` by its dotted name, also as long as the class around it has not come.

    Only stand-ins give what stands for that class then: code that runs here does not see it.
    """
    space = existing(globals_)
    first, *between, last = name.split(".")
    if space is None or space.is_home or first in globals_:
        return
    around = space.placeholders.setdefault(first, _Placeholder())
    for part in between:
        inner = vars(around).setdefault(part, _Placeholder())
        if not isinstance(inner, _Placeholder):
            return  # it is the class itself, which has what is nested in it
        around = inner
    setattr(around, last, value)


class _Placeholder:
    """Stands for a class that has not come."""


class ProxyModule(types.ModuleType):
    """Stands for a module of another process: gives the functions, classes and values that have come along from there.

    It shows nothing in its ``vars``, and does not say in which file the other one is: multiprocessing would run that
    file again in the processes that it spawns from a worker, scripts without a guard included.
    """

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):
            for space in _namespaces_of(self.__name__):
                if name in space.globals:
                    return space.globals[name]
            for space in _namespaces_of(self.__name__):
                if name in space.placeholders:
                    return space.placeholders[name]
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r} in this worker")

    def __setattr__(self, name: str, value: Any) -> None:
        spaces = _namespaces_of(self.__name__)
        if name.startswith("__") or not spaces:
            super().__setattr__(name, value)
        else:
            spaces[0].globals[name] = value

    def __delattr__(self, name: str) -> None:
        for space in _namespaces_of(self.__name__):
            if name in space.globals:
                del space.globals[name]
                return
        super().__delattr__(name)


def reduce_module(module: types.ModuleType) -> Any:
    """How a module goes that cannot be imported elsewhere: as all that it has."""
    space = of(vars(module))
    space.module = weakref.ref(module)
    values = {name: value for name, value in vars(module).items() if not name.startswith("__")}
    return _module, (space.token, module.__name__, space), values, None, None, _fill_module


def _module(token: str, name: str, globals_: dict[str, Any]) -> types.ModuleType:
    space = existing(globals_)
    assert space is not None
    module = None if space.module is None else space.module()
    if module is None:
        module = sys.modules.get(name)
        if not isinstance(module, ProxyModule):
            module = ProxyModule(name)
            _by_module_name.setdefault(name, []).insert(0, weakref.ref(space))
        _kept_alive.append(space)
        space.module = weakref.ref(module)
    return module


def _fill_module(module: types.ModuleType, values: dict[str, Any]) -> None:
    for space in _namespaces_of(module.__name__):
        if space.module is not None and space.module() is module:
            install(space.globals, values.items())


#: The namespaces that a stand-in gives, by its name; first the one that is the module's at home.
_by_module_name: dict[str, list[weakref.ref[Namespace]]] = {}
#: The namespaces of modules live as long as modules do.
_kept_alive: list[Namespace] = []


def _namespaces_of(name: str) -> list[Namespace]:
    return [space for each in _by_module_name.get(name, ()) if (space := each()) is not None]


def _install_proxy(name: str, space: Namespace, has_module: bool) -> None:
    """Let pickle find by name what is in the namespace."""
    if name in importable.MAIN:
        if not _may_replace_main():
            return
        name = "__main__"
    elif not has_module or not name:
        return
    else:
        module = sys.modules.get(name)
        if module is None:
            sys.modules[name] = ProxyModule(name)
        elif not isinstance(module, ProxyModule):
            return
    behind = _by_module_name.setdefault(name, [])
    behind[:] = [each for each in behind if each() is not None]
    behind.insert(0 if has_module else len(behind), weakref.ref(space))
    if has_module:
        _kept_alive.append(space)


def _may_replace_main() -> bool:
    """Whether ``__main__`` is a worker's, or of a process that multiprocessing has spawned from one: no script's."""
    main = sys.modules.get("__main__")
    if isinstance(main, ProxyModule):
        return True
    if not isinstance(main, types.ModuleType):
        return False
    if "__torchwq_worker__" not in vars(main) and not _was_spawned_without_script(main):
        return False
    main.__class__ = ProxyModule
    sys.modules["__mp_main__"] = main
    return True


def _was_spawned_without_script(main: types.ModuleType) -> bool:
    process = sys.modules.get("multiprocessing.process")
    return process is not None and process.parent_process() is not None and not hasattr(main, "__file__")
