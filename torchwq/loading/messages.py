"""The messages between a loader and each of its workers.

To the worker: ``(generation, indices)``, for each index of which it makes one batch; or a :class:`NewEpoch`; or None,
which wakes it. To the loader: one answer for each index, in order: the batch itself, or one of the other classes here.
So no message needs a number, and a worker whose connection ends had exactly the unanswered indices in hand.

Note [Flow of batches]

The loader may send indices far ahead. Shared words (``counters``) govern how far ahead the worker makes *batches*, so
a consumer that takes a batch need not send anything.

* The worker makes the next batch if it has made fewer than ``prefetch`` more than ``CONSUMED`` says.
* Else it sets ``ASLEEP``, looks once more, and waits for a message. The consumer raises ``CONSUMED``, looks at
  ``ASLEEP``, and sends a message if it is set. Both have a fence in between, so one of them sees the other's store.
* Nobody wants tasks of another generation than ``GENERATION`` any more. The worker answers them with ``End`` at once,
  except those up to the answer ``LIMIT``: torch's loader would have had these made.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..marshalling.exceptions import PackedException


@dataclass(slots=True)
class Snapshot:
    """A state of a worker, from which it can go on.

    Attributes:
        batches: how many batches the worker has made in this epoch.
        captured_at: after how many of them the rest was captured. The worker that goes on makes the later ones again.
        replay: the indices of the later ones, for a map-style dataset.
        iterator, dataset: what their ``state_dict()`` gave, where they have one.
        error: what one of these has raised instead.
        rng: the states of the random number generators that were drawn from.
        ended: whether the last batch was incomplete, because an iterable dataset had no more samples.
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
        """A copy that no further batch changes. (``dataclasses.replace`` takes five times as long.)"""
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
    """An answer that is more than a batch.

    Attributes:
        after: the worker's snapshot after this answer, if one is due.
        before: the snapshot from the beginning of the epoch, with its first answer.
    """

    after: Snapshot | None = field(default=None, kw_only=True)
    before: Snapshot | None = field(default=None, kw_only=True)


@dataclass(slots=True)
class Batch(Answer):
    """A batch, and a snapshot."""

    data: Any


@dataclass(slots=True)
class End(Answer):
    """The worker's part of an iterable dataset has ended; or nobody wants this batch any more."""


@dataclass(slots=True)
class Failure(Answer):
    """Making or sending a batch has raised ``error``; ``where``: at which index, in words."""

    error: PackedException | BaseException
    where: str
