"""``DataLoader(backend="thread")``: the same batches, from the same process."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import pytest
import torch
import torch.utils.data
from torch.utils.data import Dataset, IterableDataset, get_worker_info

import torchwq


class Samples(Dataset[Any]):
    def __init__(self, n: int, fails_at: int = -1) -> None:
        self.x = torch.arange(n * 6, dtype=torch.float32).view(n, 2, 3)
        self.fails_at = fails_at

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == self.fails_at:
            raise ValueError("cannot be read")
        worker = get_worker_info()
        return {"x": self.x[index], "index": index, "worker": -1 if worker is None else worker.id, "pid": os.getpid()}


class Stream(IterableDataset[int]):
    """Each worker has its part, by attributes that ``worker_init_fn`` sets, as torch's documentation shows it."""

    def __init__(self, n: int) -> None:
        self.n, self.start, self.end = n, 0, n

    def __iter__(self) -> Any:
        return iter(range(self.start, self.end))


def share_out(worker_id: int) -> None:
    worker = get_worker_info()
    assert worker is not None
    part = worker.dataset.n // worker.num_workers
    worker.dataset.start, worker.dataset.end = part * worker_id, part * (worker_id + 1)


class Resumable(IterableDataset[int]):
    def __init__(self, n: int) -> None:
        self.n, self.at = n, 0

    def __iter__(self) -> Any:
        while self.at < self.n:
            self.at += 1
            yield self.at - 1

    def state_dict(self) -> dict[str, int]:
        return self.__dict__

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.__dict__.update(state)


class Reused(IterableDataset[torch.Tensor]):
    """Yields the same tensor again and again."""

    def __iter__(self) -> Any:
        buffer = torch.zeros(2)
        for _ in range(6):
            buffer += 1
            yield buffer


def plain(batch: Any) -> Any:
    """With tensors as lists, so that it can be compared."""
    if isinstance(batch, dict):
        return {key: plain(value) for key, value in batch.items()}
    return batch.tolist() if isinstance(batch, torch.Tensor) else batch


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"batch_size": 4},
        {"batch_size": None},
        {"batch_size": 5, "drop_last": True, "shuffle": True},
        {"batch_size": 3, "num_workers": 3, "prefetch_factor": 1},
        {"batch_size": 4, "persistent_workers": True, "shuffle": True},
    ],
    ids=str,
)
def test_batches_are_those_of_torchs_loader(arguments: dict[str, Any]) -> None:
    arguments = {"num_workers": 2, **arguments}

    def epochs(loader: Any) -> list[Any]:
        torch.manual_seed(3)
        return [[plain(batch) for batch in loader] for _ in range(2)]

    theirs = epochs(torch.utils.data.DataLoader(Samples(23), **arguments))
    ours = epochs(torchwq.DataLoader(Samples(23), backend="thread", **arguments))
    for their, our in zip(theirs, ours, strict=True):
        for a, b in zip(their, our, strict=True):
            assert {key: a[key] for key in ("x", "index", "worker")} == {
                key: b[key] for key in ("x", "index", "worker")
            }
            pids = b["pid"] if isinstance(b["pid"], list) else [b["pid"]]
            assert set(pids) == {os.getpid()}
    assert get_worker_info() is None


def test_iterable_datasets_are_shared_out_by_worker_info() -> None:
    arguments: dict[str, Any] = {"batch_size": 3, "num_workers": 2, "worker_init_fn": share_out}
    dataset = Stream(20)
    theirs = [plain(batch) for batch in torch.utils.data.DataLoader(Stream(20), **arguments)]
    assert [plain(batch) for batch in torchwq.DataLoader(dataset, backend="thread", **arguments)] == theirs
    assert (dataset.start, dataset.end) == (0, 20), "each worker's attributes are its own"


def test_default_collation_outside_of_workers_is_torchs_own() -> None:
    list(torchwq.DataLoader(Samples(4), num_workers=1, backend="thread"))
    assert not torch.utils.data.default_collate([torch.ones(2), torch.ones(2)]).is_shared()


