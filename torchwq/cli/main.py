"""The command line: parses arguments, and prints what the commands find, as text or as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from . import bench, doctor, top


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < 1e6:
        raise argparse.ArgumentTypeError(f"{text}: it must be more than 0")
    return seconds


def _count_or_zero(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: it must be a whole number")
    return int(text)


def _count(text: str) -> int:
    if not _count_or_zero(text):
        raise argparse.ArgumentTypeError(f"{text}: it must be more than 0")
    return int(text)


def _version() -> str:
    from .. import __version__

    return f"torchwq {__version__}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status: 1 if ``doctor`` has found something that will not work."""
    parser = argparse.ArgumentParser(
        prog="python -m torchwq",
        description="Look at this machine, at a dataset, and at what runs. See also the documentation.",
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True)
    about = "look for what would go wrong on this machine, and say what to do about it"
    checking = commands.add_parser("doctor", help=about, description=about)
    about = "compare torchwq.DataLoader with torch's here, and say how many workers to take"
    comparing = commands.add_parser("bench", help=about, description=about)
    comparing.add_argument(
        "dataset",
        nargs="?",
        help="of yours, as module:attribute: a dataset, a loader, or what makes one; else images are made up",
    )
    comparing.add_argument("--batch-size", type=_count, help="else that of the loader, or 32")
    comparing.add_argument("--collate", metavar="MODULE:FUNCTION", help="the loader's collate_fn")
    comparing.add_argument("--workers", type=_count_or_zero, nargs="+", help="the numbers to try; else 0, 1 and so on")
    comparing.add_argument("--seconds", type=_seconds, default=3.0, help="for each measurement")
    about = "show what the queues and loaders of this user's processes are doing, until Ctrl-C"
    watching = commands.add_parser("top", help=about, description=about)
    watching.add_argument("--interval", type=_seconds, default=1.0, help="seconds from one look to the next")
    watching.add_argument("--once", action="store_true", help="print the first look, and end; so does --json")
    for command in (checking, comparing, watching):
        command.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    if options.command == "doctor":
        findings = doctor.examine()
        if options.json:
            print(json.dumps([asdict(each) for each in findings], indent=2))
        else:
            print(doctor.as_text(findings))
        return int(any(each.verdict == doctor.FAILS for each in findings))
    if options.command == "top":
        if not (options.json or options.once) and sys.stdout.isatty():
            top.show(options.interval)
            return 0
        try:
            rows = next(top.watch(options.interval))
        except KeyboardInterrupt:
            return 130
        print(json.dumps([asdict(row) for row in rows], indent=2) if options.json else top.as_text(rows))
        return 0
    report = bench.run(
        options.dataset,
        options.batch_size,
        options.workers,
        options.seconds,
        collate=options.collate,
        quiet=options.json,
    )
    print(json.dumps(asdict(report), indent=2) if options.json else bench.as_text(report))
    return 0
