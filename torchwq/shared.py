"""Shared memory without a queue: functions that make tensors in it, move tensors to it, and measure and limit it.

``torch.empty(...).share_memory_()`` makes new shared memory each time. These functions use the memory of earlier
tensors again, which is an order of magnitude faster for all but the smallest tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from .marshalling import codec
from .memory import limits, sharing, stats, storages
from .memory.stats import MemoryStats

T = TypeVar("T")


def _size(size: tuple[Any, ...]) -> tuple[int, ...]:
    if len(size) == 1 and isinstance(size[0], Sequence):
        size = tuple(size[0])
    return tuple(int(each) for each in size)


def _new(
    size: tuple[int, ...], stride: tuple[int, ...], extent: int, dtype: torch.dtype | None, requires_grad: bool
) -> torch.Tensor:
    dtype = dtype or torch.get_default_dtype()
    tensor = None
    if extent and storages.CAN_RECYCLE:
        tensor = sharing.new((storages.CODES[dtype], 0, size, stride), extent * dtype.itemsize)
        if tensor is None:
            limits.warn_of_copies()
    if tensor is None:
        tensor = torch.empty_strided(size, stride, dtype=dtype, device="cpu")
    return tensor.requires_grad_(requires_grad)


def empty(*size: Any, dtype: torch.dtype | None = None, requires_grad: bool = False) -> torch.Tensor:
    """Make a tensor in shared memory, with arbitrary values: writing it to a queue copies nothing.

    torchwq uses its memory again when no process has a tensor on it any more.

    Args:
        *size: its shape: integers, or one sequence of integers.
        dtype: its type; torch's default if None.
        requires_grad: whether autograd shall record operations on it.

    Returns:
        A contiguous CPU tensor. ``is_shared()`` is True, unless it has no elements or, with one warning, no more file
        descriptors can be had.

    Raises:
        ResourceError: there is no memory for it; the message names the limit.

    Source: ``torch.empty``.
    """
    shape = _size(size)
    meta = torch.empty(shape, device="meta")
    return _new(shape, meta.stride(), meta.numel(), dtype, requires_grad)


def zeros(*size: Any, dtype: torch.dtype | None = None, requires_grad: bool = False) -> torch.Tensor:
    """Make a tensor of zeros in shared memory. See :func:`empty`.

    Args:
        *size: its shape: integers, or one sequence of integers.
        dtype: its type; torch's default if None.
        requires_grad: whether autograd shall record operations on it.

    Raises:
        ResourceError: there is no memory for it; the message names the limit.

    Source: ``torch.zeros``.
    """
    return empty(*size, dtype=dtype).zero_().requires_grad_(requires_grad)


def empty_like(tensor: torch.Tensor, *, dtype: torch.dtype | None = None, requires_grad: bool = False) -> torch.Tensor:
    """Make a tensor in shared memory that has the shape, the type and the strides of another. See :func:`empty`.

    Args:
        tensor: the other, of any device.
        dtype: the new tensor's type; that of ``tensor`` if None.
        requires_grad: whether autograd shall record operations on it.

    Returns:
        A dense CPU tensor. As with ``torch.empty_like``, a tensor that has gaps or overlaps gives a dense one.

    Raises:
        ResourceError: there is no memory for it; the message names the limit.

    Source: ``torch.empty_like``.
    """
    meta = torch.empty_like(tensor, device="meta")
    return _new(tuple(meta.shape), meta.stride(), meta.numel(), dtype or tensor.dtype, requires_grad)


def share_(obj: T) -> T:
    """Move every tensor in ``obj`` into shared memory, in place, as writing it to a queue would.

    Args:
        obj: a tensor, or anything with tensors in it that could be written: containers, dataclasses, modules.

    Returns:
        ``obj`` itself. Its tensors alias the same memory as before among each other.

    Raises:
        MarshalError: something in it could not be written; the message names its place. Tensors before it may have
            been moved.
        ResourceError: there is no memory; the message names the limit.

    Source: ``torch.Tensor.share_memory_``, ``torch.nn.Module.share_memory``.
    """
    codec.encode_all([obj], codec.CALL_LIMIT, upvalues=True, root="share_", worker_resources=[])
    return obj


def memory_stats() -> MemoryStats:
    """Count the shared memory that this process has made, or has received tensors on.

    Source: ``torch.cuda.memory_stats``.
    """
    return stats.memory_stats()


def set_memory_limit(nbytes: int | None) -> None:
    """Limit how much shared memory this process, and each worker that it starts from now on, keeps for later tensors.

    Tensors may need more than that. Then torchwq makes it, and gives it back to the system when no tensor uses it.

    Args:
        nbytes: the limit in bytes, 0 to keep none; None for the default, a quarter of the memory that is available when
            the first block is made.

    Raises:
        ValueError: ``nbytes`` is negative.
    """
    limits.set_memory_limit(nbytes)