def test_an_error_comes_at_its_batch_with_its_type_and_place() -> None:
    loader = torchwq.DataLoader(Samples(12, fails_at=5), batch_size=2, num_workers=2, backend="thread")
    iterator = iter(loader)
    assert [plain(next(iterator)["index"]) for _ in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match="cannot be read") as caught:
        next(iterator)
    assert "worker thread 0, at index 5" in str(caught.value.__notes__)
    assert any(entry.name == "__getitem__" for entry in caught.traceback)
    assert plain(next(iterator)["index"]) == [6, 7]


def test_leaving_early_ends_the_threads() -> None:
    def running() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name != "torchwq-cleanup"}  # comes and goes

    before = running()
    for _ in torchwq.DataLoader(Samples(100), num_workers=3, backend="thread"):
        break
    assert running() <= before


def test_a_state_taken_in_mid_epoch_is_gone_on_from() -> None:
    def make() -> Any:
        return torchwq.DataLoader(Samples(40), batch_size=3, num_workers=2, shuffle=True, backend="thread")

    loader = make()
    iterator = iter(loader)
    for _ in range(5):
        next(iterator)
    state = loader.state_dict()
    rest = [plain(batch["index"]) for batch in iterator]
    again = make()
    again.load_state_dict(state)
    assert [plain(batch["index"]) for batch in again] == rest


def test_the_state_of_a_dataset_is_that_of_the_batch_handed_out() -> None:
    def make() -> Any:
        return torchwq.DataLoader(Resumable(10), batch_size=2, num_workers=1, backend="thread")

    loader = make()
    iterator = iter(loader)
    assert [plain(next(iterator)) for _ in range(2)] == [[0, 1], [2, 3]]
    state = loader.state_dict()
    again = make()
    again.load_state_dict(state)
    assert [plain(batch) for batch in again] == [[4, 5], [6, 7], [8, 9]]


def test_samples_that_are_not_collated_are_copies() -> None:
    loader = torchwq.DataLoader(Reused(), batch_size=None, num_workers=1, backend="thread")
    assert [plain(sample) for sample in loader] == [[n, n] for n in range(1, 7)]
    dataset = Samples(3)
    for sample in torchwq.DataLoader(dataset, batch_size=None, num_workers=1, backend="thread"):
        sample["x"].zero_()
    assert dataset.x.sum() > 0


def test_in_order_false_timeout_auto_and_restart() -> None:
    loader = torchwq.DataLoader(Samples(30), batch_size=2, num_workers=2, backend="thread", in_order=False)
    assert sorted(index for batch in loader for index in plain(batch["index"])) == list(range(30))
    with pytest.raises(RuntimeError, match="timed out"):
        list(torchwq.DataLoader(Slow(), num_workers=1, backend="thread", timeout=0.1))
    loader = torchwq.DataLoader(Samples(300), num_workers="auto", backend="thread")
    assert len(list(loader)) == 300
    with pytest.raises(torchwq.WorkerDied, match="exit status"):
        list(torchwq.DataLoader(Leaves(), num_workers=1, backend="thread"))
    with pytest.raises(ValueError, match="multiprocessing_context"):
        torchwq.DataLoader(Samples(3), num_workers=1, backend="thread", multiprocessing_context="fork")
    with pytest.raises(ValueError, match="backend"):
        torchwq.DataLoader(Samples(3), num_workers=1, backend="fibre")  # type: ignore[arg-type]


class Slow(Samples):
    def __init__(self) -> None:
        super().__init__(3)

    def __getitem__(self, index: int) -> Any:
        time.sleep(0.4)  # what the loader's timeout is for
        return index


class Leaves(Samples):
    def __init__(self) -> None:
        super().__init__(3)

    def __getitem__(self, index: int) -> Any:
        raise SystemExit(4)


def test_a_process_loader_inside_a_thread_worker_has_its_own_worker_info() -> None:
    (found,) = torchwq.DataLoader([0], batch_size=None, num_workers=1, backend="thread", collate_fn=load_inside)
    assert found == [[0, 2], [1, 2]]


def load_inside(sample: Any) -> Any:
    inner = torchwq.DataLoader(Who(), batch_size=None, num_workers=2)
    return [list(each) for each in inner]


class Who(IterableDataset[Any]):
    def __iter__(self) -> Any:
        worker = get_worker_info()
        assert worker is not None
        yield worker.id, worker.num_workers
