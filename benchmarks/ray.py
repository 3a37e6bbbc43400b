"""What do workers on a Ray cluster cost, and how do they scale?

Four questions, on clusters of several nodes within this machine. Do eight nodes give eight times the samples that wait,
as for a disk or a network? Is the digits pipeline no slower than Ray's own ways to have it? What does a large batch
cost beyond a bare ``ray.get`` of the same array? And a small task beyond a bare call of an actor?

    python -m benchmarks.ray [--quick] [--rounds N] [--json FILE] [--check]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

# Before Ray is imported: nodes bind to 127.0.0.1.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import argparse
import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import ray
import torch
import torch.utils.data
from ray.cluster_utils import Cluster

import torchwq
from benchmarks._harness import Measure, Results, Target, conclude, environment, interleave, parser, show_results
from benchmarks.dataloader import Digits

NODES = 8
ITEM_S = 0.005
BATCH = 8
SHAPE = 64, 3, 224, 224
IN_FLIGHT = 2
DIGITS_BATCH = 64
WORKERS = 2
WAITING, DIGITS, LARGE, TASK = "samples that wait 5 ms", "digits, PNG decoded", "batch of 9.6 MB", "add two numbers"

_OPTIONS: dict[str, Any] = {"node_ip_address": "127.0.0.1", "object_store_memory": 200 << 20}


@contextlib.contextmanager
def cluster(nodes: int, cpus: int) -> Iterator[None]:
    """A cluster whose nodes have so many places for workers."""
    made = Cluster(initialize_head=True, head_node_args={**_OPTIONS, "num_cpus": cpus, "include_dashboard": False})
    try:
        for _ in range(nodes - 1):
            made.add_node(**_OPTIONS, num_cpus=cpus)
        ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
        yield
    finally:
        ray.shutdown()
        made.shutdown()


def rate(items: Iterable[Any], warm: int, count: int) -> float:
    """Items a second, of ``count`` after the first ``warm``."""
    iterator = iter(items)
    for _ in range(warm):
        next(iterator)
    began = time.perf_counter()
    for _ in range(count):
        next(iterator)
    return count / (time.perf_counter() - began)


class Waiting(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, index: int) -> Any:
        time.sleep(ITEM_S)
        return index


def waiting(workers: int, count: int) -> Measure:
    def once() -> float:
        # One thread of its own for each sample would be the way in real life: here the workers are to be counted.
        sampler = itertools.count()
        batches = iter(lambda: list(itertools.islice(sampler, BATCH)), None)
        loader = torchwq.DataLoader(Waiting(), batch_sampler=batches, num_workers=workers, backend="ray")  # type: ignore[arg-type]
        return BATCH * rate(loader, 2 * workers, count * workers)

    return once


class Same(torch.utils.data.Dataset[Any]):
    def __init__(self) -> None:
        self.data = torch.ones(SHAPE, dtype=torch.uint8)

    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, index: int) -> Any:
        return self.data


@ray.remote
class Actor:
    """What is measured against."""

    def __init__(self) -> None:
        self.array = np.ones(SHAPE, np.uint8)
        self.batches: Any = None

    def add(self, left: int, right: int) -> int:
        return left + right

    def large(self) -> Any:
        return self.array

    def digits(self) -> Any:
        if self.batches is None:
            loader = torch.utils.data.DataLoader(
                Digits(), batch_sampler=_endless(DIGITS_BATCH), num_workers=WORKERS, multiprocessing_context="fork"
            )
            self.batches = iter(loader)
        images, labels = next(self.batches)
        return images.numpy(), labels.numpy()


def _endless(size: int) -> Any:
    return ([n * size + i for i in range(size)] for n in itertools.count())


def calls(method: Any, read: Callable[[Any], Any]) -> Iterator[Any]:
    """Results of an actor's method, ``IN_FLIGHT`` calls ahead."""
    refs = [method.remote() for _ in range(IN_FLIGHT)]
    while True:
        refs.append(method.remote())
        yield read(ray.get(refs.pop(0)))


def large_bare(actor: Any, count: int) -> Measure:
    return lambda: 1e3 / rate(calls(actor.large, lambda array: int(array[0, 0, 0, 0])), 4, count)


def large_loader(count: int) -> Measure:
    def once() -> float:
        loader = torchwq.DataLoader(Same(), None, sampler=itertools.count(), num_workers=1, backend="ray")  # type: ignore[arg-type]
        return 1e3 / rate((int(batch[0, 0, 0, 0]) for batch in loader), 4, count)

    return once


