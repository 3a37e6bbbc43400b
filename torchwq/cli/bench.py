"""``python -m torchwq bench``: torchwq's loader beside torch's, on this machine, with the user's dataset.

Both load the same batches with each number of workers, in turns. What the loop does with a batch is to touch it, so the
figures are the most that a loop can get.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils.data
from torch.utils.data import Dataset

from ..dataloader import DataLoader
from ..transport.waiting import cores


@dataclass(frozen=True)
class Row:
    """Batches a second with so many workers; None: not measured."""

    workers: int
    torchwq: float | None
    torch: float | None


@dataclass(frozen=True)
class Report:
    """What was measured, with which number of workers it is best, and why."""

    dataset: str
    batch_size: int
    cores: int
    rows: Sequence[Row]
    workers: int
    advice: str
    is_busy: bool


class MadeUpImages(Dataset[Any]):
    """Images of 3 x 128 x 128 floats that take a few milliseconds each to prepare."""

    def __len__(self) -> int:
        return 1 << 20

    def __getitem__(self, index: int) -> Any:
        image = torch.randint(0, 256, (3, 160, 160), dtype=torch.uint8).float()
        image = torch.nn.functional.interpolate(image[None], size=128, mode="bilinear", antialias=True)[0]
        return (image - image.mean()) / image.std(), index % 10


def find_dataset(place: str | None) -> tuple[str, Any]:
    """The dataset or loader at ``module:attribute``. Raises SystemExit, which says what to write, if there is none."""
    if place is None:
        return "made-up images", MadeUpImages()
    found = _find(place)
    if (not hasattr(found, "__getitem__") and not hasattr(found, "__iter__")) or isinstance(found, type):
        found = found()
    return place, found


def _find(place: str) -> Any:
    """What is at ``module:attribute``. Raises SystemExit."""
    module_name, _, attribute = place.partition(":")
    if not attribute or module_name.endswith(".py"):
        module_name = module_name.removesuffix(".py").replace(os.sep, ".")
        raise SystemExit(f"{place!r}: write module:attribute, for example {module_name}:{attribute or 'train_set'}")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as for python -m: modules of the current folder
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise SystemExit(f"{place!r}: {error}") from None


def run(
    place: str | None,
    batch_size: int | None,
    numbers: Sequence[int] | None,
    seconds: float,
    *,
    collate: str | None = None,
    quiet: bool = False,
) -> Report:
    """Measure. ``numbers``: of workers; None tries more and more, while that helps.

    Raises SystemExit, with the reason, if there is no such dataset, or if it gives no batches.
    """
    name, dataset = find_dataset(place)
    collate_fn = None if collate is None else _find(collate)
    if isinstance(dataset, torch.utils.data.DataLoader):
        loader: Any = dataset
        dataset, batch_size = loader.dataset, batch_size or loader.batch_size
        collate_fn = collate_fn or loader.collate_fn
    batch_size = batch_size or 32
    try:
        next(iter(torch.utils.data.DataLoader(dataset, batch_size, collate_fn=collate_fn)))
    except Exception as error:
        what = f"{type(error).__name__}: {error}".strip()
        raise SystemExit(
            f"{name} gives no batch of {batch_size}: {what}\n"
            f"Try it without workers first, as next(iter(DataLoader(...))); --collate names a collate_fn"
        ) from None
    here = cores()
    is_busy = os.getloadavg()[0] > 0.8 * here
    rows: list[Row] = []
    for workers in numbers or (0, *_numbers_up_to(max(8, 2 * here))):
        rates = []
        for kind, loader in (("torchwq", DataLoader), ("torch", torch.utils.data.DataLoader)):
            if not quiet and sys.stderr.isatty():
                print(f"\r{workers} workers, {kind}          ", end="", file=sys.stderr, flush=True)
            rates.append(_rate(loader, dataset, batch_size, collate_fn, workers, seconds))
        rows.append(Row(workers, *rates))
        if numbers is None and workers > here and not _helps(rows):
            break
    if not quiet and sys.stderr.isatty():
        print("\r" + " " * 40 + "\r", end="", file=sys.stderr)
    best, advice = _advise(rows)
    return Report(name, batch_size, here, rows, best, advice, is_busy)


def _numbers_up_to(most: int) -> list[int]:
    return [number for number in (1, 2, 4, 8, 16, 32, 64, 128) if number <= most]


def _helps(rows: Sequence[Row]) -> bool:
    return (rows[-1].torchwq or 0.0) > 1.1 * max(row.torchwq or 0.0 for row in rows[:-1])


def _rate(
    loader: Callable[..., Any], dataset: Any, batch_size: int, collate_fn: Any, workers: int, seconds: float
) -> float | None:
    """Batches a second, after the first ones; None if there are too few. Raises SystemExit if a sample is faulty."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            batches = iter(loader(dataset, batch_size, num_workers=workers, collate_fn=collate_fn))
            for _ in range(max(2, 2 * workers)):
                next(batches)
            began, count = time.perf_counter(), 0
            while (elapsed := time.perf_counter() - began) < seconds:
                if next(batches, None) is None:
                    break
                count += 1
        except StopIteration:
            return None
        except Exception as error:
            where = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
            told = str(error).strip().splitlines() or [""]
            raise SystemExit(f"the dataset has raised {type(error).__name__}: {told[-1]}{where}") from None
        return count / elapsed if count else None


def _advise(rows: Sequence[Row]) -> tuple[int, str]:
    """The number of workers to take, and a sentence on it: the smallest that is nearly as fast as the fastest."""
    measured = [row for row in rows if row.torchwq]
    if not measured:
        return 0, "nothing could be measured: the dataset has too few batches; take a smaller --batch-size"
    fastest = max(row.torchwq or 0.0 for row in measured)
    best = next(row for row in measured if (row.torchwq or 0.0) >= 0.93 * fastest)
    if best.workers == 0:
        return 0, "take num_workers=0: batches are so cheap that workers do not help"
    text = f"take num_workers={best.workers}"
    if best.torch:
        text += f": {(best.torchwq or 0.0) / best.torch:.1f} times as fast as torch's loader with as many"
    return best.workers, text


def as_text(report: Report) -> str:
    """A table, and the advice."""
    lines = [f"{report.dataset}, batches of {report.batch_size}, {report.cores} cores", ""]
    lines.append(f"{'workers':>7}  {'torchwq':>12}  {'torch':>12}  ratio   (batches/s)")
    for row in report.rows:
        ratio = f"{row.torchwq / row.torch:.2f}" if row.torchwq and row.torch else "–"
        cells = ["–" if rate is None else f"{rate:,.1f}" for rate in (row.torchwq, row.torch)]
        lines.append(f"{row.workers:7}  {cells[0]:>12}  {cells[1]:>12}  {ratio:>5}")
    if any(row.torchwq is None or row.torch is None for row in report.rows):
        lines.append("– : too few batches to measure")
    lines += ["", report.advice]
    if report.is_busy:
        lines.append("Other programs were using this machine: measure again when it is quiet.")
    return "\n".join(lines)
