"""The private parts of ``torch.utils.data`` that the loader uses. No other module uses them.

Checked on torch 2.13.0. The iterator is a subclass of torch's base class, and fetchers, seeding, samplers' handling and
``get_worker_info`` are torch's own, because copies of them would drift away from torch. Where one of these is missing,
``AVAILABLE`` is False and the loader leaves everything to torch's own iterator.
"""

from __future__ import annotations

import functools
import inspect
import threading
from typing import Any, Final

import torch
import torch.utils.data
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    IterDataPipe,
    MapDataPipe,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from ..transport.fork import reset_in_child

AVAILABLE: bool
try:
    from torch.utils.data import _utils, dataloader
    from torch.utils.data._utils import collate as _collate
    from torch.utils.data._utils import worker as _worker

    BaseIterator: Any = dataloader._BaseDataLoaderIter
    SingleProcessIterator: Any = dataloader._SingleProcessDataLoaderIter
    _kinds: Any = dataloader._DatasetKind
    _generate_state: Any = _worker._generate_state
    _sharding_init: Any = dataloader._sharding_worker_init_fn
    _share_seed: Any = dataloader._share_dist_seed
    default_collate_fn_map: dict[Any, Any] = _collate.default_collate_fn_map
    collate_tensor_fn: Any = _collate.collate_tensor_fn
    default_collate: Any = _collate.default_collate
    #: torch's functions for the samples that the native part collates, but for tensors.
    _collate_fns: Final[dict[Any, Any]] = {
        float: _collate.collate_float_fn,
        int: _collate.collate_int_fn,
        str: _collate.collate_str_fn,
        bytes: _collate.collate_str_fn,
    }
    pin_memory: Any = _utils.pin_memory.pin_memory
    ITERABLE: Final = _kinds.Iterable
    _SAMPLERS_WITHOUT_LATER_DRAWS: Final = frozenset(
        {
            SequentialSampler,
            SubsetRandomSampler,
            WeightedRandomSampler,
            DistributedSampler,
            dataloader._InfiniteConstantSampler,
        }
    )
    _WorkerInfo: Any = _worker.WorkerInfo
    #: Whether torch's profiler records what runs now.
    is_profiled: Any = torch.autograd._profiler_enabled  # type: ignore[attr-defined]
    AVAILABLE = True
except (ImportError, AttributeError):
    BaseIterator = SingleProcessIterator = object
    AVAILABLE = False


def has_own_collate_fns() -> bool:
    """Whether all functions of default collation are torch's own, but for the one for tensors."""
    others = {cls: function for cls, function in default_collate_fn_map.items() if cls is not torch.Tensor}
    own = all(getattr(function, "__module__", None) == _collate.__name__ for function in others.values())
    return own and all(others.get(cls) is function for cls, function in _collate_fns.items())


def mode_counters() -> tuple[Any, Any]:
    """Functions that count the active modes, which may change what torch's functions do; None where torch lacks one."""
    core: Any = torch._C
    return getattr(core, "_len_torch_function_stack", None), getattr(core, "_len_torch_dispatch_stack", None)


def numpy_seed(base_seed: int, worker_id: int) -> Any:
    """What torch seeds numpy with in a worker."""
    return _generate_state(base_seed, worker_id)


def make_fetcher(kind: int, dataset: Any, auto_collation: bool, collate_fn: Any, drop_last: bool) -> Any:
    """An object that fetches a batch by its indices: ``fetcher.fetch(index)``."""
    return _kinds.create_fetcher(kind, dataset, auto_collation, collate_fn, drop_last)


_thread_local = threading.local()


@reset_in_child
def _forget() -> None:
    """The thread that forks may be a worker. The child is not that worker."""
    vars(_thread_local).clear()


