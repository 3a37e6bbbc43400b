"""Collates a batch straight into shared memory that is used again.

torch's default collation has a map from the type of a sample to a function. In a worker, ``install`` replaces the
function for tensors by one that stacks them into a block of the pool. Collate functions that call ``default_collate``
profit from that too, and so do arrays, which torch collates as tensors.

A worker that is a thread shares the map with its process. There the function does this in workers' threads only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch

from ..marshalling.tensors import is_unusual
from ..memory import sharing, storages
from ..memory.block import Block, Geometry
from ..memory.packing import SMALL
from ..memory.recycling import block_of
from . import internals

#: The blocks into which this worker, a process, has stacked the tensors of its present batch. No other tensors are on
#: them, so these may go by reference.
collated_blocks: set[Block] = set()

_whole_process = False
#: How a stack of so many tensors of a dtype and shape lies in memory, and its bytes. Cleared when it is full.
_stacks: dict[tuple[torch.dtype, int, torch.Size], tuple[Geometry, int]] = {}
_MAX_STACKS: Final = 1024


def install(*, in_thread: bool) -> None:
    """Let default collation make shared tensors in this process, which is a worker; or, ``in_thread``, this thread."""
    global _whole_process
    _whole_process = _whole_process or not in_thread
    if internals.default_collate_fn_map.get(torch.Tensor) is internals.collate_tensor_fn:
        internals.default_collate_fn_map[torch.Tensor] = collate_tensor


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


def _stack(dtype: torch.dtype, count: int, shape: torch.Size) -> tuple[Geometry, int]:
    if len(_stacks) >= _MAX_STACKS:
        _stacks.clear()
    meta = torch.empty((count, *shape), dtype=dtype, device="meta")
    found = (storages.CODES[dtype], 0, meta.size(), meta.stride()), meta.numel() * meta.element_size()
    _stacks[dtype, count, shape] = found
    return found
