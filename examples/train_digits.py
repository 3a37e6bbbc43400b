"""Trains a small CNN on images that a background worker decodes and augments.

The data are scikit-learn's 1,797 real handwritten digits of 8 x 8 pixels, written out as PNG files the
first time. `batches` is an ordinary generator. Given to a `torchwq.BackgroundTask` it runs in a process of
its own, up to `prefetch` batches ahead of the loop that trains on them; the batches come over without a
copy. The progress line says how long training had to wait for data.

    python examples/train_digits.py

Ends with the accuracy on a held-out fifth of the images, with status 1 if it is below 97 %.
"""

import argparse
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from digits import BATCH_SIZE, ENOUGH, augment, build_model, decode, split, write_digits
from torch import nn
from torch.nn import functional as F

import torchwq

# --- what runs in the background ---


def batches(files: list[Path], batch_size: int, seed: int | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields images (n x 1 x 8 x 8) and labels (n): with a seed shuffled and augmented, else as they are.

    A worker gets the code of a function, not the data around it: whatever this one needs is an argument. The
    modules and helper functions that it uses are there.
    """
    generator = torch.Generator().manual_seed(seed or 0)
    order = range(len(files)) if seed is None else torch.randperm(len(files), generator=generator).tolist()
    for start in range(0, len(files), batch_size):
        chosen = [files[place] for place in order[start : start + batch_size]]
        images = torch.stack([decode(file) for file in chosen])
        labels = torch.tensor([int(file.parent.name) for file in chosen])
        yield images if seed is None else augment(images, generator), labels


# --- training ---


class Waiting:
    """Iterates over `source` and adds up the `seconds` that each next item let one wait."""

    def __init__(self, source: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.source, self.seconds = iter(source), 0.0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            started = time.perf_counter()
            item = next(self.source, None)
            self.seconds += time.perf_counter() - started
            if item is None:
                return
            yield item


def one_ahead(tasks: Iterator[torchwq.BackgroundTask[Any]]) -> Iterator[torchwq.BackgroundTask[Any]]:
    """Yields the tasks. Each has been started, and has its first batches ready, before its turn comes."""
    task = next(tasks)
    for following in tasks:
        yield task
        task = following
    yield task


def show(line: str, *, final: bool) -> None:
    """On a terminal a line that changes in place; in a log only its last state."""
    if sys.stdout.isatty():
        print(f"\r{line:<79}", end="\n" if final else "", flush=True)
    elif final:
        print(line, flush=True)


def train(model: nn.Module, files: list[Path], epochs: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    steps = -(-len(files) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, epochs=epochs, steps_per_epoch=steps)
    model.train()
    tasks = (torchwq.BackgroundTask(batches, files, BATCH_SIZE, seed, prefetch=4) for seed in range(epochs))
    for epoch, task in enumerate(one_ahead(tasks), start=1):
        started, seen, total = time.perf_counter(), 0, 0.0
        waiting = Waiting(task)
        for images, labels in waiting:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

            seen += len(images)
            total += loss.item() * len(images)
            seconds = time.perf_counter() - started
            show(
                f"epoch {epoch:2}/{epochs}  loss {total / seen:.4f}  {seen / seconds:6,.0f} images/s  "
                f"waited for data {waiting.seconds:.2f} s ({waiting.seconds / seconds:.0%})",
                final=seen == len(files),
            )


@torch.no_grad()
def accuracy(model: nn.Module, files: list[Path]) -> float:
    model.eval()
    correct = 0
    for images, labels in torchwq.BackgroundTask(batches, files, BATCH_SIZE, prefetch=4):
        correct += int((model(images).argmax(dim=1) == labels).sum())
    return correct / len(files)


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a small CNN on handwritten digits.")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parent / "data" / "digits")
    arguments = parser.parse_args()

    if not arguments.data.exists():
        print(f"writing the images to {arguments.data}")
        write_digits(arguments.data)
    training, held_out = split(arguments.data)
    print(f"{len(training)} images to train on, {len(held_out)} held out")

    torchwq.warm_up()  # workers are forked from a server that imports torch once, now
    torch.manual_seed(0)
    torch.set_num_threads(1)  # one core trains, another prepares the images
    model = build_model()
    started = time.perf_counter()
    train(model, training, arguments.epochs)
    reached = accuracy(model, held_out)
    print(f"accuracy on the held-out images {reached:.2%} after {time.perf_counter() - started:.0f} s")
    return 0 if reached >= ENOUGH else 1


sys.exit(main())
