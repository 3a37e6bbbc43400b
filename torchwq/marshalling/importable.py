"""Which modules another process can import under their names.

That a module is in ``sys.modules`` does not say so: a plugin that was loaded from its file, what ``runpy`` runs and
what was made by hand are there too, and no other process would find them. So the finders are asked, once for each
module, whether they would find it, and where.

The script is never importable, however it is called: ``__main__``, or ``__mp_main__`` in a process that multiprocessing
has spawned. A worker has none of it; only a forked one that writes to the process it was forked from may name it.
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
    #: Whether whoever reads what this thread encodes just now has the same ``__main__``: it forked this process.
    has_main = False


reader: Final = _Reader()
#: What the finders have said of a module, by its name.
_verdicts: dict[str, tuple[weakref.ref[Any], bool]] = {}


def is_main(name: str, module: Any) -> bool:
    """Whether the module is the script's, under whatever name."""
    return name in MAIN or module is sys.modules.get("__main__")


def is_importable(name: str, module: Any) -> bool:
    """Whether another process that imports ``name`` gets this module, which ``sys.modules`` has under that name."""
    if is_main(name, module):
        return reader.has_main and module is sys.modules.get("__main__")
    known = _verdicts.get(name)
    if known is not None and known[0]() is module:
        return known[1]
    verdict = _would_be_found(name, module)
    try:
        _verdicts[name] = weakref.ref(module), verdict
    except TypeError:  # something else than a module stands there
        pass
    return verdict


def _would_be_found(name: str, module: Any) -> bool:
    if name in sys.stdlib_module_names or name in sys.builtin_module_names:
        return True
    if not isinstance(module, types.ModuleType):
        return True  # what a library has put in a module's place comes with the library
    parent = name.rpartition(".")[0]
    file = getattr(module, "__file__", None)
    path = None
    if parent:
        package = sys.modules.get(parent)
        if package is None or not is_importable(parent, package):
            return False
        path = getattr(package, "__path__", None)
        if file is None or path is None:
            return True  # its package makes it, as torch makes torch._C._nn
    for finder in sys.meta_path:
        try:
            spec = finder.find_spec(name, path)
        except Exception:  # a finder of somebody's; the next one may know
            continue
        if spec is not None:
            return _is_same(spec.origin if spec.has_location else None, file)
    return False


def _is_same(found: str | None, file: str | None) -> bool:
    if found is None or file is None:
        return found is file
    return found == file or os.path.realpath(found) == os.path.realpath(file)
