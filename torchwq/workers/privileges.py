"""What the kernel lets a process do, and where: what a worker has from the fork server, which must fit its owner.

An owner may give up its privileges, or enter a container, after its fork server was started. What the server forks
would still have them. So the connection to a server remembers the standing that the owner had when the server was
started, and each order compares: a server that does not fit any more is not used.

What a process can change in itself without asking anybody (its limits, downwards, its cores, its umask, its niceness)
is not compared. A worker gets it from the thread that orders the worker, as a fork would: ``inheritable_settings``.

The calling *thread's* is looked at: on Linux credentials, namespaces and cores belong to threads.
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Hashable
from typing import Any, Final

from ..transport import descriptors

_NAMESPACES: Final = ("cgroup", "ipc", "mnt", "net", "pid_for_children", "time_for_children", "user", "uts")
#: Lines of /proc/<pid>/status that tell what the kernel lets a process do.
_STATUS_FIELDS: Final = ("Cap", "NoNewPrivs:", "Seccomp")
_MAX_FILE_SIZE: Final = 1 << 16
_LIMITS: Final = sorted({value for name, value in vars(resource).items() if name.startswith("RLIMIT_")})


def current() -> tuple[Hashable, ...]:
    """Credentials, capabilities, filters, namespaces, root and control group of the calling thread.

    What cannot be looked at, for want of /proc, is left out.
    """
    return (*_credentials(), *_kernel_state())


def _credentials() -> tuple[Hashable, ...]:
    ids = (os.getresuid(), os.getresgid()) if hasattr(os, "getresuid") else (os.getuid(), os.geteuid(), os.getgid())
    return (*ids, tuple(sorted(os.getgroups())))


def _kernel_state() -> tuple[Hashable, ...]:
    lines = tuple(line for line in _read("status").splitlines() if line.startswith(_STATUS_FIELDS))
    links = []
    for name in _NAMESPACES:
        try:
            links.append(os.readlink(f"/proc/thread-self/ns/{name}"))
        except OSError:
            links.append("")
    root = os.stat("/")
    return lines, tuple(links), (root.st_dev, root.st_ino), _read("cgroup"), _read("attr/current")


def _read(name: str) -> str:
    try:
        fd = descriptors.open_file(f"/proc/thread-self/{name}", os.O_RDONLY)
    except OSError:
        return ""
    try:
        return os.read(fd, _MAX_FILE_SIZE).decode(errors="replace")
    except OSError:
        return ""
    finally:
        os.close(fd)


def hard_limits() -> list[int]:
    """The hard resource limits of this process, in the order of their numbers."""
    return [resource.getrlimit(number)[1] for number in _LIMITS]


def allows(hard: list[int]) -> bool:
    """Whether a process with these hard limits can take on the limits that this one has now: nobody can raise them."""
    return all(_at_most(mine, theirs) for mine, theirs in zip(hard_limits(), hard, strict=True))


def _at_most(limit: int, other: int) -> bool:
    return other == resource.RLIM_INFINITY or (limit != resource.RLIM_INFINITY and limit <= other)


def inheritable_settings() -> dict[str, Any]:
    """What a worker takes over from the thread that orders it: limits, cores, umask, niceness."""
    return {
        "limits": [(number, *resource.getrlimit(number)) for number in _LIMITS],
        "cores": os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None,
        "umask": _umask(),
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
    }


def _umask() -> int:
    for line in _read("status").splitlines():
        if line.startswith("Umask:"):
            return int(line.split()[1], 8)
    # It can only be asked for by setting it. What another thread makes meanwhile is nobody else's to read.
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def apply_settings(settings: dict[str, Any]) -> None:
    """Take over, in a worker, its owner's ``inheritable_settings``. Raises OSError or ValueError if that is refused."""
    os.umask(settings["umask"])
    for number, soft, hard in settings["limits"]:
        if resource.getrlimit(number) != (soft, hard):
            resource.setrlimit(number, (soft, hard))
    if settings["cores"] is not None and os.sched_getaffinity(0) != settings["cores"]:
        os.sched_setaffinity(0, settings["cores"])
    if os.getpriority(os.PRIO_PROCESS, 0) != settings["nice"]:
        with contextlib.suppress(PermissionError):  # to a lower niceness: it was given to the owner by somebody else
            os.setpriority(os.PRIO_PROCESS, 0, settings["nice"])
