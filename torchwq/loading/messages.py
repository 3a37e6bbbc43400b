"""What a loader and its workers say to each other, over one connection for each worker.

To the worker: an index as the sampler gave it, for which it makes one batch; or a :class:`NewEpoch`. To the loader: one
answer for each index, in the order of the indices: the batch itself, or one of the other classes here. So who answers
what needs no numbers, and a worker whose connection ends has in hand exactly what it has not answered.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..marshalling.exceptions import PackedException


@dataclass(slots=True)
class Snapshot:
    """From where a worker can go on.

    ``iterator`` and ``dataset`` are what their ``state_dict()`` gave, where they have one; ``random`` the states of the
    random number generators; ``batches`` how many batches the worker has made in this epoch.
    """

    batches: int = 0
    iterator: Any = None
    dataset: Any = None
    random: Any = None


@dataclass(slots=True)
class NewEpoch:
    """Iterate anew. ``shared_seed`` is for datapipes."""

    shared_seed: int | None


@dataclass(slots=True)
class Batch:
    """A batch, with from where to go on after it."""

    data: Any
    after: Snapshot


@dataclass(slots=True)
class End:
    """The worker's part of an iterable dataset has come to its end."""

    after: Snapshot = field(default_factory=Snapshot)


@dataclass(slots=True)
class Failure:
    """The dataset, or what was made of its samples, has raised; at this index, as far as that is known."""

    error: PackedException
    where: str
    after: Snapshot | None = None
