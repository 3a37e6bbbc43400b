"""``DataLoader``: torch's, with the transport under its workers replaced.

A subclass, so that frameworks which look for ``torch.utils.data.DataLoader`` take it, and everything that is not
about workers stays torch's: argument checks, samplers, collation, ``num_workers=0``. Only ``_get_iterator`` gives
another iterator, of :mod:`torchwq.loading`.
"""

from __future__ import annotations

import copyreg
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeVar

import torch.utils.data
from torch.utils.data import Dataset, IterableDataset, Sampler

from . import warning
from .loading import autoscaling, internals, sampler_rng, state
from .loading.in_process import InProcessIterator
from .loading.iterator import Iterator
from .loading.statistics import LoaderStatistics, StatsCollector
from .transport.waiting import cores
from .workers.backend import find

T_co = TypeVar("T_co", covariant=True)


class DataLoader(torch.utils.data.DataLoader[T_co]):
    """Loads batches of a dataset with workers, like ``torch.utils.data.DataLoader``: same arguments, same batches.

    Batches come through shared memory that is used again, so passing one costs a message. Change the import; nothing
    else has to change. For equal seeds the batches are the same, bit for bit. Workers start as they do with
    torch: forked where that is the platform's default. A batch can be kept for as long as you like, and be
    changed in place.

    Args:
        dataset, batch_size, shuffle, sampler, batch_sampler, collate_fn, pin_memory, drop_last, timeout,
            worker_init_fn, generator, prefetch_factor, persistent_workers, pin_memory_device, in_order: as for torch's
            DataLoader.
        num_workers: how many worker processes load batches; 0 loads in this process, by torch's own code; ``"auto"``
            begins with one and adds more while the consumer waits for batches and they help: one for each idle core,
            and up to four for each core (at least 8) if they mostly wait themselves. The logger ``torchwq`` tells when
            it adds some, and why it does not any more. (With an iterable dataset, whose parts depend on the number, one
            for each core from the start.)
        multiprocessing_context: as for torch's; with ``"forkserver"`` or ``"spawn"`` workers come from torchwq's warm
            fork server, with a clean environment: the dataset and the functions may be from a notebook or ``__main__``,
            lambdas and closures included, and tensors and arrays in the dataset are in memory once for all workers.
        on_worker_death: ``"raise"`` raises WorkerDied; ``"restart"`` starts the worker again and makes what it had in
            hand again. The batches of a map-style dataset stay the same, bit for bit.
        max_restarts: how often that is done in the life of an iterator.
        prefetch_across_epochs: when the sampler has no more indices, workers go on with the first batches of the next
            epoch. Needs ``persistent_workers=True``, ``in_order=True`` and a map-style dataset.
        snapshot_every_n_steps: after how many batches workers (and the sampler) tell their state, if any. Where
            it is large, a larger number saves time; what came after the last one is then made again when a state is
            loaded. 0 or None: only at the beginning of an epoch.
        backend: ``"process"``, or ``"thread"``: workers are threads of this process. They start at once, share the
            dataset (each has a shallow copy of it, so that setting its attributes is each worker's own affair), and
            their batches are not copied: what a ``collate_fn`` passes on as it is, is the dataset's own. That pays
            where loading waits, or releases the GIL. They also share the global generators of random numbers: with the
            same seeds the batches are the same only if the dataset draws from none of these, but for example from one
            made with ``get_worker_info().seed``.

    Raises:
        ValueError: for combinations that make no sense, with torch's own words where torch has them.
        MarshalError: (by iterating) workers begin clean, and something of the dataset cannot travel to them; the
            message names its place.
        WorkerDied: (by iterating) a worker was killed; the message tells which, how, and what it had in hand.

    Source: ``torch.utils.data.DataLoader``; ``torchdata.stateful_dataloader`` for ``state_dict``.

    See also: :func:`torchwq.memory_stats`, :meth:`stats`.
    """

    def __init__(
        self,
        dataset: Dataset[T_co],
        batch_size: int | None = 1,
        shuffle: bool | None = None,
        sampler: Sampler[Any] | Iterable[Any] | None = None,
        batch_sampler: Sampler[list[Any]] | Iterable[list[Any]] | None = None,
        num_workers: int | Literal["auto"] = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        drop_last: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: Any = None,
        generator: Any = None,
        *,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        pin_memory_device: str = "",
        in_order: bool = True,
        on_worker_death: Literal["raise", "restart"] = "raise",
        max_restarts: int = 3,
        prefetch_across_epochs: bool = False,
        backend: Literal["process", "thread"] = "process",
        snapshot_every_n_steps: int | None = 1,
    ) -> None:
        iterable = isinstance(dataset, IterableDataset)
        num_workers, max_workers = _numbers_of_workers(num_workers, iterable)
        _check(on_worker_death, max_restarts, backend, multiprocessing_context)
        _check_prefetching(prefetch_across_epochs, num_workers > 0 and persistent_workers and not iterable, in_order)
        super().__init__(
            dataset,
            batch_size,
            shuffle,
            sampler,
            batch_sampler,
            num_workers,
            collate_fn,
            pin_memory,
            drop_last,
            timeout,
            worker_init_fn,
            multiprocessing_context,
            generator,
            prefetch_factor=prefetch_factor,
            persistent_workers=persistent_workers,
            pin_memory_device=pin_memory_device,
            in_order=in_order,
        )
        # Under the names of the arguments: frameworks make loaders anew from such attributes.
        self.on_worker_death = on_worker_death
        self.max_restarts = max_restarts
        self.prefetch_across_epochs = prefetch_across_epochs
        self.backend = backend
        self.snapshot_every_n_steps = snapshot_every_n_steps
        self._max_workers = max_workers
        self._saves_rng = False
        self._loaded_state: state.State | None = None
        self._stats = StatsCollector(self.num_workers)
        #: With workers, a weak reference to it: a reference would keep them alive.
        self._last_iterator: Any = None

    def __reduce__(self) -> Any:
        """A copy has the arguments, not the workers.

        Not by ``__getstate__`` and ``__setstate__``: a wrapper that passes on what it does not have itself would pass
        on these two as well, and the wrapper's state would land in the loader.
        """
        found = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        if not isinstance(found, dict):  # a subclass has its own idea of it, or slots
            return copyreg.__newobj__, (type(self),), found  # type: ignore[attr-defined]
        kept = dict(found)
        if "_stats" in kept:
            kept.update(_stats=StatsCollector(self.num_workers), _last_iterator=None, _iterator=None)
        return copyreg.__newobj__, (type(self),), kept  # type: ignore[attr-defined]

    def _get_iterator(self) -> Any:
        if not internals.AVAILABLE:
            if self.num_workers:
                warning.warn(
                    "this version of torch lacks what torchwq.DataLoader builds on; torch's own transport is used",
                    RuntimeWarning,
                )
            return super()._get_iterator()
        loaded, self._loaded_state = self._loaded_state, None
        if self.num_workers == 0:
            self._last_iterator = InProcessIterator(self, loaded)
            return self._last_iterator
        if self._max_workers:
            self.num_workers = max(self.num_workers, self._stats.workers)
        else:
            self.check_worker_number_rationality()
        self._stats.workers, self._stats.state = self.num_workers, None
        iterator = Iterator(self, self._stats, loaded)
        # Noted here and not in __iter__: a subclass may wrap it, and the wrapper keeps it alive.
        self._last_iterator = weakref.ref(iterator)
        return iterator

    def __iter__(self) -> Any:
        if self._loaded_state is not None and self._iterator is not None:
            iterator: Any = self._iterator
            iterator._shutdown_workers()  # a state has been loaded: begin with new workers
            self._iterator = None
        elif self._iterator is not None and isinstance(self._iterator, Iterator) and self._iterator.is_closed:
            self._iterator = None
        return super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """From where the loader can go on: after the batch that its iterator has handed out last.

        Returns:
            Plain data, which can be saved with a checkpoint. Before the first epoch, and after the end of one was
            reached (StopIteration), it stands for the beginning of the next.

        The random numbers that a dataset draws in its workers go on where they were only if the loader was made with
        ``on_worker_death="restart"``, or was given a state or asked for one before: noting their state costs workers
        about 0.1 ms a batch.

        Raises:
            Exception: what ``state_dict`` of the dataset, its iterator or the sampler has raised.

        Source: ``torchdata.stateful_dataloader.StatefulDataLoader.state_dict``.
        """
        self._saves_rng = True
        if self._loaded_state is not None:
            return self._loaded_state.to_dict()
        iterator = self._last_iterator() if isinstance(self._last_iterator, weakref.ref) else self._last_iterator
        captured: state.State | None = self._stats.state if iterator is None else iterator.capture()
        if captured is None:
            captured = state.State.initial(self.dataset, isinstance(self.dataset, IterableDataset), self.num_workers)
        if captured.begins and not captured.is_drawn_ahead:  # with what is drawn from now on
            draws_seed = not (captured.finished and self.persistent_workers)
            captured.draws = sampler_rng.draws_of_next_epoch(self._index_sampler, self.generator, base_seed=draws_seed)
        return captured.to_dict()

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> None:
        """Let the next ``iter(loader)`` go on where the state was taken, with exactly the batches that were left.

        A map-style dataset is not asked for the batches before that: the sampler alone is moved on. An iterable one
        is, unless it or its iterator has ``state_dict`` and ``load_state_dict``.

        Args:
            state_dict: what :meth:`state_dict` has returned, in this process or in another one.
            strict: False lets a loader with another number of workers go on at the same sample of a map-style dataset,
                with a warning: which worker makes which batch has changed, and workers' random numbers begin anew.

        Raises:
            ValueError: it is no state of a loader like this one; the message tells what it needs, for example the
                number of workers.

        Source: ``torchdata.stateful_dataloader.StatefulDataLoader.load_state_dict``.
        """
        loaded = state.State.from_dict(state_dict)
        if self._max_workers and loaded.num_workers:
            self.num_workers = loaded.num_workers
        self._loaded_state = loaded.fitted(isinstance(self.dataset, IterableDataset), self.num_workers, strict)
        self._saves_rng = True

    def stats(self) -> LoaderStatistics:
        """Tell what the loader has done so far, and whether it or the training that it feeds is the slower one.

        With ``num_workers=0`` nothing is counted.
        """
        return self._stats.read()


