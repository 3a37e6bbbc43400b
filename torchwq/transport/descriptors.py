"""Makes and closes descriptors: never in the place of a standard stream, and with a fallback for a refused call.

A program may run with its stdin, stdout or stderr closed (``>&-``), and what is opened next gets the closed one's
number. Code that prints then, in this process or in one that it starts, writes into a queue's socket or a tensor's
memory.

Invariants:

* No descriptor of this library is below 3. Code that makes several at once, or makes them in C, calls ``fill_stdio``
  before; code that makes or receives single ones passes each through ``above_stdio``.
* A standard descriptor that this library finds closed has /dev/null from then on. So torch, which duplicates
  descriptors by itself, does not get it either.
* A call that a system may refuse (by seccomp, in a sandbox) has its fallback here, if there is one.
* A function that gets no descriptor raises ResourceError, which names the call and the limit, and leaves nothing open.
* An object that owns descriptors has them closed by ``close_with``: once, when it says so or is garbage. Not by
  ``__del__``, which runs on objects that are half made and in an interpreter that is half gone. ``close_with`` costs
  1.7 µs an object (``__del__``: 0.2), so an object that owns descriptors is made for a handle, a block or a worker, and
  for a message only if it brings descriptors of its own, each of which takes system calls.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import select
import socket
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from ..errors import ResourceError, TorchwqError

_FIRST_OWN: Final = 3
_SHM_FOLDER: Final = "/dev/shm"
#: Bytes of the longest name that memfd_create(2) takes.
_MAX_NAME: Final = 249
#: Errors of a system call that a filter or an old kernel refuses.
REFUSALS: Final = frozenset({errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EINVAL, errno.EOPNOTSUPP})
#: Errors that say that no descriptor is free for now.
SHORTAGE: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


def resource_error(error: OSError, call: str = "") -> OSError:
    """A ResourceError that names the limit behind an OSError of a memory or descriptor call.

    An error of this library names it already, and is returned as it is.
    """
    if isinstance(error, TorchwqError):
        return error
    said = os.strerror(error.errno or 0)
    if error.errno in (errno.EMFILE, errno.ENFILE):
        remedy = "too many open file descriptors (RLIMIT_NOFILE): raise the limit with `ulimit -n`"
    elif error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
        remedy = "no memory left for shared memory: look at the memory limit of the machine, container or cgroup"
    elif call and error.errno in REFUSALS:
        remedy = (
            f"this system refuses {call} ({said}): allow that call, in the seccomp filter or policy of the sandbox or "
            f"container"
        )
    else:
        remedy = f"shared memory cannot be used ({f'{call}: ' if call else ''}{said})"
    return ResourceError(error.errno or 0, remedy)


@contextlib.contextmanager
def _calling(call: str, *, has_fallback: bool = False) -> Iterator[None]:
    """Turn errors of a system call into ResourceErrors; go on if the system refuses a call that has a fallback."""
    try:
        yield
    except (ProcessLookupError, TorchwqError):
        raise
    except OSError as error:
        if not has_fallback or error.errno not in REFUSALS:
            raise resource_error(error, call) from error


@contextlib.contextmanager
def closed_on_error(fds: list[int]) -> Iterator[None]:
    """Close the descriptors that are in the list when an error comes."""
    try:
        yield
    except BaseException:
        close_fds(fds)
        raise


def fill_stdio() -> None:
    """Put /dev/null in the place of each standard stream that is closed."""
    for fd in range(_FIRST_OWN):
        try:
            fcntl.fcntl(fd, fcntl.F_GETFD)
        except OSError:
            _put_null(fd)


def _put_null(fd: int) -> None:
    with _calling("open"):
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    if null == fd:
        os.set_inheritable(fd, True)  # as standard streams are
        return
    os.dup2(null, fd)
    os.close(null)


def above_stdio(fd: int) -> int:
    """The same file at a descriptor that is no standard stream's; takes over ``fd``."""
    if fd >= _FIRST_OWN:
        return fd
    with closed_on_error([fd]):
        moved = dup(fd)
    _put_null(fd)
    return moved


def dup(fd: int) -> int:
    """Another descriptor of the same file, closed on exec."""
    with _calling("fcntl"):
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_OWN)


def dup_all(fds: Sequence[int]) -> list[int]:
    """Those of several files. If one cannot be had, none is left open."""
    made: list[int] = []
    with closed_on_error(made):
        for fd in fds:
            made.append(dup(fd))
    return made


