"""The privileges of a thread, which the workers of a fork server must share with their owner.

An owner may drop privileges, or enter a container, after its fork server has started. The server's workers would still
have the old ones. So the connection to a server remembers the owner's privileges at the server's start, and each
request compares: a server that does not fit any more gets none.

A process may change its limits (downwards), cores, umask and niceness without any privilege. These are not compared. A
worker gets them from the thread that requests it, as a child of a fork would: ``inheritable_settings``.

On Linux, credentials, namespaces and cores belong to threads, so all functions look at the calling thread.

Source: credentials(7), capabilities(7), namespaces(7), proc(5).
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Hashable
from typing import Any, Final

from ..transport import descriptors

_NAMESPACES: Final = ("cgroup", "ipc", "mnt", "net", "pid_for_children", "time_for_children", "user", "uts")
#: Lines of /proc/<pid>/status about privileges.
_STATUS_FIELDS: Final = ("Cap", "NoNewPrivs:", "Seccomp")
_MAX_FILE_SIZE: Final = 1 << 16
_LIMITS: Final = sorted({value for name, value in vars(resource).items() if name.startswith("RLIMIT_")})


def current() -> tuple[Hashable, ...]:
    """Return credentials, capabilities, filters, namespaces, root and control group of the calling thread.

    Without /proc, only the credentials and the root.
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
    """Return the hard resource limits of this process, in the order of their numbers."""
    return [resource.getrlimit(number)[1] for number in _LIMITS]


def allows(hard: list[int]) -> bool:
    """Whether a process with the limits ``hard`` can lower them to those of this process."""
    unlimited = resource.RLIM_INFINITY
    return all(
        theirs == unlimited or (ours != unlimited and ours <= theirs)
        for ours, theirs in zip(hard_limits(), hard, strict=True)
    )


def inheritable_settings() -> dict[str, Any]:
    """Return limits, cores, umask and niceness, which a worker gets from the thread that requests it."""
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
    # Reading it means setting it: no other user may read a file that another thread makes meanwhile.
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
        with contextlib.suppress(PermissionError):  # only root lowers niceness, as for the owner
            os.setpriority(os.PRIO_PROCESS, 0, settings["nice"])
