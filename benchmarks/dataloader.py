"""How fast do batches come? Beside torch's DataLoader, other projects' loaders, and the limit.

Every contender loads the same in-memory datasets with two workers and a consumer that only takes the batches. They take
turns (see `_harness`). The limit is what as many processes make that fetch and stack into warm memory for nobody. Then:
the time to the first batch, the memory that workers add to a large dataset, and a case with real PNG files to decode.

    python -m benchmarks.dataloader [--quick] [--rounds N] [--json FILE] [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import contextlib
import io
import subprocess
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

import torchwq
from benchmarks import _loaders
from benchmarks._harness import Measure, Results, Target, conclude, environment, interleave, parser, show_results

WORKERS = 2


class Rows(Dataset[Any]):
    """Views of a table that is in memory; endless."""

    def __init__(self, *shape: int) -> None:
        self.data = torch.randint(0, 255, (64, *shape), dtype=torch.uint8)

    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, index: int) -> Any:
        return self.data[index % 64]


class Fields(Rows):
    """Dicts of ten float vectors."""

    def __init__(self) -> None:
        self.fields = {f"field {number}": torch.rand(64, 128) for number in range(10)}

    def __getitem__(self, index: int) -> Any:
        return {name: field[index % 64] for name, field in self.fields.items()}


class Normalised(Rows):
    """Images as floats with mean 0 and variance 1."""

    def __getitem__(self, index: int) -> Any:
        image = self.data[index % 64].float().div_(255)
        return image.sub_(image.mean()).div_(image.std())


class Digits(Dataset[Any]):
    """Real digits as PNG files in memory, decoded for each sample."""

    def __init__(self) -> None:
        from PIL import Image
        from sklearn.datasets import load_digits

        self.files = []
        digits = load_digits()
        for pixels, label in zip(digits.images, digits.target, strict=True):
            file = io.BytesIO()
            Image.fromarray((pixels * 15).astype(np.uint8)).resize((96, 96)).save(file, "PNG")
            self.files.append((file.getvalue(), int(label)))

    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        file, label = self.files[index % len(self.files)]
        return torch.from_numpy(np.array(Image.open(io.BytesIO(file)))), label


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], Dataset[Any]]
    batch_size: int
    has_limit: bool = True


A = Case("A: 64 x 3x224x224 uint8", partial(Rows, 3, 224, 224), 64)
B = Case("B: 64 x 4 uint8", partial(Rows, 4), 64)
C = Case("C: 1 x 3x224x224 uint8", partial(Rows, 3, 224, 224), 1)
D = Case("D: 32 x dict of 10", Fields, 32)
E = Case("E: 32 x 3x224x224 normalised", partial(Normalised, 3, 224, 224), 32)
PNG = Case("digits, PNG decoded", Digits, 64, has_limit=False)
CASES = (A, B, C, D, E, PNG)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def measure(loader: _loaders.Loader, case: Case, dataset: Dataset[Any], seconds: float) -> Measure:
    """Measures a run of about so many seconds, a new loader each time."""
    with quiet():
        rate, _ = _loaders.consume(loader(dataset, case.batch_size, WORKERS), 4, 12)
        rate, _ = _loaders.consume(loader(dataset, case.batch_size, WORKERS), 4, max(12, int(rate * seconds / 4)))
    count = max(20, int(rate * seconds))

    def once() -> float:
        with quiet():
            return _loaders.consume(loader(dataset, case.batch_size, WORKERS), count // 4, count)[0]

    return once


def measure_cases(rounds: int, seconds: float) -> Results:
    measures: dict[str, dict[str, Measure]] = {}
    for case in CASES:
        try:
            dataset = case.make()
        except ImportError as error:
            print(f"{case.name}: not measured, {error}")
            continue
        measures[case.name] = {
            name: measure(loader, case, dataset, seconds) for name, loader in _loaders.available().items()
        }
        if case.has_limit:
            measures[case.name]["limit"] = partial(_loaders.limit, dataset, case.batch_size, WORKERS, seconds)
    return interleave("batches/s", measures, rounds)


# --- the first batch ---


def measure_first(rounds: int) -> Results:
    dataset = Rows(4)

    def first(make: Callable[[], Any]) -> float:
        with quiet():
            return _loaders.consume(make(), 0, 1)[1]

    torchwq.warm_up()
    serve = partial(torchwq.DataLoader, dataset, 64, num_workers=WORKERS, multiprocessing_context="forkserver")
    measures: dict[str, Measure] = {
        "torchwq": partial(first, partial(torchwq.DataLoader, dataset, 64, num_workers=WORKERS)),
        "torch": partial(first, partial(torch.utils.data.DataLoader, dataset, 64, num_workers=WORKERS)),
        "torchwq forkserver": partial(first, serve),
    }
    for once in measures.values():
        once()
    return interleave("seconds to the first batch", {"2 workers": measures}, rounds)


# --- memory ---


class Large(Dataset[Any]):
    """A gigabyte, of which each sample looks at a megabyte."""

    def __init__(self, kind: str) -> None:
        ones = np.ones((1000, 1 << 20), np.uint8)
        self.data: Any = torch.from_numpy(ones).clone() if kind == "tensor" else ones

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return int(self.data[index][::4096].sum())


def used() -> int:
    """Bytes of memory of this process and all below it; what several share is counted once."""
    import psutil

    me = psutil.Process()
    return sum(each.memory_full_info().pss for each in (me, *me.children(recursive=True)))


def added_memory(kind: str, method: str) -> float:
    """How many gigabytes four workers add, measured in a process of its own."""
    program = f"from benchmarks import dataloader; print(dataloader.memory_of_workers({kind!r}, {method!r}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    return float(done.stdout)


def memory_of_workers(kind: str, method: str) -> float:
    torchwq.warm_up()
    dataset = Large(kind)
    before = used()
    with quiet():
        loader = torchwq.DataLoader(dataset, 10, num_workers=4, multiprocessing_context=method, persistent_workers=True)
        for _ in loader:
            pass
        return (used() - before) / 1e9


# --- results ---


def targets(rates: Results, first: Results, memory: dict[str, float]) -> list[Target]:
    def target(case: Case, other: str, least: float) -> Target:
        return Target(f"{case.name}: rate to {other}'s", rates.ratio(case.name, "torchwq", other), least)

    found = [target(A, "limit", 0.6), target(E, "limit", 0.85)]
    for case, with_workers, without in ((A, 12, 1), (B, 30, 1.8), (C, 35, 1.2), (D, 35, 1.8)):
        found += [target(case, "torch", with_workers), target(case, "torch w0", without)]
    found += [target(B, "torch fs", 8), target(C, "torch fs", 8), target(E, "torch w0", 1.5)]
    for case in (A, B, C, D, E):
        found += [target(case, name, 1) for name in ("nodes", "spdl", "grain", "stateful")]
    for name in ("torchwq", "torchwq forkserver"):
        ratio = first.ratio("2 workers", name, "torch")
        found.append(Target(f"first batch: {name}'s time to torch's", ratio, 1.2, at_most=True))
    found += [
        Target(f"4 workers over 1 GB of {kind}: added memory", amount, 1.15, "GB", at_most=True)
        for kind, amount in memory.items()
    ]
    return found


def main(options: Any) -> int:
    rounds = options.rounds or (3 if options.quick else 5)
    print(", ".join(f"{key} {value}" for key, value in environment().items()), end="\n\n")
    rates = measure_cases(rounds, seconds=0.4 if options.quick else 1.5)
    show_results(rates, "torchwq")
    first = measure_first(2 * rounds + 1)
    show_results(first, "torchwq")
    memory = {}
    with contextlib.suppress(ImportError):
        memory = {
            f"{kind}s, {method}": added_memory(kind, method)
            for kind in ("tensor", "array")
            for method in ("fork", "forkserver")
        }
    return conclude(targets(rates, first, memory), {"rates": rates, "first": first}, options)


if __name__ == "__main__":
    sys.exit(main(parser("How fast do batches come?").parse_args()))