def digits_loader(count: int) -> Measure:
    def once() -> float:
        loader = torchwq.DataLoader(Digits(), batch_sampler=_endless(DIGITS_BATCH), num_workers=WORKERS, backend="ray")
        return DIGITS_BATCH * rate(loader, 8, count)

    return once


def digits_in_actor(count: int) -> Measure:
    def read(found: Any) -> Any:
        images, labels = found
        return torch.tensor(images), torch.tensor(labels)

    return lambda: DIGITS_BATCH * rate(calls(Actor.remote().digits, read), 8, count)


def digits_ray_data(count: int) -> Measure | None:
    try:
        import ray.data
    except ImportError as error:
        print(f"ray.data: not measured, {error}")
        return None
    files = Digits().files
    items = [{"file": file, "label": label} for file, label in files * (2 + count * DIGITS_BATCH // len(files))]

    def decode(batch: dict[str, Any]) -> dict[str, Any]:
        import io

        from PIL import Image

        images = [np.array(Image.open(io.BytesIO(file))) for file in batch["file"]]
        return {"image": np.stack(images), "label": batch["label"]}

    def once() -> float:
        ray.data.DataContext.get_current().enable_progress_bars = False
        decoded = ray.data.from_items(items).map_batches(
            decode, batch_size=DIGITS_BATCH, compute=ray.data.TaskPoolStrategy(size=WORKERS)
        )
        return DIGITS_BATCH * rate(decoded.iter_torch_batches(batch_size=DIGITS_BATCH), 8, count)

    return once


def add(left: int, right: int) -> int:
    return left + right


def tasks(call: Callable[[], Any], count: int) -> Measure:
    def once() -> float:
        for _ in range(20):
            call()
        began = time.perf_counter()
        for _ in range(count):
            call()
        return 1e6 * (time.perf_counter() - began) / count

    return once


def main() -> int:
    options = parser(__doc__ or "").parse_args()
    rounds = options.rounds or (3 if options.quick else 5)
    groups = measure(options, rounds)
    scaling, large, task, digits = groups.values()
    one, eight = scaling.median(WAITING, "1 node"), scaling.median(WAITING, f"{NODES} nodes")
    linear = eight / (NODES * one) if one and eight else None
    return conclude(
        [
            Target(f"{WAITING}: rate on {NODES} nodes, of {NODES} times that on one", linear, 0.9),
            Target(f"{DIGITS}: rate to ray.data's", digits.ratio(DIGITS, "torchwq", "ray.data"), 1),
            Target(
                f"{DIGITS}: rate to torch's loader in an actor", digits.ratio(DIGITS, "torchwq", "torch in an actor"), 1
            ),
            Target(f"{LARGE}: time to a bare ray.get's", large.ratio(LARGE, "torchwq", "ray.get"), 1.15, at_most=True),
            Target(f"{TASK}: time to a bare call's", task.ratio(TASK, "torchwq", "actor call"), 1.2, at_most=True),
        ],
        groups,
        options,
    )


def measure(options: argparse.Namespace, rounds: int) -> dict[str, Results]:
    """All figures."""
    print(", ".join(f"{name} {value}" for name, value in environment().items()), f"ray {ray.__version__}", end="\n\n")
    count = 1 if options.quick else 3
    with cluster(NODES, 1):
        scaling = interleave(
            "samples/s", {WAITING: {f"{n} node{'s' * (n > 1)}": waiting(n, 10 * count) for n in (1, NODES)}}, rounds
        )
    show_results(scaling, f"{NODES} nodes")
    with cluster(1, 2 * WORKERS + 2):
        actor = Actor.remote()  # type: ignore[attr-defined]
        large = interleave(
            "ms", {LARGE: {"torchwq": large_loader(40 * count), "ray.get": large_bare(actor, 40 * count)}}, rounds
        )
        show_results(large, "torchwq")
        with torchwq.BackgroundTaskPool(1, backend="ray") as pool:
            task = interleave(
                "µs",
                {
                    TASK: {
                        "torchwq": tasks(lambda: pool.submit(add, 1, 2).result(), 200 * count),
                        "actor call": tasks(lambda: ray.get(actor.add.remote(1, 2)), 200 * count),
                    }
                },
                rounds,
            )
        show_results(task, "torchwq")
        contenders = {
            "torchwq": digits_loader(60 * count),
            "torch in an actor": digits_in_actor(60 * count),
            "ray.data": digits_ray_data(60 * count),
        }
        digits = interleave("samples/s", {DIGITS: {name: each for name, each in contenders.items() if each}}, rounds)
        show_results(digits, "torchwq")
    return {"scaling": scaling, "large": large, "task": task, "digits": digits}


if __name__ == "__main__":
    sys.exit(main())
