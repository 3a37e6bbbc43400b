"""What the benchmarks share: interleaved rounds, medians and ratios, tables, targets, and the command line.

Machines drift: clocks change, other work comes and goes. So contenders are not measured one after the other
but in turn, every one of them once per round, each round beginning with another. A ratio is taken within a
round, between two neighbours in time, and the median over the rounds is reported. What is slow only the
first time (imports, caches, page faults) is over before the first round: benchmarks warm their contenders up.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from types import FrameType

Measure = Callable[[], float]
"""Measures once and returns one figure, a rate or a time."""


@dataclass
class Results:
    """The figures of one group of cases: `figures[case][contender]` has one entry per round."""

    unit: str
    figures: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def median(self, case: str, contender: str) -> float | None:
        """The median over the rounds, or None for what was not measured."""
        rounds = self.figures.get(case, {}).get(contender)
        return median(rounds) if rounds else None

    def ratio(self, case: str, contender: str, to: str) -> float | None:
        """The median over the rounds of `contender`'s figure divided by that of `to` in the same round."""
        contenders = self.figures.get(case, {})
        pairs = zip(contenders.get(contender, ()), contenders.get(to, ()), strict=True)
        ratios = [one / other for one, other in pairs] if contender in contenders and to in contenders else []
        return median(ratios) if ratios else None

    @property
    def contenders(self) -> list[str]:
        """All that were measured in at least one case, in the order of their first."""
        return list(dict.fromkeys(name for contenders in self.figures.values() for name in contenders))


@dataclass(frozen=True)
class Target:
    """Something to be reached: a figure and its lower (or upper) limit."""

    text: str
    measured: float | None
    """None if it could not be measured here."""
    limit: float
    unit: str = "×"
    at_most: bool = False

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "skipped"
        reached = self.measured <= self.limit if self.at_most else self.measured >= self.limit
        return "pass" if reached else "FAIL"

    def __str__(self) -> str:
        measured = "–" if self.measured is None else f"{self.measured:.2f} {self.unit}"
        asked = f"{'at most' if self.at_most else 'at least'} {self.limit:.2f} {self.unit}"
        return f"{self.verdict:8}{self.text:66}{measured:>10}   {asked}"


def interleave(unit: str, cases: Mapping[str, Mapping[str, Measure]], rounds: int, limit_s: int = 120) -> Results:
    """Measures every contender of every case once per round, each round beginning with the next contender.

    Raises TimeoutError if one measurement takes longer than `limit_s` seconds.
    """
    results = Results(unit, {case: {name: [] for name in measures} for case, measures in cases.items()})
    for number in range(rounds):
        for case, measures in cases.items():
            names = list(measures)
            first = number % len(names)
            for name in names[first:] + names[:first]:
                progress(f"round {number + 1} of {rounds}: {case}, {name}")
                with time_limit(limit_s, f"{case}, {name}"):
                    results.figures[case][name].append(measures[name]())
    progress("")
    return results


@contextmanager
def time_limit(seconds: int, what: str) -> Iterator[None]:
    """Raises TimeoutError in the main thread if the block takes longer."""

    def expired(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"{what}: not done after {seconds} s")

    previous = signal.signal(signal.SIGALRM, expired)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def progress(line: str) -> None:
    """Says on a terminal what is being measured; keeps quiet in a log."""
    if sys.stderr.isatty():
        print(f"\r{line:<79}\r", end="", file=sys.stderr, flush=True)


def table(title: str, rows: Sequence[str], columns: Sequence[str], cell: Callable[[str, str], str]) -> str:
    """A table as text: `cell` gives the contents for a row and a column."""
    cells = [[row, *(cell(row, column) for column in columns)] for row in rows]
    header = [title, *columns]
    widths = [max(len(line[place]) for line in [header, *cells]) for place in range(len(header))]
    lines = []
    for line in [header, ["-" * width for width in widths], *cells]:
        padded = [text.rjust(width) for text, width in zip(line, widths, strict=True)]
        lines.append("  ".join([line[0].ljust(widths[0]), *padded[1:]]))
    return "\n".join(lines)


def number(value: float | None, suffix: str = "") -> str:
    """Three or more digits of a figure; a dash for what was not measured."""
    if value is None:
        return "–"
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}{suffix}"


def show_results(results: Results, subject: str) -> None:
    """Prints the medians, and below them the ratios of `subject` to every other contender."""

    def absolute(case: str, name: str) -> str:
        return number(results.median(case, name))

    def relative(case: str, name: str) -> str:
        return number(results.ratio(case, subject, name), " ×")

    cases, names = list(results.figures), results.contenders
    print(table(results.unit, cases, names, absolute), end="\n\n")
    print(table(f"{subject} to", cases, [name for name in names if name != subject], relative), end="\n\n")


def environment() -> dict[str, str | int | None]:
    """What the figures depend on."""
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": os.cpu_count(),
    }


def parser(description: str) -> argparse.ArgumentParser:
    """The arguments that every benchmark takes."""
    arguments = argparse.ArgumentParser(description=description)
    arguments.add_argument("--rounds", type=int, default=None, help="rounds to measure (5; with --quick 3)")
    arguments.add_argument("--quick", action="store_true", help="a short run: rougher figures")
    arguments.add_argument("--json", type=Path, metavar="FILE", help="write all figures of all rounds to FILE")
    arguments.add_argument("--check", action="store_true", help="exit with status 1 if a target is missed")
    return arguments


def conclude(targets: Sequence[Target], groups: Mapping[str, Results], options: argparse.Namespace) -> int:
    """Prints the targets, writes the JSON file if one was asked for, and returns the exit status."""
    for target in targets:
        print(target)
    if options.json:
        document = {
            "environment": environment(),
            "results": {name: asdict(results) for name, results in groups.items()},
            "targets": [{**asdict(target), "verdict": target.verdict} for target in targets],
        }
        options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    missed = any(target.verdict == "FAIL" for target in targets)
    return 1 if options.check and missed else 0
