"""Collates a batch straight into shared memory that is used again.

torch's default collation has a map from the type of a sample to a function. In a worker, ``install`` replaces the
function for tensors by one that stacks them into a block of the pool. Collate functions that call ``default_collate``
profit from that too, and so do arrays, which torch collates as tensors.

A worker that is a thread shares the map with its process. There the function does this in workers' threads only.

In a worker that is a process, the native part collates in torch's place, where the collation is torch's default and it
knows all samples of the batch: ``Collation``. A flat batch becomes a message at once: its tensors are made where they
arrive, and only there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch

from .. import _native
from ..marshalling import fast_path
from ..marshalling.tensors import is_unusual
from ..memory import pool, recycling, sharing, storages
from ..memory.block import Block, Geometry
from ..memory.packing import SMALL
from ..memory.recycling import block_of
from . import internals

#: The blocks into which this worker, a process, has stacked the tensors of its present batch. No other tensors are on
#: them, so these may go by reference.
collated_blocks: set[Block] = set()

_whole_process = False
#: How a stack of so many tensors of a dtype and shape lies in memory, and its bytes. Cleared when it is full.
_stacks: dict[tuple[torch.dtype, int, tuple[int, ...]], tuple[Geometry, int]] = {}
_MAX_STACKS: Final = 1024


def install(*, in_thread: bool) -> None:
    """Let default collation make shared tensors in this process, which is a worker; or, ``in_thread``, this thread."""
    global _whole_process
    _whole_process = _whole_process or not in_thread
    if internals.default_collate_fn_map.get(torch.Tensor) is internals.collate_tensor_fn:
        internals.default_collate_fn_map[torch.Tensor] = collate_tensor
    if _native.core is not None and not in_thread:
        _set_up_native(_native.core)


def _set_up_native(core: Any) -> None:
    fn_map, modes = internals.default_collate_fn_map, internals.mode_counters()
    if None in modes or fn_map.get(torch.Tensor) is not collate_tensor or not internals.has_own_collate_fns():
        return
    codes = storages.CODES[torch.int64], storages.CODES[torch.float64]
    functions = _new_tensor, _reserve, recycling.prepare_to_send, fast_path.lay_out
    core.set_collate(fn_map, dict(fn_map), modes, codes, functions)


class Collation:
    """torch's default collation in a worker that is a process: in C, where that does the same.

    Called with a list of samples, it returns the batch; or, if ``limit`` is not 0, perhaps a message with the batch, of
    at most so many bytes.
    """

    def __init__(self) -> None:
        self.limit = 0

    def __call__(self, samples: Any) -> Any:
        batch = _collate(samples, self.limit)
        return internals.default_collate(samples) if batch is None else batch


_collate: Final[Any] = None if _native.core is None else _native.core.collate


def for_worker(collate_fn: Callable[[Any], Any], *, in_thread: bool) -> Callable[[Any], Any]:
    """What does the same as ``collate_fn`` in a worker: a ``Collation``, if that is torch's default."""
    can_replace = _collate is not None and not in_thread and collate_fn is internals.default_collate
    return Collation() if can_replace else collate_fn


def _new_tensor(code: int, size: tuple[int, ...], nbytes: int) -> torch.Tensor:
    """A new tensor of a batch, its values arbitrary."""
    dtype = storages.DTYPES[code]
    if nbytes > SMALL:
        geometry, _ = _stacks.get((dtype, size[0], size[1:])) or _stack(dtype, size[0], size[1:])
        out = sharing.new(geometry, nbytes)
        block = None if out is None else block_of(out.untyped_storage())
        if out is not None and block is not None:
            collated_blocks.add(block)
            return out
    return torch.empty(size, dtype=dtype, device="cpu")


def _reserve(nbytes: int) -> tuple[Block, torch.UntypedStorage] | None:
    """A block of the pool, its values arbitrary, and its storage, which keeps it in use."""
    return pool.fill_block(nbytes, _with_storage, is_short=True)


def _with_storage(block: Block) -> tuple[Block, torch.UntypedStorage]:
    return block, block.storage


def collate_tensor(batch: Sequence[torch.Tensor], *, collate_fn_map: Any = None) -> Any:
    """Stack tensors as torch's default collation does."""
    first = batch[0]
    if not (_whole_process or internals.is_worker_thread()):
        return internals.collate_tensor_fn(batch, collate_fn_map=collate_fn_map)
    if type(first) is not torch.Tensor or is_unusual(first):
        return internals.collate_tensor_fn(batch, collate_fn_map=collate_fn_map)
    key = first.dtype, len(batch), first.shape
    geometry, nbytes = _stacks.get(key) or _stack(*key)
    if nbytes <= SMALL and _whole_process:
        return torch.stack(tuple(batch), 0)  # the message packs it into a block with others
    out = sharing.new(geometry, nbytes) if nbytes else None
    if out is None:
        return torch.stack(tuple(batch), 0)
    block = block_of(out.untyped_storage())
    if block is not None and _whole_process:
        collated_blocks.add(block)
    return torch.stack(tuple(batch), 0, out=out)


def _stack(dtype: torch.dtype, count: int, shape: tuple[int, ...]) -> tuple[Geometry, int]:
    if len(_stacks) >= _MAX_STACKS:
        _stacks.clear()
    meta = torch.empty((count, *shape), dtype=dtype, device="meta")
    found = (storages.CODES[dtype], 0, meta.size(), meta.stride()), meta.numel() * meta.element_size()
    _stacks[dtype, count, shape] = found
    return found
