"""A private folder in which the processes of one tree find each other's queues by name.

The first process that needs it makes the folder and owns it. Its workers, and every process below it, find it through
the environment variable ``TORCHWQ_NAMESPACE``. A name is a symbolic link whose target is the file name of its owner's
socket: links are created atomically *with* their content.

Invariants:

* The folder has mode 0700 and belongs to this user; a folder that does not is never used.
* A name is created, taken over from a dead owner, or removed only under an exclusive ``flock`` on the folder's ``lock``
  file. The kernel frees that lock when its holder dies. Reading a name needs no lock.
* The maker holds a ``flock`` on ``alive``. A folder whose ``alive`` can be locked has lost its maker; the next process
  that makes a folder removes it. That is the last resort: normally the maker or its fork server removes it.

Source: flock(2), symlink(2), unix(7).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from ..errors import NamespaceError, ResourceError
from . import descriptors
from .fork import closed_in_child, reset_in_child
from .timing import LOCK_TIMEOUT, MIN_ORPHAN_AGE, POLL_INTERVAL

VARIABLE: Final = "TORCHWQ_NAMESPACE"
_PREFIX: Final = "torchwq-"
#: The longest path that fits into a sockaddr_un on every system, less the file name of a socket.
_MAX_FOLDER_PATH: Final = 100 - 30


class Namespace:
    """One namespace folder. ``made``: by this process, not by one above it."""

    def __init__(self, path: str, *, made: bool) -> None:
        self.path = path
        self.made = made
        self._alive_fd = -1
        if made:
            self._alive_fd = _open(f"{path}/alive", os.O_CREAT)
            fcntl.flock(self._alive_fd, fcntl.LOCK_EX)
            closed_in_child(self)

    def _entry(self, name: str) -> str:
        return f"{self.path}/n-{hashlib.sha256(name.encode()).hexdigest()[:40]}"

    def lookup(self, name: str) -> str | None:
        """Path of the socket of the name's owner, dead or alive; None if the name does not exist."""
        try:
            return f"{self.path}/{os.readlink(self._entry(name))}"
        except FileNotFoundError:
            return None

    def claim(self, name: str, socket_path: str) -> None:
        """Point the name to this process's socket. Only under ``locked``."""
        entry = self._entry(name)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(entry)
        os.symlink(os.path.basename(socket_path), entry)

    def release(self, name: str, socket_path: str) -> None:
        """Remove the name if it still points to this process's socket."""
        try:
            with self.locked():
                if self.lookup(name) == socket_path:
                    os.unlink(self._entry(name))
        except (FileNotFoundError, NamespaceError):
            pass  # the folder is gone, with the name

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock under which names change. Raises NamespaceError after LOCK_TIMEOUT."""
        try:
            fd = _open(f"{self.path}/lock", os.O_CREAT)
        except ResourceError:
            raise
        except OSError as error:
            raise NamespaceError(error.errno, f"the namespace folder {self.path} cannot be used: {error}") from error
        try:
            until = time.monotonic() + LOCK_TIMEOUT
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > until:
                        raise NamespaceError(
                            f"another process has held {self.path}/lock for {LOCK_TIMEOUT:.0f} s; is it stopped?"
                        ) from None
                    time.sleep(POLL_INTERVAL)
            yield
        finally:
            os.close(fd)

    def remove(self) -> None:
        """Remove the folder, if this process made it."""
        if self.made:
            shutil.rmtree(self.path, ignore_errors=True)
            self.abandon()

    def abandon(self) -> None:
        fd, self._alive_fd = self._alive_fd, -1
        if fd >= 0:
            os.close(fd)


def _open(path: str, flags: int = 0) -> int:
    return descriptors.open_file(path, os.O_RDWR | flags)


def _usable(path: str) -> bool:
    try:
        info = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid() and stat.S_IMODE(info.st_mode) == 0o700


def _folder() -> str:
    """Where to make namespace folders: private if possible, with a path short enough for a socket's address."""
    for candidate in (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp"):
        if not candidate:
            continue
        try:
            folder = os.path.abspath(candidate)  # this process, and those below it, may change their directory
        except FileNotFoundError:  # the working directory is gone
            continue
        if len(os.fsencode(folder)) < _MAX_FOLDER_PATH and os.path.isdir(folder) and os.access(folder, os.W_OK):
            return folder
    raise NamespaceError("no writable folder with a short enough path for sockets: set TMPDIR to one")


def _sweep(folder: str) -> None:
    """Remove folders whose makers were killed together with their fork servers."""
    try:
        paths = list(Path(folder).glob(_PREFIX + "*"))
    except OSError:  # perhaps no descriptor is free: the next process does it
        return
    for path in paths:
        with contextlib.suppress(OSError):
            if not _usable(str(path)) or time.time() - path.lstat().st_mtime < MIN_ORPHAN_AGE:
                continue
            fd = _open(f"{path}/alive")
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(fd)


_current: Namespace | None = None
_guard = threading.RLock()
_on_made: list[Callable[[str], None]] = []


@reset_in_child
def _demote() -> None:
    """A forked child is below the maker: it does not remove the folder."""
    global _current, _guard
    _guard = threading.RLock()
    if _current is not None:
        _current = Namespace(_current.path, made=False)


def on_made(callback: Callable[[str], None]) -> None:
    """Call ``callback(path)`` after this process has made a folder, so that its removal can be arranged."""
    _on_made.append(callback)


def current() -> Namespace:
    """The namespace of this process tree; made now if there is none yet.

    Raises NamespaceError if no folder can be made.
    """
    global _current
    with _guard:
        if _current is not None and _usable(_current.path):
            return _current
        inherited = os.environ.get(VARIABLE, "")
        if os.path.isabs(inherited) and _usable(inherited):
            _current = Namespace(inherited, made=False)
            return _current
        folder = _folder()
        _sweep(folder)
        path = tempfile.mkdtemp(prefix=_PREFIX, dir=folder)
        try:
            made = Namespace(path, made=True)
        except BaseException:
            for remove, name in ((os.unlink, f"{path}/alive"), (os.rmdir, path)):  # without a descriptor
                with contextlib.suppress(OSError):
                    remove(name)
            raise
        if _current is not None and not os.path.exists(_current.path):
            _current.abandon()  # the folder was removed
        _current = made
        os.environ[VARIABLE] = _current.path
        for callback in _on_made:
            callback(_current.path)
        return _current


def remove() -> None:
    """End the namespace, if this process has made it."""
    global _current
    with _guard:
        if _current is not None and _current.made:
            if os.environ.get(VARIABLE) == _current.path:
                del os.environ[VARIABLE]
            _current.remove()
            _current = None
