"""What a loader saves, and how the same batches come out of it again.

For a map-style dataset the state is the position in the sampler's sequence, and what makes the sequence come out the
same: the state of the random number generator from which the sampler began to draw, or the sampler's own state if it
has one. Going on means to draw and drop that many indices; nothing is fetched.

For an iterable dataset it is the state of each worker's dataset or of its iterator, where they have one
(``state_dict``, as in torchdata); else how far it had come, and it is iterated again up to there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

import torch

from .messages import Snapshot

_VERSION: Final = 1


@dataclass
class State:
    """From where a loader can go on."""

    iterable: bool
    num_workers: int
    base_seed: int
    yielded: int
    finished: bool
    random: Any
    sampler: Any
    snapshots: list[Snapshot]
    active: list[bool]
    next_worker: int

    def to_dict(self) -> dict[str, Any]:
        """As plain data that ``torch.save`` and pickle can write."""
        saved = {each.name: getattr(self, each.name) for each in fields(self)}
        saved["snapshots"] = [asdict(snapshot) for snapshot in self.snapshots]
        saved["active"] = list(self.active)
        return {"_torchwq_version": _VERSION, **saved}

    @classmethod
    def from_dict(cls, saved: Any) -> State:
        """Raises ValueError if it is nothing that ``to_dict`` has made."""
        names = {each.name for each in fields(cls)}
        if not isinstance(saved, dict) or saved.get("_torchwq_version") != _VERSION or not names <= saved.keys():
            raise ValueError(
                "this is no state of a torchwq.DataLoader (of torchdata's StatefulDataLoader, perhaps?): load what "
                "state_dict() of a torchwq.DataLoader has returned"
            )
        values = {name: saved[name] for name in names}
        values["snapshots"] = [Snapshot(**each) for each in values["snapshots"]]
        return cls(**values)

    def check(self, iterable: bool, num_workers: int) -> None:
        """Raise ValueError if a loader of this kind cannot go on from here."""
        if self.iterable != iterable:
            kinds = {True: "an iterable-style", False: "a map-style"}
            raise ValueError(
                f"this state was taken from a loader with {kinds[self.iterable]} dataset, and this one has "
                f"{kinds[iterable]} one: load it into a loader made like the first"
            )
        if self.num_workers != num_workers and not self.finished:
            raise ValueError(
                f"this state was taken with num_workers={self.num_workers} and this loader has "
                f"num_workers={num_workers}: which worker makes which batch, and with which random numbers, depends on "
                f"that. Make the loader with num_workers={self.num_workers}, or begin the epoch anew"
            )


def stateful_sampler(sampler: Any) -> Any:
    """The batch sampler, or the sampler in it, if it has a state of its own; else None."""
    for each in (sampler, getattr(sampler, "sampler", None)):
        if hasattr(each, "state_dict") and hasattr(each, "load_state_dict"):
            return each
    return None


def restore_generators(sampler: Any, generator: Any, states: list[Any]) -> None:
    """Give generators of the loader's own the states that they had; torch's global one is left alone."""
    for each, state in zip(_generators(sampler, generator), states, strict=False):
        if each is not None:
            each.set_state(state)


def _generators(sampler: Any, generator: Any) -> list[Any]:
    """The generators that a sampler may draw from. The first is None, which stands for torch's global one."""
    own = [getattr(each, "generator", None) for each in (sampler, getattr(sampler, "sampler", None))]
    return [None, *(each for each in (*own, generator) if isinstance(each, torch.Generator))]


def random_state(sampler: Any, generator: Any) -> list[Any]:
    """The states of all generators that a sampler may draw from."""
    return [torch.get_rng_state() if each is None else each.get_state() for each in _generators(sampler, generator)]


@contextlib.contextmanager
def restored(sampler: Any, generator: Any, states: list[Any]) -> Iterator[None]:
    """Within it these generators have these states; torch's global one is as before afterwards."""
    before = torch.get_rng_state()
    torch.set_rng_state(states[0])
    restore_generators(sampler, generator, states)
    try:
        yield
    finally:
        torch.set_rng_state(before)
