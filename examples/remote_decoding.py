"""Decodes images on other machines, and trains on this one.

It is train_digits.py with `backend="ray"`: the loader's workers are actors on a Ray cluster, which have the images as
PNG files in memory, decode and augment them, and send batches. Without `--address` the cluster is three nodes within
this machine, which end with the program.

    pip install "torchwq[ray]"
    python examples/remote_decoding.py [--address auto]

Ends with the accuracy on a held-out fifth of the images, with status 1 if it is below 97 %.
"""

import argparse
import contextlib
import io
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before Ray is imported. Nodes that only this machine can reach; no usage statistics.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
if "--address" not in sys.argv:
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"

import ray
import torch
from digits import BATCH_SIZE, ENOUGH, augment, build_model, decode, split, write_digits
from torch.nn import functional as F
from torch.utils.data import Dataset

import torchwq

FOLDER = Path(__file__).resolve().parent
#: The folder goes to the other machines, because workers import `augment` and `decode` from digits.py.
SHIPPED = {"working_dir": str(FOLDER), "excludes": ["data"]}


@contextlib.contextmanager
def cluster(address: str | None, nodes: int) -> Iterator[None]:
    """A connection to the cluster at `address`, or to one of so many nodes within this machine."""
    if address is not None:
        ray.init(address=address, runtime_env=SHIPPED)
        yield
        ray.shutdown()
        return
    from ray.cluster_utils import Cluster

    options: dict[str, Any] = {"node_ip_address": "127.0.0.1", "object_store_memory": 100 << 20, "num_cpus": 2}
    local = Cluster(initialize_head=True, head_node_args={**options, "include_dashboard": False})
    try:
        for _ in range(nodes - 1):
            local.add_node(**options)
        ray.init(address=local.address, runtime_env=SHIPPED, logging_level="ERROR", log_to_driver=False)
        yield
    finally:
        ray.shutdown()
        local.shutdown()


class Images(Dataset[Any]):
    """PNG files in memory, so that machines without the folder can decode them, and their labels."""

    def __init__(self, files: list[Path]) -> None:
        self.files = [(file.read_bytes(), int(file.parent.name)) for file in files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        data, label = self.files[index]
        return decode(io.BytesIO(data)), label


def augmented(samples: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of augmented images. The worker's generator differs from worker to worker, and repeats with the seed."""
    images, labels = torch.utils.data.default_collate(samples)
    return augment(images, torch.default_generator), labels


def train(model: torch.nn.Module, loader: Any, epochs: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, epochs=epochs, steps_per_epoch=len(loader))
    model.train()
    for epoch in range(1, epochs + 1):
        started, total, before = time.perf_counter(), 0.0, loader.stats().consumer_waited
        for images, labels in loader:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        seconds, waited = time.perf_counter() - started, loader.stats().consumer_waited - before
        print(
            f"epoch {epoch:2}/{epochs}  loss {total / len(loader):.4f}  "
            f"{len(loader.dataset) / seconds:6,.0f} images/s  waited for data {waited:.2f} s",
            flush=True,
        )


@torch.no_grad()
def accuracy(model: torch.nn.Module, loader: Any) -> float:
    model.eval()
    correct = sum(int((model(images).argmax(dim=1) == labels).sum()) for images, labels in loader)
    return correct / len(loader.dataset)


def main() -> int:
    parser = argparse.ArgumentParser(description="Train on images that other machines decode.")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--address", help="of a Ray cluster; without it, one within this machine is started")
    parser.add_argument("--data", type=Path, default=FOLDER / "data" / "digits")
    arguments = parser.parse_args()
    if not arguments.data.exists():
        write_digits(arguments.data)
    training, held_out = split(arguments.data)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with cluster(arguments.address, nodes=3):
        options: dict[str, Any] = {"num_workers": arguments.workers, "backend": "ray"}
        loader = torchwq.DataLoader(
            Images(training), BATCH_SIZE, shuffle=True, collate_fn=augmented, persistent_workers=True, **options
        )
        model = build_model()
        train(model, loader, arguments.epochs)
        del loader  # its workers end, and make room
        reached = accuracy(model, torchwq.DataLoader(Images(held_out), BATCH_SIZE, **options))
        print(f"decoded on {len(ray.nodes())} nodes; accuracy on held-out images: {reached:.2%}")
    return 0 if reached >= ENOUGH else 1


if __name__ == "__main__":
    sys.exit(main())
