"""Collation straight into shared memory that is used again.

torch's default collation looks up in a map what to do with samples of a type. In a worker, the entry for tensors is
replaced by one that stacks them into a block of the pool. That also serves collate functions of a user's own that call
``default_collate``, and arrays, which torch collates as tensors.

A worker that is a thread shares that map with its process: there the entry does so in workers' threads only.
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

#: The blocks that this worker, a process, has stacked a batch's tensors into, since it was cleared. Nobody else has
#: tensors on them, so these tensors may go by reference.
collated_blocks: set[Block] = set()

_whole_process = False
#: How the stack of so many tensors of this type and size lies, and its bytes. Cleared when it has too many.
_stacks: dict[tuple[torch.dtype, int, torch.Size], tuple[Geometry, int]] = {}
_MAX_STACKS: Final = 1024


def install(*, in_thread: bool) -> None:
    """From now on default collation in this process, which is a worker, makes shared tensors; or in this thread."""
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
        return torch.stack(tuple(batch), 0)  # it will be packed with others
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
