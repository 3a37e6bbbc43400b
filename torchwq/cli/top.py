"""``python -m torchwq top``: what the queues and loaders of this user's processes are doing.

Nothing runs in those processes for it. Queues and loaders count in shared memory anyway, and that memory has a name by
which ``/proc`` shows it. This reads the counts twice: the difference is the rate. So there is
nothing to turn on, and a process that hangs is shown like any other. Without ``/proc`` or memfd there is no ``top``.

What shares one mapping is one queue or loader. It is shown at the oldest of the processes that have it: mostly that has
made it, because workers come later.
"""

from __future__ import annotations

import contextlib
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
        workers: handles that other processes have on a queue, or workers of a loader.
        depth: questions that were sent and that no worker has taken, or batches that the loop has not.
        rate: questions taken, or batches made, a second.
        busy: of a queue, part of the workers that are at a question now, from 0 to 1; of a loader, part of the time for
            which its workers were making batches. For the rest of it they waited: for something to do if ``depth`` is
            0, else for the loop.
        processor: of a loader, processors in use by its workers: as they say after each batch.
    """

    kind: str
    pid: int
    command: str
    name: str
    workers: int
    depth: int
    rate: float
    busy: float
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

    at_ns: int
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
    """What was ever written there. To look at memory that was not would make it take room."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        end = 0
        with contextlib.suppress(OSError):  # ENXIO: nothing is written further on
            while True:
                end = os.lseek(fd, os.lseek(fd, end, os.SEEK_DATA), os.SEEK_HOLE)
        return memoryview(os.pread(fd, end // WORD * WORD, 0)).cast("Q").tolist()
    finally:
        os.close(fd)


def _look() -> _Look:
    look = _Look(time.perf_counter_ns(), {}, {}, {})
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
    return " ".join([os.path.basename(words[0]), *(word for word in words[1:] if word)])


def _printable(text: str) -> str:
    """``text`` in one line, with what no terminal should get shown as an escape."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def _maker(mapping: _Mapping) -> tuple[int, str, str]:
    """The process that made it, its command, and the name of the queue or dataset."""
    pid = min(mapping.pids, key=lambda each: (_started(each), each))
    name = mapping.name.removesuffix(_DELETED).partition(":")[2].partition(":")[2]
    return pid, _printable(_command(pid)), _printable(name)


def _of_queue(mapping: _Mapping, words: Sequence[int], before: Sequence[int], seconds: float) -> Row:
    width, busy_unit = queue_counters.WIDTH, queue_counters.BUSY

    def taken(words: Sequence[int]) -> int:
        head = sum(words[queue_counters.TAKEN_BY_GONE : queue_counters.TAKEN_BY_THREADS + 1])
        return head + sum(state // busy_unit for state in words[width + 1 :: width])

    workers = words[queue_counters.HANDLES]
    busy = sum(1 for state in words[width + 1 :: width] if state % busy_unit)
    pid, command, name = _maker(mapping)
    rate = max(0, taken(words) - taken(before)) / seconds
    depth = max(0, words[queue_counters.SENT] - taken(words))
    return Row("queue", pid, command, name, workers, depth, rate, busy / max(1, workers))


def _of_loader(inode: int, before: _Look, after: _Look) -> Row:
    width = loader_counters.WORDS
    mapping, words = after.loaders[inode]
    _, earlier = before.loaders.get(inode, (mapping, words))
    flow = after.flows.get(inode, ())
    seconds = (after.at_ns - before.at_ns) / _SECOND

    def grown(word: int) -> int:
        return sum(words[word::width]) - sum(earlier[word::width])

    def unfinished(look: _Look) -> int:
        """Nanoseconds for which workers have been at their present batches."""
        states = look.flows.get(inode, ())[loader_counters.AT_WORK :: width]
        return sum(max(0, look.at_ns - state) for state in states if state > loader_counters.IDLE)

    states = flow[loader_counters.AT_WORK :: width]
    workers = sum(1 for state in states if state)
    busy = grown(loader_counters.BUSY) + unfinished(after) - unfinished(before)
    made, consumed = flow[loader_counters.MADE :: width], flow[loader_counters.CONSUMED :: width]
    depth = sum(max(0, one - other) for one, other, state in zip(made, consumed, states, strict=False) if state)
    rate = grown(loader_counters.BATCHES) / seconds
    part = min(1.0, max(0.0, busy / (max(1, workers) * seconds * _SECOND)))
    pid, command, name = _maker(mapping)
    cpus = grown(loader_counters.CPU) / _SECOND / seconds
    return Row("loader", pid, command, name, workers, depth, rate, part, cpus)


def _between(before: _Look, after: _Look) -> list[Row]:
    seconds = (after.at_ns - before.at_ns) / _SECOND
    rows = []
    for inode, (mapping, words) in after.queues.items():
        if any(words):
            rows.append(_of_queue(mapping, words, before.queues.get(inode, (mapping, words))[1], seconds))
    rows += [_of_loader(inode, before, after) for inode in after.loaders]
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


HEADINGS: Final = "pid", "what", "name", "workers", "depth", "per s", "busy", "cpus", "command"
#: Those of columns with text; the others have numbers, which stand to the right.
_TEXTS: Final = frozenset({"what", "name", "command"})


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
            text.ljust(size) if heading in _TEXTS else text.rjust(size)
            for heading, text, size in zip(HEADINGS, line, widths, strict=True)
        ]
        shown = "  ".join(texts).rstrip()
        lines.append(shown[:width] if width else shown)
    return "\n".join(lines)


def _rich_table(rows: Sequence[Row]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, caption="" if rows else as_text(rows))
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in _TEXTS else "right", no_wrap=heading != "name")
    for row in rows:
        table.add_row(*map(Text, cells(row)))  # not as markup
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
