"""``python -m torchwq top``: what the queues and loaders of this user's processes are doing.

Nothing runs in those processes for it. Queues and loaders count in shared memory anyway, and that memory has a name by
which ``/proc`` shows it. This maps it read-only and looks at the counts twice: the difference is the rate. So there is
nothing to turn on, and a process that hangs is shown like any other. Without ``/proc`` or memfd there is no ``top``.

What shares one mapping is one queue or loader. Of the processes that have it, the one that is older than all others
made it: workers come later.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from ..loading import counters as loader_counters
from ..peers.shared_words import WORD
from ..queues import counters as queue_counters

_QUEUE, _LOADER, _FLOW = (
    f"/memfd:{name}"
    for name in (queue_counters.MEMORY_NAME, loader_counters.MEMORY_NAME, loader_counters.FLOW_MEMORY_NAME)
)
_DELETED: Final = " (deleted)"
_SECOND: Final = 1e9


@dataclass(frozen=True)
class Row:
    """One queue or loader.

    Attributes:
        kind: "queue" or "loader".
        pid, command: of the process that made it.
        name: the queue's, or the class of the loader's dataset; empty for an anonymous queue.
        workers: handles of other processes on a queue, or workers of a loader.
        depth: questions that were sent and that no worker has taken, or batches that the loop has not.
        rate: questions taken, or batches made, a second.
        busy: part of the workers' time, from 0 to 1: at a question, or making batches.
        waiting: of a loader, part of the workers' time in which they had nothing to do, or were far enough ahead.
        ahead: of that, the part in which they were far enough ahead.
        processor: of a loader, processors in use by its workers.
    """

    kind: str
    pid: int
    command: str
    name: str
    workers: int
    depth: int
    rate: float
    busy: float
    waiting: float = 0.0
    ahead: float = 0.0
    processor: float = 0.0


@dataclass
class _Mapping:
    """Shared memory that was found, and who has it."""

    name: str
    path: str
    pids: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class _Look:
    """The words of all that was found, at one moment."""

    at: float
    queues: dict[int, tuple[_Mapping, Sequence[int]]]
    loaders: dict[int, tuple[_Mapping, Sequence[int]]]
    flows: dict[int, Sequence[int]]


def _processes() -> Iterator[int]:
    me = os.getuid()
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if entry.stat().st_uid == me:
                    yield int(entry.name)


def _mappings() -> dict[int, _Mapping]:
    """By inode."""
    found: dict[int, _Mapping] = {}
    for pid in _processes():
        with contextlib.suppress(OSError):  # it has ended, or may not be looked at
            for fd in os.scandir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    target = os.readlink(fd.path)
                    if target.startswith((_QUEUE, _LOADER, _FLOW)):
                        mapping = found.setdefault(os.stat(fd.path).st_ino, _Mapping(target, fd.path))
                        if pid not in mapping.pids:
                            mapping.pids.append(pid)
    return found


def _words(path: str) -> Sequence[int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
            return memoryview(mapped[: len(mapped) // WORD * WORD]).cast("Q").tolist()
    finally:
        os.close(fd)


def _look() -> _Look:
    look = _Look(time.monotonic(), {}, {}, {})
    for inode, mapping in _mappings().items():
        with contextlib.suppress(OSError, ValueError):
            words = _words(mapping.path)
            if mapping.name.startswith(_QUEUE):
                look.queues[inode] = mapping, words
            elif mapping.name.startswith(_LOADER):
                look.loaders[inode] = mapping, words
            else:
                look.flows[int(mapping.name[len(_FLOW) :].removesuffix(_DELETED))] = words
    return look


def _started(pid: int) -> int:
    """When a process was started, in ticks since the boot; processes that have ended come last."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
            return int(stat.read().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 1 << 62


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as line:
            words = line.read().split("\0")
    except OSError:
        return ""
    program = [os.path.basename(words[0]), *(word for word in words[1:] if word)]
    return " ".join(" ".join(program).split())


def _maker(mapping: _Mapping) -> tuple[int, str, str]:
    """The process that made it, its command, and the name of the queue or dataset."""
    pid = min(mapping.pids, key=lambda each: (_started(each), each))
    return pid, _command(pid), mapping.name.partition(":")[2].partition(":")[2].removesuffix(_DELETED)


def _of_queue(mapping: _Mapping, words: Sequence[int], before: Sequence[int], seconds: float) -> Row:
    width, busy_unit = queue_counters.WIDTH, queue_counters.BUSY

    def taken(words: Sequence[int]) -> int:
        return words[queue_counters.TAKEN_BY_GONE] + sum(state // busy_unit for state in words[width + 1 :: width])

    states = words[width + 1 :: width]
    workers = sum(1 for state in states if state)
    busy = sum(1 for state in states if state % busy_unit)
    pid, command, name = _maker(mapping)
    rate = max(0, taken(words) - taken(before)) / seconds
    depth = max(0, words[queue_counters.SENT] - taken(words))
    return Row("queue", pid, command, name, workers, depth, rate, busy / max(1, workers))


def _of_loader(
    mapping: _Mapping, words: Sequence[int], before: Sequence[int], flow: Sequence[int], seconds: float
) -> Row:
    width = loader_counters.WORDS

    def grown(word: int) -> int:
        return sum(words[word::width]) - sum(before[word::width])

    places = range(0, len(words), width)
    waited, busy = loader_counters.WAITED, loader_counters.BUSY
    workers = sum(1 for place in places if words[place + waited] or words[place + busy])
    whole = max(1, workers) * seconds * _SECOND
    made, consumed = loader_counters.MADE, loader_counters.CONSUMED
    depth = sum(max(0, flow[place + made] - flow[place + consumed]) for place in range(0, len(flow), width))
    pid, command, name = _maker(mapping)
    return Row(
        "loader",
        pid,
        command,
        name,
        workers,
        depth,
        grown(loader_counters.BATCHES) / seconds,
        min(1.0, grown(busy) / whole),
        min(1.0, grown(waited) / whole),
        min(1.0, grown(loader_counters.AHEAD) / whole),
        grown(loader_counters.CPU) / (seconds * _SECOND),
    )


def _between(before: _Look, after: _Look) -> list[Row]:
    seconds = max(1e-9, after.at - before.at)
    rows = []
    for inode, (mapping, words) in after.queues.items():
        if any(words):
            rows.append(_of_queue(mapping, words, before.queues.get(inode, (mapping, words))[1], seconds))
    for inode, (mapping, words) in after.loaders.items():
        then = before.loaders.get(inode, (mapping, words))[1]
        rows.append(_of_loader(mapping, words, then, after.flows.get(inode, ()), seconds))
    return sorted(rows, key=lambda row: (row.pid, row.kind, row.name))


def watch(interval: float) -> Iterator[list[Row]]:
    """The rows of each interval, for ever. Raises SystemExit where the system does not show them."""
    if not os.path.isdir("/proc/self/fd") or not hasattr(os, "memfd_create"):
        raise SystemExit("top needs Linux: it finds queues and loaders in /proc")
    before = _look()
    while True:
        time.sleep(interval)
        after = _look()
        yield _between(before, after)
        before = after


HEADINGS: Final = "pid", "what", "name", "workers", "depth", "per s", "busy", "waiting", "ahead", "cpus", "command"


def cells(row: Row) -> tuple[str, ...]:
    """The texts of a row, under ``HEADINGS``."""
    of_loader = row.kind == "loader"
    return (
        str(row.pid),
        row.kind,
        row.name or "-",
        str(row.workers),
        f"{row.depth:,}",
        f"{row.rate:,.1f}",
        f"{row.busy:.0%}",
        f"{row.waiting:.0%}" if of_loader else "-",
        f"{row.ahead:.0%}" if of_loader else "-",
        f"{row.processor:.2f}" if of_loader else "-",
        row.command,
    )


def as_text(rows: Sequence[Row], width: int = 0) -> str:
    """A table; its lines are cut at ``width``, unless that is 0."""
    if not rows:
        return "no queue between processes, and no loader with workers, in this user's processes"
    table = [HEADINGS, *(cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for line in table:
        texts = [
            text.ljust(size) if heading in ("what", "name", "command") else text.rjust(size)
            for heading, text, size in zip(HEADINGS, line, widths, strict=True)
        ]
        shown = "  ".join(texts).rstrip()
        lines.append(shown[:width] if width else shown)
    return "\n".join(lines)


def _rich_table(rows: Sequence[Row]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, caption="" if rows else as_text(rows))
    for heading in HEADINGS:
        is_text = heading in ("what", "name", "command")
        table.add_column(heading, justify="left" if is_text else "right", no_wrap=heading != "name")
    for row in rows:
        table.add_row(*cells(row))
    return table


def show(interval: float) -> None:
    """Show them, anew each interval, until Ctrl-C: with rich if that is there."""
    looks = watch(interval)
    with contextlib.suppress(KeyboardInterrupt):
        try:
            from rich.live import Live
        except ImportError:
            for rows in looks:
                print("\033[H\033[2J" + as_text(rows, os.get_terminal_size().columns), flush=True)
        else:
            with Live(_rich_table(next(looks)), auto_refresh=False, screen=True) as live:
                for rows in looks:
                    live.update(_rich_table(rows), refresh=True)
