"""``python -m torchwq doctor``: limits, memory, the native part, and a queue that is tried out.

Each check is a function that returns one finding. A finding that is not good says what to do.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from .. import native
from ..mapping import map as start_workers
from ..queues import workqueue
from ..transport import kinds
from ..transport.waiting import cores
from ..workers.starting import warm_up

GOOD, LIMITED, FAILS = "good", "limited", "fails"

#: Descriptors that a loader with some workers, or a queue with some tensors in flight, is comfortable with.
_ENOUGH_DESCRIPTORS: Final = 1024
_ENOUGH_SHM: Final = 1 << 30
_GIB: Final = 1 << 30


@dataclass(frozen=True)
class Finding:
    """What one check has found: ``verdict`` is GOOD, LIMITED or FAILS; ``remedy`` says what to do, if anything."""

    what: str
    verdict: str
    found: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Run all checks."""
    findings = []
    for check in CHECKS:
        try:
            findings.append(check())
        except Exception as error:
            what = (check.__doc__ or check.__name__).rstrip(".")
            findings.append(Finding(what, FAILS, f"{type(error).__name__}: {error}", "please report this"))
    return findings


def as_text(findings: Sequence[Finding]) -> str:
    """A line for each finding, and one below it with the remedy."""
    width = max(len(each.what) for each in findings)
    lines = []
    for each in findings:
        lines.append(f"{each.verdict:8} {each.what:{width}}  {each.found}")
        if each.remedy:
            lines.append(f"{'':8} {'':{width}}  -> {each.remedy}")
    worst = [each for each in findings if each.verdict == FAILS]
    lines.append("")
    lines.append(f"{len(worst)} of {len(findings)} checks failed" if worst else "torchwq works here")
    return "\n".join(lines)


def _versions() -> Finding:
    """Versions."""
    from .. import __version__

    return Finding(
        "versions", GOOD, f"torchwq {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    )


def _native() -> Finding:
    """The native part."""
    if native:
        return Finding("native part", GOOD, "in use")
    remedy = "install a C compiler and Python's headers, and install torchwq again: messages then cost a third"
    return Finding("native part", LIMITED, f"not in use: {native.reason}", remedy)


def _transport() -> Finding:
    """Sockets."""
    ours, theirs = kinds.pair()
    with contextlib.closing(ours), contextlib.closing(theirs):
        name, limit = type(ours).__module__.rsplit(".", 1)[-1], ours.max_payload
    return Finding("sockets", GOOD, f"{name}, messages of up to {limit:,} bytes, larger ones through memory")


def _cores() -> Finding:
    """Cores."""
    here, all_of_them = cores(), os.cpu_count() or 1
    if here < all_of_them:
        return Finding("cores", GOOD, f"{here} of {all_of_them}: an affinity mask or a cgroup's quota limits them")
    return Finding("cores", GOOD, str(here))


def _memory() -> Finding:
    """Memory."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _cgroup_limit()
    if limit is not None and limit < total:
        return Finding("memory", GOOD, f"{limit / _GIB:.1f} GiB: the cgroup's limit, of {total / _GIB:.1f} GiB")
    return Finding("memory", GOOD, f"{total / _GIB:.1f} GiB")


def _cgroup_limit() -> int | None:
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path, encoding="ascii") as file:
                return int(file.read())
        except (OSError, ValueError):
            continue
    return None


def _shm() -> Finding:
    """/dev/shm."""
    try:
        size = shutil.disk_usage("/dev/shm").total
    except OSError:
        return Finding("/dev/shm", GOOD, "not there; torchwq needs none")
    if hasattr(os, "memfd_create"):
        found = f"{size / _GIB:.2f} GiB; torchwq's memory is not there (memfd)"
        if size < _ENOUGH_SHM:
            remedy = "only private tensors with views need room there: docker run --shm-size=1g, if an error says so"
            return Finding("/dev/shm", LIMITED, found, remedy)
        return Finding("/dev/shm", GOOD, found)
    verdict = GOOD if size >= _ENOUGH_SHM else LIMITED
    remedy = "" if verdict == GOOD else "this system has no memfd, so tensors go there: docker run --shm-size=8g"
    return Finding("/dev/shm", verdict, f"{size / _GIB:.2f} GiB", remedy)


def _descriptors() -> Finding:
    """Descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{soft:,} (ulimit -n), at most {hard:,}" if hard != resource.RLIM_INFINITY else f"{soft:,} (ulimit -n)"
    if soft < _ENOUGH_DESCRIPTORS:
        remedy = f"ulimit -n {_ENOUGH_DESCRIPTORS}: where they run out, tensors are copied, or an error says so"
        return Finding("descriptors", LIMITED, found, remedy)
    return Finding("descriptors", GOOD, found)


def _processes() -> Finding:
    """Processes."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    limit = "no limit" if soft == resource.RLIM_INFINITY else f"{soft:,} (ulimit -u)"
    return Finding("processes", GOOD if soft == resource.RLIM_INFINITY or soft >= 256 else LIMITED, limit)


def _start() -> Finding:
    """Starting a worker."""
    began = time.perf_counter()
    warm_up()
    warm = time.perf_counter() - began
    began = time.perf_counter()
    start_workers(1, abs, -1).join(timeout=60)
    return Finding("a worker", GOOD, f"starts in {time.perf_counter() - began:.2f} s, the first in {warm:.1f} s more")


def _echo(questions: Any) -> None:
    for question in questions:
        questions.write(question)


def _queue() -> Finding:
    """A queue."""
    tensor = torch.zeros(3)
    with workqueue() as questions:
        workers = start_workers(1, _echo, questions)
        questions.write(tensor)
        arrived = questions.read(timeout=60)
        arrived += 1
        if tensor.tolist() != [1, 1, 1]:
            return Finding("a queue", FAILS, "a tensor did not come back by reference", "please report this")
        count = 2000
        began = time.perf_counter()
        for number in range(count):
            questions.write(number)
            questions.read(timeout=60)
        seconds = time.perf_counter() - began
        questions.write(None)
        workers.join(timeout=60)
    return Finding(
        "a queue", GOOD, f"a question and its answer take {1e6 * seconds / count:.0f} µs; tensors are shared"
    )


def _load() -> Finding:
    """Load."""
    load, here = os.getloadavg()[0], cores()
    if load > 0.8 * here:
        remedy = "figures of speed that are measured now say little"
        return Finding("load", LIMITED, f"{load:.1f} processes want the {here} cores", remedy)
    return Finding("load", GOOD, f"{load:.1f} processes on {here} cores")


def _cuda() -> Finding:
    """GPU."""
    if not torch.cuda.is_available():
        return Finding("GPU", GOOD, "none that torch sees")
    return Finding("GPU", GOOD, torch.cuda.get_device_name())


CHECKS: Final[Sequence[Callable[[], Finding]]] = (
    _versions,
    _native,
    _transport,
    _cores,
    _load,
    _memory,
    _shm,
    _descriptors,
    _processes,
    _cuda,
    *((_start, _queue) if sys.platform in ("linux", "darwin") else ()),
)
