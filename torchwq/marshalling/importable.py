"""Which modules another process can import under their names.

``sys.modules`` does not say so: it also has plugins that were loaded from their files, code that ``runpy`` runs, and
modules made by hand, which no other process would find. So this module asks the finders of ``sys.meta_path``, once for
each module, whether they would find it, and where.

The script is never importable, neither as ``__main__`` nor as ``__mp_main__``, its name in a process that
multiprocessing has spawned: a worker has none of it. One exception is a forked worker that writes to its parent.
"""

from __future__ import annotations

import os
import sys
import threading
import types
import weakref
from typing import Any, Final

MAIN: Final = frozenset({"__main__", "__mp_main__"})


class _Reader(threading.local):
    #: Whether the reader of what this thread encodes has the same ``__main__``, because it has forked this process.
    has_main = False


reader: Final = _Reader()
#: The finders' answers, by the name of the module.
_verdicts: dict[str, tuple[weakref.ref[Any], bool]] = {}


def is_main(name: str, module: Any) -> bool:
    """Whether the module is the script, under either name."""
    return name in MAIN or module is sys.modules.get("__main__")


def is_importable(name: str, module: Any) -> bool:
    """Whether another process that imports ``name`` gets this module, which ``sys.modules`` has under that name."""
    main = sys.modules.get("__main__")
    if name in MAIN or module is main:  # as is_main; each call of a pool's task comes here
        return reader.has_main and module is main
    known = _verdicts.get(name)
    if known is not None and known[0]() is module:
        return known[1]
    verdict = _would_be_found(name, module)
    try:
        _verdicts[name] = weakref.ref(module), verdict
    except TypeError:  # an object that is no module
        pass
    return verdict


def _would_be_found(name: str, module: Any) -> bool:
    if name in sys.stdlib_module_names or name in sys.builtin_module_names:
        return True
    if not isinstance(module, types.ModuleType):
        return True  # a library has put an object in its module's place
    parent = name.rpartition(".")[0]
    file = getattr(module, "__file__", None)
    path = None
    if parent:
        package = sys.modules.get(parent)
        if package is None or not is_importable(parent, package):
            return False
        path = getattr(package, "__path__", None)
        if file is None or path is None:
            return True  # its package has made it, as torch makes torch._C._nn
    for finder in sys.meta_path:
        try:
            spec = finder.find_spec(name, path)
        except Exception:  # a finder of the user; the next one may know
            continue
        if spec is not None:
            return _is_same(spec.origin if spec.has_location else None, file)
    return False


def _is_same(found: str | None, file: str | None) -> bool:
    if found is None or file is None:
        return found is file
    return found == file or os.path.realpath(found) == os.path.realpath(file)
