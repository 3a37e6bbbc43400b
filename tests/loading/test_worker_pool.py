"""A loader's end of the connection to a worker."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import torchwq
from tests.conftest import wait_until
from torchwq.loading.messages import Snapshot
from torchwq.loading.worker_loop import WorkerConfig
from torchwq.loading.worker_pool import WorkerHandle
from torchwq.marshalling import codec
from torchwq.memory import recycling
from torchwq.transport.local import LocalEndpoint
from torchwq.workers import worker
from torchwq.workers.backend import find


def test_indices_that_two_threads_send_stay_in_order() -> None:
    theirs: list[LocalEndpoint] = []
    stub = SimpleNamespace()
    worker = WorkerHandle(
        lambda own_config, end: theirs.append(end) or stub,
        WorkerConfig(0, 1, None, Snapshot()),
        memoryview(b""),
        find("thread"),
    )
    done = threading.Event()

    def flush() -> None:
        while not done.is_set():
            worker.flush()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=flush)
    thread.start()
    try:
        for index in range(20_000):
            worker.assign([index])
            worker.flush(3)
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(interval)
    worker.flush()
    received: list[int] = []
    while (message := theirs[0].take()) is not None:
        _, indices = codec.decode(*message)
        received += [index for (index,) in indices]
    assert received == list(range(20_000))
    assert worker.unreceived == 20_000
    worker.close()
    theirs[0].close()


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
    wait_until(lambda: not worker.living(), what="the end of the workers")
    block.fd = fd
    assert [batch.tolist() for batch in loader] == [[0, 1, 2, 3]]
