"""Checkpoints that cost the training loop nothing but a copy of the weights.

Every few steps a `torchwq.BackgroundTask` gets a snapshot of the model and writes it to the disk in another
process, while training goes on here. The task is a `concurrent.futures.Future`: `done()` polls it,
`result()` waits for it and raises what went wrong.

    python examples/background_checkpoint.py
"""

import os
import tempfile
from pathlib import Path

import torch
from torch import nn

import torchwq

STEPS, SAVE_EVERY = 400, 100


def save(snapshot: dict[str, torch.Tensor], step: int, path: Path) -> int:
    """Writes the whole checkpoint or nothing, so that nobody finds half of one. Returns its bytes."""
    partial = path.with_suffix(".partial")
    torch.save({"step": step, "model": snapshot}, partial)
    os.replace(partial, path)
    return path.stat().st_size


def snapshot_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy: tensors travel by reference, and training must not change what is being written."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def train_step(batch: int = 128) -> float:
    chosen = torch.randint(len(inputs), (batch,))
    loss = nn.functional.mse_loss(model(inputs[chosen]), targets[chosen])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


torchwq.warm_up()  # so that the first checkpoint does not wait for the first worker
torch.manual_seed(0)
torch.set_num_threads(1)
inputs = torch.randn(4096, 32)
targets = inputs.sin().sum(dim=1, keepdim=True)
model = nn.Sequential(nn.Linear(32, 768), nn.ReLU(), nn.Linear(768, 768), nn.ReLU(), nn.Linear(768, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "model.pt"
    saving: torchwq.BackgroundTask[int] | None = None
    snapshot, saved_step = snapshot_of(model), 0

    for step in range(1, STEPS + 1):
        loss = train_step()
        if saving is not None and saving.done():
            megabytes = saving.result() / 1e6
            print(f"step {step}  loss {loss:.3f}  checkpoint of step {saved_step} landed: {megabytes:.1f} MB")
            saving = None
        # One at a time: a disk slower than the training gets fewer checkpoints, not a queue of them.
        if step % SAVE_EVERY == 0 and saving is None:
            snapshot, saved_step = snapshot_of(model), step
            saving = torchwq.BackgroundTask(save, snapshot, step, path)

    if saving is not None:
        print(f"step {STEPS}  waited for the last one: {saving.result() / 1e6:.1f} MB")

    loaded = torch.load(path)
    assert loaded["step"] == saved_step
    assert loaded["model"].keys() == snapshot.keys()
    assert all(torch.equal(loaded["model"][name], value) for name, value in snapshot.items())
    print(f"the checkpoint of step {saved_step} holds what the model was then")
