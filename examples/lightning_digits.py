"""Trains a small network with Lightning, fed by torchwq.DataLoader.

A `torchwq.DataLoader` is a `torch.utils.data.DataLoader`, so Lightning's `Trainer` takes it as it is. The only
difference to a script without torchwq is the import. At the end the loader says which side was the slower one.

    python examples/lightning_digits.py

Ends with the accuracy on a held-out fifth of scikit-learn's handwritten digits, with status 1 if it is below 95 %.
"""

import logging
import sys
import warnings
from typing import Any

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from torchwq import DataLoader  # instead of: from torch.utils.data import DataLoader

# What Lightning says of itself.
for name in ("lightning", "lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
    logging.getLogger(name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")

ENOUGH = 0.95


class Digits(Dataset[Any]):
    """Images of 8 x 8 pixels, some of them moved and all noisy when `train`, and their labels."""

    def __init__(self, train: bool) -> None:
        digits = load_digits()
        held_out = torch.arange(len(digits.target)) % 5 == 0
        chosen = ~held_out if train else held_out
        self.images = torch.tensor(digits.images, dtype=torch.float32)[chosen] / 16
        self.labels = torch.tensor(digits.target)[chosen]
        self.train = train

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = self.images[index]
        if self.train:
            image = image.roll(int(torch.randint(-1, 2, ())), 1) + 0.05 * torch.randn(8, 8)
        return image[None], self.labels[index]


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, 10),
        )
        self.right = self.seen = 0

    def training_step(self, batch: Any) -> torch.Tensor:
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)

    def test_step(self, batch: Any) -> None:
        images, labels = batch
        self.right += int((self.network(images).argmax(1) == labels).sum())
        self.seen += len(labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 2e-3)


def main() -> int:
    torch.manual_seed(0)
    model = Classifier()
    loader = DataLoader(Digits(train=True), batch_size=64, shuffle=True, num_workers=2, persistent_workers=True)
    trainer = lightning.Trainer(
        max_epochs=20,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader)
    trainer.test(model, DataLoader(Digits(train=False), batch_size=64, num_workers=2), verbose=False)
    accuracy = model.right / model.seen
    print(f"trained on {loader.stats().batches} batches from {loader.stats().num_workers} workers")
    print(loader.stats().verdict)
    print(f"accuracy on held-out images: {accuracy:.1%}")
    return 0 if accuracy >= ENOUGH else 1


if __name__ == "__main__":
    sys.exit(main())
