"""What a loader passes to its workers when they start."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from . import internals
from .counters import FLOW_MEMORY_NAME, Counters
from .messages import Snapshot
from .statistics import StatsCollector


@dataclass
class LoaderConfig:
    """What all workers of a loader have in common.

    Attributes:
        kind, dataset, auto_collation, collate_fn, drop_last, base_seed, batch_size: as torch's loader has them.
        init_fn: the ``worker_init_fn``.
        saves_rng: whether snapshots have the states of random number generators.
        snapshot_every: after how many of its batches a worker sends a snapshot; 0 for never.
        counters, flow: the shared words of all workers.
        prefetch: how many batches a worker may make ahead.
    """

    kind: int
    dataset: Any
    auto_collation: bool
    collate_fn: Any
    drop_last: bool
    base_seed: int
    init_fn: Any
    batch_size: int | None
    saves_rng: bool
    snapshot_every: int
    counters: Counters
    flow: Counters
    prefetch: int

    @classmethod
    def from_loader(cls, iterator: Any, loader: Any, stats: StatsCollector) -> LoaderConfig:
        """For an ``iterator`` of ``loader``, which has the attributes that torch's base class sets."""
        max_workers, every = max(iterator._num_workers, loader._max_workers), loader.snapshot_every_n_steps or 0
        restarts = loader.on_worker_death == "restart" and loader.max_restarts > 0
        sharding = iterator._world_size, iterator._rank
        counters = stats.counters(max_workers, iterator._dataset)
        return cls(
            kind=iterator._dataset_kind,
            dataset=iterator._dataset,
            auto_collation=iterator._auto_collation,
            collate_fn=iterator._collate_fn,
            drop_last=iterator._drop_last,
            base_seed=iterator._base_seed,
            init_fn=internals.sharding_init(iterator._dataset, loader.worker_init_fn, *sharding),
            batch_size=loader.batch_size,
            saves_rng=loader._saves_rng or restarts,
            snapshot_every=1 if restarts else every and max(1, every // iterator._num_workers),
            counters=counters,
            flow=Counters(max_workers, name=f"{FLOW_MEMORY_NAME}{os.fstat(counters.fd).st_ino}"),
            prefetch=loader.prefetch_factor,
        )


@dataclass
class WorkerConfig:
    """What is different for each worker.

    Attributes:
        worker_id, num_workers, shared_seed: as torch's loader has them.
        resume: the snapshot from which it goes on.
        begins: whether ``resume`` is the end of an epoch, and the next one begins.
        room: for how many of its blocks the loader has room: see Note [in-band promises].
    """

    worker_id: int
    num_workers: int
    shared_seed: int | None
    resume: Snapshot = field(default_factory=Snapshot)
    begins: bool = False
    room: int = 0