def _check(on_worker_death: str, max_restarts: int, backend: str, multiprocessing_context: Any) -> None:
    workers = find(backend)
    if multiprocessing_context is not None and "multiprocessing_context" not in workers.options:
        raise ValueError(f"multiprocessing_context is for processes: leave it out with backend={backend!r}")
    if on_worker_death not in ("raise", "restart"):
        raise ValueError(f"on_worker_death must be 'raise' or 'restart', not {on_worker_death!r}")
    if max_restarts < 0:
        raise ValueError("max_restarts must not be negative")


def _numbers_of_workers(num_workers: int | str, iterable: bool) -> tuple[int, int]:
    """How many workers there are at first, and, if that may change, how many there may be."""
    if not isinstance(num_workers, str):
        return num_workers, 0
    if num_workers != "auto":
        raise ValueError(f"num_workers must be a number or 'auto', not {num_workers!r}")
    return (cores(), 0) if iterable else (1, autoscaling.max_workers(cores()))


def _check_prefetching(prefetch_across_epochs: bool, persistent: bool, in_order: bool) -> None:
    if prefetch_across_epochs and not persistent:
        raise ValueError(
            "prefetch_across_epochs needs workers that stay (num_workers > 0, persistent_workers=True) and a "
            "map-style dataset"
        )
    if prefetch_across_epochs and not in_order:
        raise ValueError("prefetch_across_epochs needs in_order=True: batches of two epochs would be mixed")
