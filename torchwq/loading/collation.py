"""Collation straight into shared memory that is used again.

torch's default collation looks up in a map what to do with samples of a type. In a worker, the entry for tensors is
replaced by one that stacks them into a block of the pool. That also serves collate functions of a user's own that call
``default_collate``, and arrays, which torch collates as tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..marshalling.tensors import is_unusual
from ..memory import sharing, storages
from ..memory.block import Block
from ..memory.recycling import block_of
from . import internals

#: The blocks that this worker has stacked a batch's tensors into, since it was cleared. Nobody else has tensors on them,
#: so these tensors may go by reference.
made: set[Block] = set()


def install() -> None:
    """From now on default collation in this process, which is a worker, makes shared tensors."""
    if internals.default_collate_fn_map.get(torch.Tensor) is internals.collate_tensor_fn:
        internals.default_collate_fn_map[torch.Tensor] = collate_tensor


def collate_tensor(batch: Sequence[torch.Tensor], *, collate_fn_map: Any = None) -> Any:
    """Stack tensors as torch's default collation does."""
    first = batch[0]
    if type(first) is not torch.Tensor or is_unusual(first):
        return internals.collate_tensor_fn(batch, collate_fn_map=collate_fn_map)
    size = (len(batch), *first.shape)
    elements = len(batch) * first.numel()
    out = None
    if elements:
        stride, strides = elements, []
        for length in size:
            stride //= length
            strides.append(stride)
        geometry = storages.CODES[first.dtype], 0, size, tuple(strides)
        out = sharing.new(geometry, elements * first.element_size())
    if out is None:
        return torch.stack(tuple(batch), 0)
    block = block_of(out.untyped_storage())
    if block is not None:
        made.add(block)
    return torch.stack(tuple(batch), 0, out=out)
