"""The state that a loader saves, from which another one gives the same batches.

It has the position in the sampler's sequence, and what makes the sequence the same: what the sampler drew from
(``sampler_rng``), or its own state if it has one. Going on means to draw and drop that many indices; nothing is
fetched. With ``in_order=False`` the state also has the indices that were drawn and have not come back. For the dataset
it has each worker's snapshot (``snapshots``); an iterable dataset without a state is iterated again up to its place.

The dict that users get has the keys of torchdata's StatefulDataLoader where these mean the same, because programs look
into it: flat without workers, and otherwise with a part for each worker.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Final

from .. import warning
from ..marshalling import exceptions
from .messages import Snapshot
from .plain_data import StateDict, copy_of_state, is_stateful, plain_index
from .sampler_cursor import SamplerState

_VERSION: Final = 2


@dataclass
class State:
    """A state from which a loader can go on.

    Attributes:
        iterable: whether the dataset is iterable.
        num_workers: how many workers there were.
        base_seed: the seed that the workers share.
        yielded: how many batches of the epoch were handed out.
        position: how many indices were drawn for that, including those that failed before the last batch.
        finished: whether the epoch has ended.
        begins: whether this is the beginning of an epoch, the first or the one after this.
        draws: see ``sampler_rng``.
        is_drawn_ahead: whether ``draws`` belongs to the next epoch, because indices of that were drawn ahead.
        sampler: the sampler's state.
        snapshots: each worker's, or that of this process.
        active: which workers' parts of an iterable dataset had not ended.
        next_worker: the worker whose batch is the next.
        pending: indices that were drawn and not handed out, if these are not simply the next ones.
    """

    iterable: bool
    num_workers: int
    base_seed: int = 0
    yielded: int = 0
    position: int = 0
    finished: bool = False
    begins: bool = False
    draws: dict[str, Any] = field(default_factory=dict)
    sampler: SamplerState | None = None
    snapshots: list[Snapshot] = field(default_factory=list)
    active: list[bool] = field(default_factory=list)
    next_worker: int = 0
    pending: list[Any] | None = None
    is_drawn_ahead: bool = False

    @classmethod
    def initial(cls, dataset: Any, iterable: bool, num_workers: int) -> State:
        """The state of a loader before its first epoch."""
        count = max(1, num_workers)
        snapshots = [Snapshot() for _ in range(count)]
        if not num_workers and is_stateful(dataset):
            try:
                snapshots[0].dataset = copy_of_state(dataset.state_dict())
            except AttributeError:
                if not iterable:
                    raise
                # It may have a state only after ``iter``.
        return cls(iterable, num_workers, begins=True, snapshots=snapshots, active=[True] * count)

    def at_beginning(self) -> State:
        """The same at the beginning of the epoch, when the dataset and the sampler have their states already."""
        count = max(1, self.num_workers)
        return replace(
            self,
            begins=False,
            finished=False,
            yielded=0,
            position=0,
            sampler=None,
            snapshots=[Snapshot() for _ in range(count)],
            active=[True] * count,
            next_worker=0,
            pending=None,
        )

    def to_dict(self) -> StateDict:
        """As plain data. Raises what ``state_dict`` of the dataset, its iterator or the sampler has raised."""
        sampler = self.sampler or SamplerState()
        if sampler.error is not None:
            raise sampler.error
        made = StateDict(
            {
                "_torchwq_version": _VERSION,
                "iterable": self.iterable,
                "num_workers": self.num_workers,
                "yielded": self.yielded,
                "begins": self.begins,
                "draws": self.draws,
                "pending": None if self.pending is None else plain_index(self.pending),
                "next_worker": self.next_worker,
                "_iterator_finished": self.finished,
            }
        )
        main = {
            "_sampler_iter_yielded": self.position,
            "_index_sampler_state": sampler.sampler,
            "_sampler_iter_state": sampler.iterator,
            "_sampler_steps": sampler.steps,
            "_base_seed": self.base_seed,
        }
        if not self.num_workers:
            made.update(main)
            made["_num_yielded"] = self.yielded
            made.update(self._part(0))
            return made
        made["_snapshot"] = {
            "_snapshot_step": self.yielded,
            "_main_snapshot": main,
            "_worker_snapshots": {f"worker_{each}": self._part(each) for each in range(self.num_workers)},
        }
        made["_steps_since_snapshot"] = 0
        return made

    def _part(self, worker_id: int) -> dict[str, Any]:
        """The part of one worker."""
        snapshot = self.snapshots[worker_id]
        if snapshot.error is not None:
            error = exceptions.unpack(snapshot.error)
            who = f"DataLoader worker {worker_id}" if self.num_workers else "this process"
            exceptions.add_note(error, f"raised by state_dict() of the dataset or its iterator, in {who}")
            raise error
        fetcher = {"dataset_iter_state": snapshot.iterator, "fetcher_ended": snapshot.ended} if self.iterable else None
        return {
            "worker_id": worker_id,
            "active": self.active[worker_id],
            "batches": snapshot.batches,
            "noted": snapshot.captured_at,
            "again": None if snapshot.replay is None else plain_index(snapshot.replay),
            "random": snapshot.rng,
            "dataset_state": snapshot.dataset,
            "fetcher_state": fetcher,
        }

    @classmethod
    def from_dict(cls, saved: Any) -> State:
        """The reverse of ``to_dict``. Raises ValueError if ``saved`` is something else."""
        if not isinstance(saved, dict) or saved.get("_torchwq_version") != _VERSION:
            raise ValueError(_NO_STATE)
        try:
            return cls._from_dict(saved)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{_NO_STATE} (this one lacks {error})") from error

    @classmethod
    def _from_dict(cls, saved: dict[str, Any]) -> State:
        count = saved["num_workers"]
        main = saved["_snapshot"]["_main_snapshot"] if count else saved
        parts = [saved["_snapshot"]["_worker_snapshots"][f"worker_{each}"] for each in range(count)] or [saved]
        sampler = SamplerState(main["_index_sampler_state"], main["_sampler_iter_state"], main["_sampler_steps"])
        return cls(
            iterable=saved["iterable"],
            num_workers=count,
            base_seed=main["_base_seed"],
            yielded=saved["_num_yielded"] if not count else saved["yielded"],
            position=main["_sampler_iter_yielded"],
            finished=saved["_iterator_finished"],
            begins=saved["begins"] or saved["_iterator_finished"],
            draws=saved["draws"],
            sampler=sampler,
            snapshots=[_snapshot(each) for each in parts],
            active=[each["active"] for each in parts],
            next_worker=saved["next_worker"],
            pending=saved["pending"],
        )

    def fitted(self, iterable: bool, num_workers: int, strict: bool) -> State:
        """The state for a loader of this kind.

        Raises ValueError if the loader cannot go on from here; with ``strict``, also if it would lose something.
        """
        if self.iterable != iterable:
            kinds = {True: "an iterable-style", False: "a map-style"}
            raise ValueError(
                f"this state was taken from a loader with {kinds[self.iterable]} dataset, and this one has "
                f"{kinds[iterable]} one: load it into a loader made like the first"
            )
        has_dataset_state = any(each.dataset is not None or each.iterator is not None for each in self.snapshots)
        if self.num_workers == num_workers:
            return self
        both = (
            f"this state was taken with num_workers={self.num_workers} and this loader has num_workers={num_workers}: "
            f"which worker makes which batch, and with which random numbers, depends on that. "
        )
        if not self.begins or has_dataset_state:
            if self.iterable:
                raise ValueError(
                    f"{both}Make the loader with num_workers={self.num_workers}, or begin the epoch anew: an iterable "
                    f"dataset is shared out among its workers, so there is no place in it for another number of them"
                )
            if strict:
                raise ValueError(
                    f"{both}Make the loader with num_workers={self.num_workers}, or begin the epoch anew, or go on at "
                    f"the same sample with load_state_dict(state, strict=False)"
                )
            lost = ", and what the workers' datasets had told of themselves is lost" if has_dataset_state else ""
            warning.warn(
                f"this state was taken with num_workers={self.num_workers} and this loader has "
                f"num_workers={num_workers}: it goes on at the same sample, but workers' random numbers begin "
                f"anew{lost}",
            )
        return replace(
            self,
            num_workers=num_workers,
            snapshots=[Snapshot() for _ in range(max(1, num_workers))],
            active=[True] * max(1, num_workers),
            next_worker=self.position % max(1, num_workers),
        )


_NO_STATE: Final = (
    "this is no state of a torchwq.DataLoader (of torchdata's StatefulDataLoader, perhaps?): load what state_dict() of "
    "a torchwq.DataLoader has returned"
)


def check_same_batches(then: dict[str, Any], now: dict[str, Any], strict: bool) -> None:
    """Compare what two loaders were made with: the one that a state was taken from, and the one that loads it.

    Raises ValueError if the batches that were left would be others; without ``strict``, warns.
    """
    names = {"length": "len(dataset)"}
    changed = [name for name in now if then.get(name, now[name]) != now[name]]
    if not changed:
        return
    told = " and ".join(f"{names.get(name, name)}={then[name]}, and this loader has {now[name]}" for name in changed)
    text = f"this state was taken with {told}: the batches that were left would be others"
    if strict:
        raise ValueError(f"{text}. Load it into a loader made like the first, or with strict=False")
    warning.warn(f"{text}: some samples may come twice, or never")


def _snapshot(part: dict[str, Any]) -> Snapshot:
    fetcher = part["fetcher_state"] or {"dataset_iter_state": None, "fetcher_ended": False}
    return Snapshot(
        batches=part["batches"],
        captured_at=part["noted"],
        replay=part["again"],
        iterator=fetcher["dataset_iter_state"],
        dataset=part["dataset_state"],
        rng=part["random"],
        ended=fetcher["fetcher_ended"],
    )
