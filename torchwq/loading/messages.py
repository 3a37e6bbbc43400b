"""What a loader and its workers say to each other, over one connection for each worker.

To the worker: ``(generation, indices)``, as the sampler gave them, for each of which it makes one batch; or a
:class:`NewEpoch`; or None, to wake it. To the loader: one answer for each index, in the order of the indices: the
batch itself, or one of the other classes here. So who answers what needs no numbers, and a worker whose connection ends
has in hand exactly what it has not answered.

Indices may be sent far ahead, many in a message. How far ahead *batches* are made is governed by shared words
(``counters``), so that a consumer that takes a batch need not send anything:

* The worker makes the next batch if it has made fewer than ``prefetch`` more than ``CONSUMED`` says.
* Else it sets ``ASLEEP``, looks once more, and waits for a message. Whoever raises ``CONSUMED`` looks at ``ASLEEP``
  after that, and sends a message if it is set. Both have a fence in between, so one of them sees the other's store.
* Tasks of another generation than ``GENERATION`` are not wanted any more. They are answered by ``End`` at once, but for
  those up to the answer ``LIMIT``, which torch's loader would have had made.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..marshalling.exceptions import PackedException


@dataclass(slots=True)
class Snapshot:
    """From where a worker can go on.

    Attributes:
        batches: how many batches the worker has made in this epoch.
        captured_at: after how many of them the rest of this was captured. Those after it are made again.
        replay: the indices of these, for a map-style dataset.
        iterator, dataset: what their ``state_dict()`` gave, where they have one.
        error: what one of these has raised instead.
        rng: the states of the random number generators that were drawn from.
        ended: whether the last batch was not complete, because an iterable dataset had no more.
    """

    batches: int = 0
    captured_at: int = 0
    replay: list[Any] | None = None
    iterator: Any = None
    dataset: Any = None
    error: PackedException | None = None
    rng: Any = None
    ended: bool = False

    def copied(self) -> Snapshot:
        """One that no further batch changes. (``dataclasses.replace`` takes five times as long.)"""
        replay = None if self.replay is None else self.replay.copy()
        return Snapshot(
            self.batches, self.captured_at, replay, self.iterator, self.dataset, self.error, self.rng, self.ended
        )


@dataclass(slots=True)
class NewEpoch:
    """Iterate anew. ``shared_seed`` is for datapipes."""

    shared_seed: int | None


@dataclass(slots=True)
class Answer:
    """An answer that is more than a batch. A batch with nothing else to tell goes as it is.

    Attributes:
        after: from where the worker would go on, if it tells that with this answer.
        before: from where it has begun; only the first answer of an epoch tells that.
    """

    after: Snapshot | None = field(default=None, kw_only=True)
    before: Snapshot | None = field(default=None, kw_only=True)


@dataclass(slots=True)
class Batch(Answer):
    """A batch, and a snapshot."""

    data: Any


@dataclass(slots=True)
class End(Answer):
    """The worker's part of an iterable dataset has come to its end; or nobody wants this batch any more."""


@dataclass(slots=True)
class Failure(Answer):
    """The dataset, or what was made of its samples, has raised; at this index, as far as that is known."""

    error: PackedException | BaseException
    where: str