def set_worker_info(worker_id: int, num_workers: int, seed: int, dataset: Any, *, in_thread: bool) -> None:
    """Set what ``torch.utils.data.get_worker_info()`` gives in this process, or, ``in_thread``, in this thread.

    ``get_worker_info`` reads a variable of its module. Users may have imported the function under any name, so only
    its code can be replaced.
    """
    info = _WorkerInfo(id=worker_id, num_workers=num_workers, seed=seed, dataset=dataset)
    if not in_thread:
        _worker._worker_info = info
        return
    if _worker.get_worker_info.__code__ is not _get_worker_info.__code__:
        vars(_worker)["_torchwq_thread_local"] = _thread_local
        _worker.get_worker_info.__code__ = _get_worker_info.__code__
    _thread_local.info = info


def is_worker_thread() -> bool:
    """Whether this thread is a worker of a loader with ``backend="thread"``."""
    return hasattr(_thread_local, "info")


def _get_worker_info() -> Any:
    return getattr(_torchwq_thread_local, "info", _worker_info)  # type: ignore[name-defined]  # noqa: F821 - torch's globals


def sharding_init(dataset: Any, init_fn: Any, world_size: int, rank: int) -> Any:
    """``init_fn``; for a datapipe, after torch's sharding of it among the workers."""
    if isinstance(dataset, (IterDataPipe, MapDataPipe)):
        return functools.partial(_sharding_init, init_fn, world_size, rank)
    return init_fn


def new_shared_seed(dataset: Any, generator: Any, process_group: Any) -> int | None:
    """The seed that all workers share for a datapipe's epoch; None for any other dataset."""
    return _share_seed(generator, process_group) if isinstance(dataset, IterDataPipe) else None


def seeded(dataset: Any, shared_seed: int | None) -> Any:
    """A datapipe with its random parts seeded; any other dataset as it is."""
    if not isinstance(dataset, IterDataPipe):
        return dataset
    assert shared_seed is not None
    generator = torch.Generator()
    generator.manual_seed(shared_seed)
    settings: Any = torch.utils.data.graph_settings
    return settings.apply_random_seed(dataset, generator)


def sampler_chain(sampler: Any) -> tuple[Any, Any]:
    """A sampler, and the one that it draws from, if it has one."""
    return sampler, getattr(sampler, "sampler", None)


def _inner_sampler(sampler: Any) -> Any:
    """What torch's BatchSampler draws from; any other sampler itself."""
    return sampler.sampler if type(sampler) is BatchSampler else sampler


def can_draw_ahead(sampler: Any) -> bool:
    """Whether nobody can tell when an index is drawn from ``sampler``.

    It is one of torch's own, and after its first index it draws from no random number generator that others use.
    """
    sampler = _inner_sampler(sampler)
    if type(sampler) is RandomSampler:
        return sampler.generator is None or (not sampler.replacement and sampler.num_samples < len(sampler.data_source))
    return type(sampler) in _SAMPLERS_WITHOUT_LATER_DRAWS


def takes_seed(sampler: Any) -> RandomSampler | None:
    """torch's RandomSampler, if ``sampler`` is one, or batches of one, that takes a seed from the global generator."""
    sampler = _inner_sampler(sampler)
    return sampler if type(sampler) is RandomSampler and sampler.generator is None else None


def draws_nothing_global(sampler: Any) -> bool:
    """Whether ``sampler`` is known to draw nothing from torch's global generator, except a seed: see ``takes_seed``."""
    sampler = _inner_sampler(sampler)
    if type(sampler) in (RandomSampler, SubsetRandomSampler, WeightedRandomSampler):
        return sampler.generator is not None
    return type(sampler) in _SAMPLERS_WITHOUT_LATER_DRAWS or type(sampler) in (list, tuple, range)


def has_no_state(sampler: Any) -> bool:
    """Whether neither ``sampler`` nor its iterator can have ``state_dict``."""
    sampler = _inner_sampler(sampler)
    return type(sampler) in (RandomSampler, list, tuple, range) or type(sampler) in _SAMPLERS_WITHOUT_LATER_DRAWS


def may_have_state(kind: int, dataset: Any) -> bool:
    """Whether the iterator of a dataset may have ``state_dict``. A generator has none."""
    iterate = getattr(type(dataset), "__iter__", None)
    return bool(kind == ITERABLE) and not inspect.isgeneratorfunction(iterate)
