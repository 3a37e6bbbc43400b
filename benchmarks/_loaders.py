"""The contenders of the loader benchmark: each makes the same batches of one dataset with the same number of workers.

Those of other projects are measured where they are installed (the extra `bench`), each set up as its documentation
shows for a map-style dataset: indices in batches, fetched and collated by its workers.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.multiprocessing
import torch.utils.data
from torch.utils.data import BatchSampler, Dataset, SequentialSampler, default_collate

import torchwq

FORK = multiprocessing.get_context("fork")

Loader = Callable[[Any, int, int], Iterable[Any]]
"""Makes an iterable of batches of a dataset, with a batch size and a number of workers."""


def fetch(dataset: Any, indices: list[int]) -> Any:
    return default_collate([dataset[index] for index in indices])


def batches_of(dataset: Any, batch_size: int) -> BatchSampler:
    return BatchSampler(SequentialSampler(dataset), batch_size, False)


def torchwq_loader(dataset: Any, batch_size: int, workers: int) -> Iterable[Any]:
    return torchwq.DataLoader(dataset, batch_size, num_workers=workers)


def torch_loader(strategy: str, dataset: Any, batch_size: int, workers: int) -> Iterable[Any]:
    torch.multiprocessing.set_sharing_strategy(strategy)
    return torch.utils.data.DataLoader(dataset, batch_size, num_workers=workers)


def torch_alone(dataset: Any, batch_size: int, workers: int) -> Iterable[Any]:
    return torch.utils.data.DataLoader(dataset, batch_size)


def stateful_loader(dataset: Any, batch_size: int, workers: int) -> Iterable[Any]:
    from torchdata.stateful_dataloader import StatefulDataLoader

    torch.multiprocessing.set_sharing_strategy("file_descriptor")
    loader: Iterable[Any] = StatefulDataLoader(dataset, batch_size, num_workers=workers)
    return loader


def nodes(dataset: Any, batch_size: int, workers: int) -> Iterable[Any]:
    from torchdata import nodes as tn

    source = tn.SamplerWrapper(batches_of(dataset, batch_size))
    mapped = tn.ParallelMapper(source, functools.partial(fetch, dataset), num_workers=workers, method="thread")
    loader: Iterable[Any] = tn.Loader(tn.Prefetcher(mapped, prefetch_factor=2 * workers))
    return loader


def spdl(dataset: Any, batch_size: int, workers: int) -> Iterable[Any]:
    from spdl.pipeline import PipelineBuilder

    pipeline = (
        PipelineBuilder()
        .add_source(batches_of(dataset, batch_size))
        .pipe(functools.partial(fetch, dataset), concurrency=workers)
        .add_sink(2 * workers)
        .build(num_threads=workers)
    )

    def run() -> Iterator[Any]:
        with pipeline.auto_stop():
            yield from pipeline.get_iterator(timeout=60)

    return run()


class _Batches:
    """A dataset whose items are batches, for Grain."""

    def __init__(self, dataset: Any, batch_size: int) -> None:
        self.dataset, self.batch_size = dataset, batch_size

    def __len__(self) -> int:
        return len(self.dataset) // self.batch_size

    def __getitem__(self, number: int) -> Any:
        return fetch(self.dataset, list(range(number * self.batch_size, (number + 1) * self.batch_size)))


def grain(dataset: Any, batch_size: int, workers: int) -> Iterable[Any]:
    import grain as g

    items = g.MapDataset.source(_Batches(dataset, batch_size))
    loader: Iterable[Any] = items.to_iter_dataset(g.ReadOptions(num_threads=workers, prefetch_buffer_size=2 * workers))
    return loader


def available() -> dict[str, Loader]:
    """All that can be measured here, by name."""
    found: dict[str, Loader] = {
        "torchwq": torchwq_loader,
        "torch w0": torch_alone,
        "torch": functools.partial(torch_loader, "file_descriptor"),
        "torch fs": functools.partial(torch_loader, "file_system"),
    }
    others: dict[str, tuple[str, Loader]] = {
        "stateful": ("torchdata.stateful_dataloader", stateful_loader),
        "nodes": ("torchdata.nodes", nodes),
        "spdl": ("spdl.pipeline", spdl),
        "grain": ("grain", grain),
    }
    for name, (module, loader) in others.items():
        with contextlib.suppress(ImportError):
            __import__(module)
            found[name] = loader
    return found


def limit(dataset: Dataset[Any], batch_size: int, workers: int, seconds: float) -> float:
    """Batches per second of so many processes that only fetch and stack into warm memory, for nobody."""
    ready, go, rates = FORK.SimpleQueue(), FORK.Event(), FORK.SimpleQueue()

    def work() -> None:
        torch.set_num_threads(1)
        indices = list(range(batch_size))
        first = fetch(dataset, indices)
        memory = [_like(first) for _ in range(8)]
        ready.put(None)
        go.wait()
        count, until = 0, time.perf_counter() + seconds
        while time.perf_counter() < until:
            samples = [dataset[index] for index in indices]
            out = memory[count % len(memory)]
            if isinstance(out, dict):
                for key, each in out.items():
                    torch.stack([sample[key] for sample in samples], out=each)
            else:
                torch.stack(samples, out=out)
            count += 1
        rates.put(count / seconds)

    processes = [FORK.Process(target=work, daemon=True) for _ in range(workers)]
    for process in processes:
        process.start()
    for _ in processes:
        ready.get()
    go.set()
    total = sum(rates.get() for _ in processes)
    for process in processes:
        process.join()
    return float(total)


def _like(batch: Any) -> Any:
    if isinstance(batch, dict):
        return {key: torch.zeros_like(value) for key, value in batch.items()}
    return torch.zeros_like(batch)


def consume(loader: Iterable[Any], warm_up: int, count: int) -> tuple[float, float]:
    """Batches per second after some to warm up, and seconds to the first batch."""
    began = time.perf_counter()
    iterator = iter(loader)
    next(iterator)
    first = time.perf_counter() - began
    for _ in itertools.islice(iterator, warm_up):
        pass
    began = time.perf_counter()
    taken = sum(1 for _ in itertools.islice(iterator, count))
    seconds = time.perf_counter() - began
    close = getattr(iterator, "close", None)
    del iterator
    if callable(close):
        close()
    return taken / seconds, first
