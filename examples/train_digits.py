"""Trains a small CNN on images that a background worker decodes and augments.

The data are scikit-learn's 1,797 real handwritten digits of 8 x 8 pixels, written out as PNG files the
first time. `batches` is an ordinary generator. Given to a `torchwq.BackgroundTask` it runs in a process of
its own, up to `prefetch` batches ahead of the loop that trains on them; the batches come over without a
copy. The progress line says how long training had to wait for data.

    python examples/train_digits.py

Ends with the accuracy on a held-out fifth of the images, with status 1 if it is below 97 %.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import torchwq

BATCH_SIZE = 64
ENOUGH = 0.97

# --- the data: one folder per class, one PNG file per image ---


def write_digits(folder: Path) -> None:
    """Writes the digits as folder/label/number.png, all of them or, when interrupted, nothing."""
    from sklearn.datasets import load_digits

    digits = load_digits()  # from a file of scikit-learn's own: nothing is downloaded
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        file = partial / str(label) / f"{number:04}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15).astype(np.uint8)).save(file)  # 0...16 become 0...240
    partial.rename(folder)


def split(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files to train on and the files to test with: of each class, every fifth is held out."""
    training, held_out = [], []
    for label in sorted(folder.iterdir()):
        files = sorted(label.glob("*.png"))
        held_out += files[::5]
        training += [file for place, file in enumerate(files) if place % 5]
    return training, held_out


# --- what runs in the background ---


def decode(file: Path) -> torch.Tensor:
    """The image as 1 x 8 x 8 numbers, 0...1."""
    with Image.open(file) as image:
        return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)[None]


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image a little turned (12°), resized (10 %), moved (0.8 pixels) and noisy."""

    def between(limit: float, *shape: int) -> torch.Tensor:
        return (torch.rand(len(images), *shape, generator=generator) * 2 - 1) * limit

    angle, size = between(0.21), 1 + between(0.1)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(-1, 2, 2)
    transform = torch.cat([turn * size.view(-1, 1, 1), between(0.2, 2, 1)], dim=2)
    grid = F.affine_grid(transform, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, align_corners=False)
    return moved + 0.03 * torch.randn(images.shape, generator=generator)


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


def build_model() -> nn.Module:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(1, 32),
        *block(32, 32),
        nn.MaxPool2d(2),
        *block(32, 64),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64 * 2 * 2, 10),
    )


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