def all_above_stdio(fds: Sequence[int]) -> list[int]:
    """What ``above_stdio`` gives for each. If one cannot be moved, all are closed."""
    moved = list(fds)
    with closed_on_error(moved):
        for index, fd in enumerate(moved):
            moved[index] = -1  # ``above_stdio`` closes it if it fails
            moved[index] = above_stdio(fd)
    return moved


def close_with(owner: object, *fds: int) -> weakref.finalize[[tuple[int, ...]], object]:
    """Have ``fds`` closed when ``owner`` is garbage, or when what this returns is called, if that is earlier.

    The end of the process closes them by itself. Those below 0 are none. In a garbage cycle they are closed before any
    ``__del__`` runs, so code that a ``__del__`` may call asks first whether the finalizer is ``alive``.
    """
    closing = weakref.finalize(owner, close_fds, fds)
    closing.atexit = False
    return closing


def close_fds(fds: Iterable[int]) -> None:
    """Close descriptors; those below 0 are none."""
    for fd in fds:
        if fd >= 0:
            try:
                os.close(fd)
            except OSError:
                pass


def open_file(path: str, flags: int, mode: int = 0o600) -> int:
    """A descriptor of a file. Raises ResourceError if none is free, else OSError as ``os.open``."""
    try:
        fd = os.open(path, flags | os.O_CLOEXEC, mode)
    except OSError as error:
        if error.errno in SHORTAGE:
            raise resource_error(error) from error
        raise
    return above_stdio(fd)


def map_file(fd: int, nbytes: int, flags: int = mmap.MAP_SHARED) -> mmap.mmap:
    """A writable mapping of a file, with a descriptor of its own."""
    fill_stdio()
    with _calling("mmap"):
        return mmap.mmap(fd, nbytes, flags, mmap.PROT_READ | mmap.PROT_WRITE)


def socketpair(kind: socket.SocketKind = socket.SOCK_STREAM) -> tuple[socket.socket, socket.socket]:
    """Two connected AF_UNIX sockets."""
    fill_stdio()
    with _calling("socketpair"):
        return socket.socketpair(socket.AF_UNIX, kind)


def unix_socket(kind: socket.SocketKind) -> socket.socket:
    """An AF_UNIX socket."""
    fill_stdio()
    with _calling("socket"):
        return socket.socket(socket.AF_UNIX, kind)


def epoll() -> select.epoll | None:
    """An epoll; None where the system has none, or refuses it: the caller uses ``poll`` then."""
    if not hasattr(select, "epoll"):
        return None
    fill_stdio()
    made = None
    with _calling("epoll_create1", has_fallback=True):
        made = select.epoll()
    return made


def eventfd() -> int | None:
    """An eventfd of 0 that does not block; None where the system has none, or refuses it."""
    if not hasattr(os, "eventfd"):
        return None
    fd = None
    with _calling("eventfd2", has_fallback=True):
        fd = above_stdio(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
    return fd


def pidfd(pid: int) -> int | None:
    """A descriptor of a process, readable when it has ended; None where the system has none, or refuses it.

    Raises ProcessLookupError if there is no such process. Source: pidfd_open(2), since Linux 5.3.
    """
    if not hasattr(os, "pidfd_open"):
        return None
    fd = None
    with _calling("pidfd_open", has_fallback=True):
        fd = above_stdio(os.pidfd_open(pid))
    return fd


def pipe() -> tuple[int, int]:
    """Both ends of a pipe; reading does not block."""
    fill_stdio()
    with _calling("pipe2"):
        read, write = os.pipe()
    os.set_blocking(read, False)
    return read, write


def memory_file(name: str, nbytes: int = 0) -> int:
    """A file without a name of ``nbytes`` zero bytes, in memory if the system allows that."""
    fd = _unnamed(name)
    with closed_on_error([fd]), _calling("ftruncate"):
        os.ftruncate(fd, nbytes)
    return fd


def _unnamed(name: str) -> int:
    if hasattr(os, "memfd_create"):
        with _calling("memfd_create", has_fallback=True):
            shown = name.replace("\0", "?").encode("utf-8", "replace")[:_MAX_NAME].decode("utf-8", "ignore")
            return above_stdio(os.memfd_create(shown, os.MFD_CLOEXEC))
    folder = _SHM_FOLDER if os.access(_SHM_FOLDER, os.W_OK | os.X_OK) else None
    with _calling("memfd_create, and files in /dev/shm or the temporary folder"):
        fd, path = tempfile.mkstemp(prefix="torchwq-", dir=folder)
    os.unlink(path)
    return above_stdio(fd)
