"""What the examples with digits share: the images, how they are decoded and augmented, and a model.

The data are scikit-learn's 1,797 real handwritten digits of 8 x 8 pixels, written out as PNG files the first time.
"""

import os
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

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


# --- images ---


def decode(file: Path | IO[bytes]) -> torch.Tensor:
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


# --- the model ---


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
