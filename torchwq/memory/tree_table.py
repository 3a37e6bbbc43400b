"""The reference table of this process's tree: the process that makes the namespace makes it, the others open it.

They open it by the descriptor of the process that has made it, through a symbolic link into ``/proc``. That process may
have ended, or run another program, and its id or its descriptor's number may stand for another file. So a process
checks that the file is a table before it changes a byte, and tries again later if it is none.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import platform
import stat
import threading
import time
from typing import Final

from .. import _native
from ..errors import NamespaceError
from ..transport import descriptors, namespace
from ..transport.atomic import HAS_GIL
from ..transport.fork import reset_in_child
from . import ref_table
from .ref_table import RefTable

_FILE: Final = "ref-table"
#: Seconds until a failed opening is tried again: other processes may have ended by then, and have left a slot.
_RETRY_INTERVAL: Final = 10.0

_lock = threading.RLock()
_table: RefTable | None = None
_retry_at = 0.0
#: Whether a thread is opening the table: a finalizer that it runs meanwhile gets none.
_is_opening = False
#: Why this process has no reference table, although the system supports it; "" otherwise.
failure_reason = ""
#: In the process that has made the tree's namespace: the table's descriptor, by which others open it.
_made_fd = -1


@reset_in_child
def _reset() -> None:
    global _lock, _retry_at, _is_opening, failure_reason, _made_fd
    _lock, _retry_at, _is_opening, failure_reason = threading.RLock(), 0.0, False, ""
    use(None)
    if _made_fd >= 0:
        os.close(_made_fd)
        _made_fd = -1


def _on_namespace_made(path: str) -> None:
    """Put a reference table into the namespace that this process has made."""
    global _made_fd, _retry_at
    try:
        if _made_fd < 0:
            _made_fd = ref_table.create()
        os.symlink(f"/proc/{os.getpid()}/fd/{_made_fd}", f"{path}/{_FILE}")
        _retry_at = 0.0
    except (AttributeError, OSError):
        pass  # the system does not support it: tensors travel by descriptor alone


namespace.on_made(_on_namespace_made)


def use(table: RefTable | None) -> None:
    """Use this table from now on."""
    global _table
    _table = table
    if _native.core is not None:
        _native.core.set_counts(None if table is None else table.counts)


def current() -> RefTable | None:
    """The reference table of this process's tree; None if this process can use none."""
    global _retry_at, _is_opening
    if _table is None and time.monotonic() >= _retry_at:
        with _lock:
            if not _is_opening and time.monotonic() >= _retry_at:  # else another thread has tried meanwhile
                _is_opening = True
                try:
                    use(_open())
                    _retry_at = time.monotonic() + _RETRY_INTERVAL
                finally:
                    _is_opening = False
    return _table


@functools.cache
def _is_supported() -> bool:
    if not HAS_GIL or platform.machine() not in ("x86_64", "AMD64"):  # see Note [order of loads]
        return False
    return all(hasattr(*each) for each in ((os, "SEEK_DATA"), (fcntl, "F_OFD_SETLK"), (fcntl, "F_GET_SEALS")))


def _open() -> RefTable | None:
    global failure_reason
    failure_reason = ""
    if not _is_supported():
        return None
    path = f"{namespace.current().path}/{_FILE}"
    try:
        place = os.readlink(path)
    except OSError:
        return None
    fd = -1
    try:
        # Opening a device, a FIFO or a socket may have effects.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise NamespaceError(errno.EINVAL, "this is no reference table of torchwq, and no file")
        fd = descriptors.open_file(path, os.O_RDWR)
        return RefTable(fd)
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        failure_reason = (
            f"{place}, where the process that has made {path} had its reference table: {error}. If that process has "
            f"ended, or is in another PID namespace, unset {namespace.VARIABLE}, so that this one makes a folder"
        )
        return None
