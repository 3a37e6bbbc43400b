"""Trains with DistributedDataParallel, each rank with a torchwq.DataLoader of its own.

    torchrun --nproc-per-node 2 examples/ddp_digits.py [--loader torch]

As with torch's loader: a DistributedSampler gives each rank its part, `set_epoch` shuffles it anew, and the workers
stay from epoch to epoch. The losses are those with torch's loader, bit for bit. To prepare the data on other machines,
start a Ray cluster and pass `backend="ray"`: each rank then has its own workers there.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.utils.data
from digits import BATCH_SIZE, build_model, decode, split, write_digits
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset, DistributedSampler

import torchwq


class Images(Dataset[Any]):
    """The digits, decoded, with a little noise that the worker draws."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        file = self.files[index]
        pixels = decode(file)
        return pixels + 0.03 * torch.randn(pixels.shape), int(file.parent.name)


def main() -> int:
    parser = argparse.ArgumentParser(description="Train on two ranks.")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--loader", choices=["torchwq", "torch"], default="torchwq")
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parent / "data" / "digits")
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if rank == 0 and not arguments.data.exists():
        write_digits(arguments.data)
    dist.barrier()
    dataset = Images(split(arguments.data)[0])
    torch.manual_seed(0)
    torch.set_num_threads(1)
    sampler: DistributedSampler[Any] = DistributedSampler(dataset)
    cls: Any = torchwq.DataLoader if arguments.loader == "torchwq" else torch.utils.data.DataLoader
    loader = cls(dataset, BATCH_SIZE, sampler=sampler, num_workers=1, persistent_workers=True)
    model = DistributedDataParallel(build_model())
    optimizer = torch.optim.AdamW(model.parameters())
    for epoch in range(arguments.epochs):
        sampler.set_epoch(epoch)
        total = torch.zeros(())
        for images, labels in loader:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        dist.all_reduce(total)
        if rank == 0:
            print(f"epoch {epoch + 1}: the sum of the losses is {total.item()!r}", flush=True)
    del loader  # its workers end before the process group does
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
