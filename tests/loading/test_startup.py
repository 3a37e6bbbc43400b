"""How the workers of a loader are started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import torchwq
from tests.conftest import wait_until
from torchwq.memory import recycling
from torchwq.workers import worker


class _Mapped(torch.utils.data.Dataset[torch.Tensor]):
    def __init__(self, path: str) -> None:
        self.tensor = torch.from_file(path, shared=True, size=4, dtype=torch.float64)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.tensor[index]


def test_a_plan_that_cannot_be_sent_is_an_error_and_no_worker_waits_for_it(tmp_path: Path) -> None:
    np.arange(4.0).tofile(tmp_path / "numbers")
    data = _Mapped(str(tmp_path / "numbers"))
    loader = torchwq.DataLoader(data, batch_size=4, num_workers=2, multiprocessing_context="forkserver")
    assert [batch.tolist() for batch in loader] == [[0, 1, 2, 3]]
    block = recycling.block_of(data.tensor.untyped_storage())
    assert block is not None
    fd, block.fd = block.fd, -1
    with pytest.raises(torchwq.ResourceError, match="could not be sent"):
        iter(loader)
    wait_until(lambda: not worker.active_workers(), what="the end of the workers")
    block.fd = fd
    assert [batch.tolist() for batch in loader] == [[0, 1, 2, 3]]


@pytest.mark.parametrize("context", ["fork", "forkserver"])
def test_the_memory_of_batches_is_used_again_in_a_program_that_does_nothing_else(run_script: Any, context: str) -> None:
    """No queue and no map has made the tree's folder, and so the table that says when memory is free, before."""
    run_script(
        f"""
        import torch, torchwq

        class Numbers(torch.utils.data.Dataset):
            def __len__(self):
                return 400

            def __getitem__(self, index):
                return torch.full((4,), index), index

        for batch in torchwq.DataLoader(Numbers(), batch_size=4, num_workers=1, multiprocessing_context="{context}"):
            pass
        stats = torchwq.memory_stats()
        assert stats.misses < 20 < 60 < stats.hits, stats
        """
    )
