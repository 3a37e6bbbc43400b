"""Finds the Python interpreter that the fork server runs on.

That is ``sys.executable``, unless Python is embedded in another program: then ``sys.executable`` may be None, empty, a
folder, or that other program, which must not be started a second time. So a candidate is run only if its name is that
of a Python interpreter, and only if it is not the program that runs here; and it is taken only if it reports the same
build of Python.

Source: ``multiprocessing.set_executable``, which has the same purpose and checks nothing.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import spawn
from typing import Final

from ..errors import WorkerStartError

#: Names of interpreters: python3.11, python3.13t, pypy3, mayapy, hython.
_PYTHON: Final = re.compile(r"(ython|py)[0-9.]*[a-z]?(\.exe)?$", re.IGNORECASE)
#: How many seconds a candidate may take to report its build.
_PROBE_TIMEOUT: Final = 30.0
#: Distinguishes versions, builds and platforms whose extension modules do not fit each other.
_EXTENSION_SUFFIX: Final = importlib.machinery.EXTENSION_SUFFIXES[0]
_PROBE: Final = "import importlib.machinery as m; print(m.EXTENSION_SUFFIXES[0])"
_REMEDY: Final = "name this Python's interpreter with torchwq.set_executable(path)"

_set_by_user: str | None = None
#: ``sys.executable`` when ``find`` searched, and the result.
_found: tuple[object, str] | None = None


def set_executable(path: str | bytes | os.PathLike[str] | None) -> None:
    """Set the Python interpreter that runs workers.

    Needed where Python is embedded in another program, and ``sys.executable`` is that program or empty. Running workers
    are not affected.

    Args:
        path: the interpreter, of the same version and build as the one that runs here; None to search for it again.

    Raises:
        WorkerStartError: ``path`` is no such interpreter; the message says why.

    Source: ``multiprocessing.set_executable``.
    """
    global _set_by_user, _found
    if path is None:
        _set_by_user = _found = None
        return
    program = os.path.abspath(os.fsdecode(path))
    fault = _fault(program) or _probe_fault(program)
    if fault:
        raise WorkerStartError(f"{program} cannot run workers: {fault}")
    _set_by_user = program


def find() -> str:
    """Return the interpreter; searches once. Raises WorkerStartError if there is none."""
    global _found
    if _set_by_user is not None:
        return _set_by_user
    if _found is None or _found[0] != sys.executable:
        _found = sys.executable, _search()
    return _found[1]


def set_by_user() -> str | None:
    """Return the interpreter that ``set_executable`` has set."""
    return _set_by_user


@contextlib.contextmanager
def for_multiprocessing() -> Iterator[None]:
    """Make multiprocessing start this interpreter, too. Raises WorkerStartError if there is none."""
    before, program = spawn.get_executable(), find()
    if before and os.fsdecode(before) == program:
        yield
        return
    spawn.set_executable(program)
    try:
        yield
    finally:
        spawn.set_executable(before)


def _search() -> str:
    faults: dict[str, str] = {}
    for candidate in _candidates():
        if candidate in faults:
            continue
        fault = _fault(candidate)
        if not fault and not _PYTHON.search(os.path.basename(candidate)):
            fault = "by its name it is another program"
        if not fault and not _is_running_here(candidate):
            fault = _probe_fault(candidate)
        if not fault:
            return candidate
        faults[candidate] = fault
    looked_at = "; ".join(f"{candidate}: {fault}" for candidate, fault in faults.items())
    raise WorkerStartError(
        f"no Python interpreter to start workers with was found (sys.executable is {sys.executable!r}; {looked_at}): "
        f"{_REMEDY}"
    )


def _candidates() -> Iterator[str]:
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    paths = [sys.executable, spawn.get_executable(), getattr(sys, "_base_executable", None)]
    for prefix in (sys.exec_prefix, sys.base_exec_prefix):
        paths += [f"{prefix}/bin/python{version}{getattr(sys, 'abiflags', '')}", f"{prefix}/bin/python3"]
    for path in paths:
        if path:
            yield os.path.abspath(os.fsdecode(path))


def _is_running_here(program: str) -> bool:
    try:
        return os.path.samefile(program, "/proc/self/exe")
    except OSError:
        return False


def _fault(program: str) -> str:
    """Return why ``program`` cannot be executed; empty if it can."""
    if not os.path.exists(program):
        return "there is no such file, or this user may not look there"
    if not os.path.isfile(program):
        return "it is not a file"
    if not os.access(program, os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        return "this user may not execute it"
    return ""


def _probe_fault(program: str) -> str:
    """Run ``program``; return why it is not an interpreter of this build, empty if it is."""
    try:
        answer = subprocess.run(
            [program, "-I", "-S", "-c", _PROBE],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_PROBE_TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return f"it has not said within {_PROBE_TIMEOUT:.0f} s which Python it is"
    except OSError as error:
        return str(error.strerror)
    said = answer.stdout.decode(errors="replace").strip()
    if said == _EXTENSION_SUFFIX:
        return ""
    return f"it is not the Python that runs here ({_EXTENSION_SUFFIX}): asked which one it is, it said {said[:80]!r}"
