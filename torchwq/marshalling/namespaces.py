"""The globals of modules that other processes cannot import, above all the script's.

A function that travels by value needs globals in the reader's process. All functions of one script have the same ones:
what one of them sets the next one finds, in a pool's worker as in one of ``concurrent.futures``.

Note [namespaces]

* A *namespace* is such globals, with a *token* from the process of their module, the namespace's *home*. The token is
  the same in all processes, also in those forked from the home.
* At home a message changes nothing in the namespace.
* Elsewhere a namespace begins empty. A message installs the values to which its functions refer, under their names,
  except under names that the worker itself has set since.
* A worker that is a thread has namespaces of its own.

A worker process has in ``sys.modules`` a :class:`ProxyModule` for each module whose definitions it has received, so
that pickle finds them by name.
"""

from __future__ import annotations

import builtins
import sys
import threading
import types
import uuid
import weakref
from collections.abc import Iterable, MutableMapping
from typing import Any, Final

from . import importable

#: The name under which globals other than those of ``__main__`` hold their ``Namespace``.
_KEY: Final = "__torchwq_namespace__"
_ATTRIBUTES: Final = ("__package__", "__file__", "__path__")
_MISSING: Final = object()


class Namespace:
    """The globals of a module, or of code that runs like one."""

    __slots__ = ("__weakref__", "globals", "installed", "is_home", "module", "placeholders", "token")

    def __init__(self, token: str, globals_: dict[str, Any], is_home: bool) -> None:
        self.token = token
        self.globals = globals_
        self.is_home = is_home
        #: The values that messages have installed, by name.
        self.installed: dict[str, Any] = {}
        #: Placeholders for classes that have not come, but of which a nested object has.
        self.placeholders: dict[str, Any] = {}
        #: The module, if a message contained the module itself.
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
    """The state of this thread if it is a worker, which ``workers.threads`` gives it; else None."""
    thread = threading.current_thread()
    state: dict[str, Any] | None = getattr(thread, "torchwq_definitions", None)
    return state


def existing(globals_: dict[str, Any]) -> Namespace | None:
    """The namespace that has these globals, if one has been made of them."""
    if _of_main is not None and _of_main.globals is globals_:
        return _of_main
    space = globals_.get(_KEY)
    # A copy of globals, such as runpy makes, is another namespace.
    return space if isinstance(space, Namespace) and space.globals is globals_ else None


def of(globals_: dict[str, Any]) -> Namespace:
    """The namespace that has these globals. If there is none, this process is its home."""
    global _of_main
    space = existing(globals_)
    if space is None:
        space = Namespace(uuid.uuid4().hex, globals_, True)
        if getattr(sys.modules.get("__main__"), "__dict__", None) is globals_:
            _of_main = space  # the program's own globals stay unchanged
        else:
            globals_[_KEY] = space
        _spaces[space.token] = space
    return space


def find_or_create(token: str, name: str, has_module: bool, attributes: dict[str, Any]) -> dict[str, Any]:
    """The globals of the namespace with this token in this process, or in this thread if it is a worker."""
    state = thread_state()
    spaces: MutableMapping[str, Namespace] = _spaces if state is None else state.setdefault("", {})
    space = spaces.get(token)
    if space is None:
        globals_ = {"__builtins__": builtins, **attributes}
        if name:
            globals_["__name__"] = name
        space = Namespace(token, globals_, False)
        globals_[_KEY] = space
        space = spaces.setdefault(token, space)
        if state is None:
            _install_proxy(name, space, has_module)
    return space.globals


def all_namespaces() -> list[Namespace]:
    """The namespaces of this process, the script's included; or of this thread if it is a worker."""
    state = thread_state()
    if state is not None:
        return list(state.get("", {}).values())
    main = sys.modules.get("__main__")
    if isinstance(main, types.ModuleType) and not isinstance(main, ProxyModule):
        of(vars(main))
    return list(_spaces.values())


def look_up(globals_: dict[str, Any], name: str) -> Any:
    """The value of a dotted name in globals; None if there is none. Runs no ``__getattr__`` of a module."""
    if "." not in name:
        return globals_.get(name)
    first, *rest = name.split(".")
    value = globals_.get(first)
    for part in rest:
        value = getattr(value, part, None)
    return value


def install(globals_: dict[str, Any], values: Iterable[tuple[str, Any]]) -> None:
    """Install a message's values into globals, as Note [namespaces] says."""
    space = existing(globals_)
    if space is None:  # the globals of an importable module, which has what its code needs
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
    """Let pickle find ``value`` by its dotted name, even if the class around it has not come.

    Only a ``ProxyModule`` gives the placeholder of that class: code in this process does not see it.
    """
    space = existing(globals_)
    first, *between, last = name.split(".")
    if space is None or space.is_home or first in globals_:
        return
    around = space.placeholders.setdefault(first, _Placeholder())
    for part in between:
        inner = vars(around).setdefault(part, _Placeholder())
        if not isinstance(inner, _Placeholder):
            return  # the class itself, which has its nested objects
        around = inner
    setattr(around, last, value)


class _Placeholder:
    """Takes the place of a class that has not come."""


class ProxyModule(types.ModuleType):
    """Takes the place of another process's module, and gives the functions, classes and values received from there.

    Its ``vars`` are empty, and it has no ``__file__``: multiprocessing would run that file again in the processes that
    it spawns from a worker, even a script without a guard.
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
    """Reduce a module that other processes cannot import to all its globals."""
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


#: The namespaces that a ``ProxyModule`` gives, by its name; first that of the module itself.
_by_module_name: dict[str, list[weakref.ref[Namespace]]] = {}
#: Keeps the namespaces of modules alive, as ``sys.modules`` does with modules.
_kept_alive: list[Namespace] = []


def _namespaces_of(name: str) -> list[Namespace]:
    return [space for each in _by_module_name.get(name, ()) if (space := each()) is not None]


def _install_proxy(name: str, space: Namespace, has_module: bool) -> None:
    """Let pickle find the namespace's values by name."""
    if name in importable.MAIN:
        if not _replace_main():
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
    spaces = _by_module_name.setdefault(name, [])
    spaces[:] = [each for each in spaces if each() is not None]
    spaces.insert(0 if has_module else len(spaces), weakref.ref(space))
    if has_module:
        _kept_alive.append(space)


def _replace_main() -> bool:
    """Make ``__main__`` a ``ProxyModule`` if it has no script: in a worker, or in a process that multiprocessing has
    spawned from one. Returns whether it is one."""
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
