"""``DataLoader``: torch's, with another transport between it and its workers.

It is a subclass, so that frameworks which check for ``torch.utils.data.DataLoader`` accept it. Argument checks,
samplers, collation and ``num_workers=0`` stay torch's. Only ``_get_iterator`` returns an iterator of
:mod:`torchwq.loading`.
"""

from __future__ import annotations

import copyreg
import weakref
from collections.abc import Callable, Iterable, Sized
from typing import Any, Final, Literal, TypeVar

import torch.utils.data
from torch.utils.data import Dataset, IterableDataset, RandomSampler, Sampler

from . import warning
from .loading import autoscaling, internals, sampler_rng, state
from .loading.in_process import InProcessIterator
from .loading.iterator import Iterator
from .loading.statistics import LoaderStatistics, StatsCollector
from .transport.waiting import cores
from .workers.backend import Backend, find

T_co = TypeVar("T_co", covariant=True)

#: The key in a state of what the loader was made with.
_MADE_WITH: Final = "_torchwq_made_with"


class DataLoader(torch.utils.data.DataLoader[T_co]):
    """Loads batches of a dataset with workers, like ``torch.utils.data.DataLoader``: same arguments, same batches.

    Change the import, and nothing else. Batches come through shared memory that is used again, so passing one costs a
    message. For equal seeds the batches are the same, bit for bit. Workers start as with torch: by fork where that is
    the platform's default. You can keep a batch for as long as you like, and change it in place.

    Args:
        dataset, batch_size, shuffle, sampler, batch_sampler, collate_fn, pin_memory, drop_last, timeout,
            worker_init_fn, generator, prefetch_factor, persistent_workers, pin_memory_device, in_order: as for torch's
            DataLoader.
        num_workers: how many worker processes load batches; 0 loads in this process, by torch's own code. ``"auto"``
            begins with one worker, and adds workers while the consumer waits for batches and more workers help: one for
            each idle core, and up to four for each core (at least 8) if workers mostly wait themselves. The logger
            ``torchwq`` reports what it adds, and why it stops. (An iterable dataset, whose parts depend on the number,
            gets one worker for each core from the start.)
        multiprocessing_context: as for torch's DataLoader. With ``"forkserver"`` or ``"spawn"``, torchwq's warm fork
            server starts workers with a clean environment: the dataset and the functions may come from a notebook or
            ``__main__``, lambdas and closures included, and all workers share the memory of the dataset's tensors and
            arrays.
        on_worker_death: ``"raise"`` raises WorkerDied. ``"restart"`` starts another worker, which makes the batches
            again that the dead one had in hand. The batches of a map-style dataset stay the same, bit for bit.
        max_restarts: how many restarts an iterator may do.
        prefetch_across_epochs: when the sampler has no more indices, workers go on with the first batches of the next
            epoch. Needs ``persistent_workers=True``, ``in_order=True`` and a map-style dataset.
        snapshot_every_n_steps: after how many batches workers (and the sampler) report their state, if they have one. A
            larger number saves time where the state is large; loading a state then makes the batches after the last
            report again. 0 or None: only at the beginning of an epoch.
        backend: ``"process"``, or ``"thread"``: workers are threads of this process. They start at once, and pay where
            loading waits or releases the GIL. Threads share the dataset (each has a shallow copy, whose attributes it
            may set), and batches are not copied: an object that ``collate_fn`` passes on is the dataset's own. Threads
            also share the global random generators: equal seeds give equal batches only if the dataset draws from other
            ones, for example one made with ``get_worker_info().seed``. Or ``"ray"``: workers on the machines of a Ray
            cluster; :class:`torchwq.ray.Backend` has options. They get a copy of the dataset, and batches travel by
            value.

    Raises:
        ValueError: for invalid combinations of arguments, with torch's own messages where torch has them.
        MarshalError: (by iterating) a part of the dataset cannot be sent to workers that begin clean; the message names
            its place.
        WorkerDied: (by iterating) a worker was killed; the message says which, how, and what it had in hand.

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
        backend: Literal["process", "thread", "ray"] | Backend = "process",
        snapshot_every_n_steps: int | None = 1,
    ) -> None:
        iterable = isinstance(dataset, IterableDataset)
        if not isinstance(num_workers, (int, str)):
            raise TypeError(f"num_workers must be a whole number or 'auto', not {num_workers!r}")
        if isinstance(num_workers, str) and not find(backend).peer.shares_memory:
            raise ValueError("num_workers='auto' counts cores of this machine: say how many workers the cluster gets")
        num_workers, max_workers = _numbers_of_workers(num_workers, iterable)
        _check(on_worker_death, max_restarts, backend, multiprocessing_context)
        _check_prefetching(prefetch_across_epochs, num_workers > 0 and persistent_workers and not iterable, in_order)
        self.backend = backend
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
        # The attributes have the names of the arguments: frameworks remake loaders from them.
        self.on_worker_death = on_worker_death
        self.max_restarts = max_restarts
        self.prefetch_across_epochs = prefetch_across_epochs
        self.snapshot_every_n_steps = snapshot_every_n_steps
        self._max_workers = max_workers
        self._saves_rng = False
        self._loaded_state: state.State | None = None
        self._stats = StatsCollector(self.num_workers)
        #: With workers, a weak reference to it: a reference would keep them alive.
        self._last_iterator: Any = None

    def __reduce__(self) -> Any:
        """A copy has the arguments, not the workers.

        ``__getstate__`` and ``__setstate__`` would not do: a wrapper that delegates unknown attributes would delegate
        these two as well, and set the wrapper's state in the loader.
        """
        found = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        if not isinstance(found, dict):  # of a subclass with its own ``__getstate__``, or slots
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
            self._last_iterator = InProcessIterator(self, self._stats, loaded)
            return self._last_iterator
        if self._max_workers:
            self.num_workers = max(self.num_workers, self._stats.workers)
        else:
            self.check_worker_number_rationality()
        self._stats.workers, self._stats.state = self.num_workers, None
        iterator = Iterator(self, self._stats, loaded)
        # Here and not in __iter__: a subclass may wrap the iterator, and the wrapper keeps it alive.
        self._last_iterator = weakref.ref(iterator)
        return iterator

    def check_worker_number_rationality(self) -> None:
        """Warn if there are more workers than cores, as torch's loader does; other machines have cores of their own."""
        if self.num_workers > cores() and find(self.backend).peer.shares_memory:
            # It begins as torch's, for filters; and has the user's line as its place.
            warning.warn(
                f"This DataLoader will create {self.num_workers} worker processes in total, and this process has "
                f"{cores()} cores. More workers than cores help only if they mostly wait: stats() tells whether they do"
            )

    def __iter__(self) -> Any:
        if self._loaded_state is not None and self._iterator is not None:
            iterator: Any = self._iterator
            iterator._shutdown_workers()  # a state has been loaded: begin with new workers
            self._iterator = None
        elif self._iterator is not None and isinstance(self._iterator, Iterator) and self._iterator.is_closed:
            self._iterator = None
        return super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Return a state from which a loader goes on after the last batch that this one's iterator has returned.

        Returns:
            Plain data, which can be saved with a checkpoint. Before the first epoch and after the end of an epoch
            (StopIteration), it stands for the beginning of the next.

        The random numbers that a dataset draws in its workers go on, too, if the loader was made with
        ``on_worker_death="restart"``, has loaded a state, or has returned one before. Otherwise workers do not save the
        state of their generators: that would cost about 0.1 ms a batch.

        Raises:
            Exception: an error from ``state_dict`` of the dataset, its iterator or the sampler.

        Source: ``torchdata.stateful_dataloader.StatefulDataLoader.state_dict``.
        """
        self._saves_rng = True
        made: dict[str, Any] = self._present_state().to_dict()
        made[_MADE_WITH] = self._made_with()
        return made

    def _present_state(self) -> state.State:
        if self._loaded_state is not None:
            return self._loaded_state
        iterator = self._last_iterator() if isinstance(self._last_iterator, weakref.ref) else self._last_iterator
        captured: state.State | None = self._stats.state if iterator is None else iterator.capture()
        if captured is None:
            captured = state.State.initial(self.dataset, isinstance(self.dataset, IterableDataset), self.num_workers)
        if captured.begins and not captured.is_drawn_ahead:  # with what is drawn from now on
            draws_seed = not (captured.finished and self.persistent_workers)
            captured.draws = sampler_rng.draws_of_next_epoch(self._index_sampler, self.generator, base_seed=draws_seed)
        return captured

    def _made_with(self) -> dict[str, Any]:
        """What the batches that are left depend on, beside what is in the state."""
        is_shuffled = isinstance(getattr(self, "sampler", None), RandomSampler)
        return {
            "batch_size": self.batch_size,
            "shuffle": is_shuffled,
            # More samples at the end of a sequence change nothing before them.
            "length": len(self.dataset) if is_shuffled and isinstance(self.dataset, Sized) else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> None:
        """Make the next ``iter(loader)`` go on where the state was taken, with exactly the batches that were left.

        For a map-style dataset only the sampler skips the batches before. An iterable dataset makes them again, unless
        it or its iterator has ``state_dict`` and ``load_state_dict``.

        Args:
            state_dict: a state that :meth:`state_dict` has returned, in this process or in another one.
            strict: False lets a loader with another number of workers go on at the same sample of a map-style dataset,
                with a warning: other workers make the batches, and their random numbers begin anew. So does a loader
                with another batch size, shuffling or length of the dataset: some samples may come twice or never.

        Raises:
            ValueError: the state is not one of a loader like this; the message says what this loader needs, for example
                the number of workers.

        Source: ``torchdata.stateful_dataloader.StatefulDataLoader.load_state_dict``.
        """
        loaded = state.State.from_dict(state_dict)
        if not loaded.begins:
            state.check_same_batches(state_dict.get(_MADE_WITH) or {}, self._made_with(), strict)
        if self._max_workers and loaded.num_workers:
            self.num_workers = loaded.num_workers
        self._loaded_state = loaded.fitted(isinstance(self.dataset, IterableDataset), self.num_workers, strict)
        self._saves_rng = True

    def stats(self, *, last_epoch: bool = False) -> LoaderStatistics:
        """Return where the time went so far, and whether the loader or the training loop is the slower one.

        Args:
            last_epoch: count since the beginning of the present epoch, or, between two, of the last one. Else since the
                loader was made, or since :meth:`reset_stats`.
        """
        return self._stats.read(last_epoch=last_epoch)

    def reset_stats(self) -> None:
        """Let :meth:`stats` count from now on."""
        self._stats.reset()

    @property
    def batches_done(self) -> int:
        """How many batches of its epoch the last iterator has returned: after ``load_state_dict``, those before it.

        So the progress bar of a resumed loop begins where the epoch goes on:
        ``tqdm(loader, initial=loader.batches_done)``.
        """
        if self._loaded_state is not None:
            return 0 if self._loaded_state.begins else self._loaded_state.yielded
        iterator = self._last_iterator() if isinstance(self._last_iterator, weakref.ref) else self._last_iterator
        if iterator is None:
            state = self._stats.state
            return 0 if state is None or state.begins or state.finished else int(state.yielded)
        return 0 if iterator.has_finished else int(iterator._num_yielded)

    def __repr__(self) -> str:
        called = self._IterableDataset_len_called
        try:
            batches = f", {len(self)} batches"
        except TypeError:  # an iterable dataset without a length
            batches = ""
        finally:
            self._IterableDataset_len_called = called  # torch warns who has asked for a length that is wrong
        workers = f"{self.num_workers} {find(self.backend).name} workers" if self.num_workers else "no workers"
        name = f"{type(self.dataset).__module__}.{type(self.dataset).__qualname__}".removeprefix("__main__.")
        return f"<torchwq.DataLoader of {name}, batch_size={self.batch_size}{batches}, {workers}>"


def _check(on_worker_death: str, max_restarts: int, backend: str | Backend, multiprocessing_context: Any) -> None:
    workers = find(backend)
    if multiprocessing_context is not None and "multiprocessing_context" not in workers.options:
        raise ValueError(f"multiprocessing_context is for processes: leave it out with backend={backend!r}")
    if on_worker_death not in ("raise", "restart"):
        raise ValueError(f"on_worker_death must be 'raise' or 'restart', not {on_worker_death!r}")
    if max_restarts < 0:
        raise ValueError("max_restarts must not be negative")


def _numbers_of_workers(num_workers: int | str, iterable: bool) -> tuple[int, int]:
    """Return the number of workers at first, and the largest number if it may change, else 0."""
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
