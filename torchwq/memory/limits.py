"""How much shared memory and how many descriptors this process may use, and which limit it has reached.

A program cannot handle what the kernel does at a limit: a missing page of shared memory is a bus error, and a process
that outgrows its control group is killed. So memory that would not fit is refused before the kernel is asked.
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
from pathlib import Path
from typing import Final

from .. import warning
from ..errors import ResourceError
from ..transport import reactor

#: Overrides the default limit on pool memory, in bytes. Workers inherit the environment.
ENV_VARIABLE: Final = "TORCHWQ_MEMORY_LIMIT"
#: By default the pool takes one of so many of the available bytes.
_FRACTION: Final = 4
#: Bytes; for a smaller block, asking for the available memory costs more than making it.
_MIN_CHECKED: Final = 1 << 20

_CGROUPS: Final = "/sys/fs/cgroup"
_MEMINFO: Final = "/proc/meminfo"
_MAPS: Final = "/proc/sys/vm/max_map_count"

_default_limit: int | None = None
_max_open_blocks: int | None = None
_warned = _warned_of_no_reuse = False
#: Seconds.
_warning_delay = 0.0
#: How often a tensor was copied for want of descriptors.
copies = 0


def memory_limit() -> int:
    """Bytes of blocks that this process keeps for use again."""
    global _default_limit
    set_by_user = os.environ.get(ENV_VARIABLE, "").strip()
    if set_by_user:
        try:
            return max(0, int(set_by_user))
        except ValueError:
            raise ValueError(f"{ENV_VARIABLE} must be a number of bytes, not {set_by_user!r}") from None
    if _default_limit is None:
        _default_limit = available()[0] // _FRACTION
    return _default_limit


def set_memory_limit(nbytes: int | None) -> None:
    """Set or unset the limit for this process and the workers it starts."""
    if nbytes is None:
        os.environ.pop(ENV_VARIABLE, None)
        return
    if nbytes < 0:
        raise ValueError(f"a limit in bytes is needed, not {nbytes}")
    os.environ[ENV_VARIABLE] = str(nbytes)


def available() -> tuple[int, str]:
    """Bytes of memory that are left, and by which limit."""
    found = [_of_system(), *_of_cgroups()]
    return min((each for each in found if each is not None), default=(1 << 62, "no limit is known"))


def check_memory(nbytes: int) -> None:
    """Raise ResourceError, which names the limit, if fewer than ``nbytes`` bytes are left."""
    if nbytes < _MIN_CHECKED:
        return
    left, limit = available()
    if nbytes > left:
        raise ResourceError(
            0,
            f"{nbytes} bytes of shared memory are needed and {left} are left ({limit}): "
            f"drop tensors that are not needed any more, or raise that limit",
        )


def _of_system() -> tuple[int, str] | None:
    try:
        with open(_MEMINFO, encoding="ascii") as meminfo:
            for line in meminfo:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024, "the memory of the machine, MemAvailable"
    except (OSError, ValueError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "the memory of the machine"
    except (OSError, ValueError):
        return None


def _of_cgroups() -> list[tuple[int, str]]:
    """Bytes that the control groups of this process, version 2 or 1, leave it."""
    found = []
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            files = (f"{_CGROUPS}{path}", "memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            files = (f"{_CGROUPS}/memory{path}", "memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        folder, limit, usage = files
        # In a container the path is often that of the host, and its own group is at the root.
        for place in dict.fromkeys((folder, str(Path(folder).parent), _CGROUPS, f"{_CGROUPS}/memory")):
            with contextlib.suppress(OSError, ValueError):
                most = int(Path(place, limit).read_text(encoding="ascii"))
                used = int(Path(place, usage).read_text(encoding="ascii"))
                found.append((max(0, most - used), f"the limit of the control group, {place}/{limit}"))
    return found


def max_open_blocks() -> int:
    """How many blocks this process may have open: half of the limit on descriptors, or on mappings.

    Raises the soft limit on descriptors to the hard one, once.
    """
    global _max_open_blocks
    if _max_open_blocks is None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
                soft = hard
        limit = soft if soft != resource.RLIM_INFINITY else 1 << 20
        with contextlib.suppress(OSError, ValueError):
            limit = min(limit, int(Path(_MAPS).read_text(encoding="ascii")))
        _max_open_blocks = max(limit // 2, 8)
    return _max_open_blocks


def warn_of_copies() -> None:
    """Warn, once in this process, that tensors are copied for want of descriptors."""
    global _warned, copies
    copies += 1
    if not _warned:
        _warned = True
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        warning.warn(
            f"this process has as many shared tensors as its limit of {soft} open files (RLIMIT_NOFILE), or of memory "
            f"mappings (vm.max_map_count), allows. Further tensors are copied instead of "
            f"shared: a change on one side is not seen on the other. Raise the limit with `ulimit -n`, or keep fewer "
            f"tensors at a time, for example by torch.stack",
            RuntimeWarning,
        )


def warn_of_no_reuse(why: str) -> None:
    """Warn, once in this process, that shared memory which has been sent is not used again."""
    global _warned_of_no_reuse
    if not _warned_of_no_reuse:
        _warned_of_no_reuse = True
        warn = functools.partial(
            warning.warn,
            f"shared memory of this process is made anew for each message instead of being used again, which is "
            f"slower: the table in which the processes count who uses it cannot be had: {why}",
            RuntimeWarning,
        )
        if _warning_delay:
            reactor.get().call_later(_warning_delay, warn)
        else:
            warn()


def delay_warnings(seconds: float) -> None:
    """Delay warnings: if the owner has ended, and the table with it, this process ends before it warns."""
    global _warning_delay
    _warning_delay = seconds
