"""Slices: storages that are a part of a block's memory. See ``packing``.

torch makes such a storage of any object with the buffer interface, and keeps the object for as long as the storage
lives. It does not know that the memory is shared. Where that matters (the writer and its readers have the same slice),
an attribute of the storage's Python object tells, which torch keeps for as long as the storage, too.
"""

from __future__ import annotations

import weakref
from typing import Any, Final

import torch

from ..errors import MarshalError
from . import storages
from .storages import Geometry

#: Where slices begin: a multiple of every dtype's size.
ALIGNMENT: Final = 64
_ATTRIBUTE: Final = "_torchwq_slice"


class Slice:
    """Where a shared slice is: the storage of the whole block, and the offset in bytes."""

    __slots__ = ("base", "shift")

    def __init__(self, base: torch.UntypedStorage, shift: int) -> None:
        self.base = base
        self.shift = shift


def aligned(nbytes: int) -> int:
    """Where the next slice may begin."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def cut(memory: Any, shift: int, nbytes: int) -> torch.UntypedStorage:
    """A storage on ``nbytes`` > 0 bytes of writable memory, which it keeps alive."""
    return torch.frombuffer(memory, dtype=torch.uint8, count=nbytes, offset=shift).untyped_storage()


def tensor(memory: Any, shift: int, geometry: Geometry) -> torch.Tensor:
    """A tensor of this geometry on a slice of its own."""
    code, offset, size, stride = geometry
    dtype = storages.DTYPES[code]
    count = 1
    for n, step in zip(reversed(size), reversed(stride), strict=True):
        if step != count and n > 1:
            break
        count *= n
    else:
        if not offset and not torch.is_inference_mode_enabled():
            return torch.frombuffer(memory, dtype=dtype, count=count, offset=shift).resize_(size)
    nbytes = offset * dtype.itemsize + storages.bytes_of(geometry)
    return storages.place(cut(memory, shift, nbytes), *geometry)


def cut_shared(memory: Any, base: torch.UntypedStorage, shift: int, nbytes: int) -> torch.UntypedStorage:
    """The same on the ``memory`` of the shared storage ``base``, for a slice that other processes have, too."""
    storage: Any = cut(memory, shift, nbytes)
    setattr(storage, _ATTRIBUTE, Slice(base, shift))
    storage.is_shared = _yes
    storage.share_memory_ = weakref.ref(storage)  # a call returns the storage, without a reference cycle
    storage._share_fd_cpu_ = storage._share_filename_cpu_ = _refuse
    return storage  # type: ignore[no-any-return]


def _yes() -> bool:
    return True


def _refuse(*args: object) -> Any:
    """torch's own reducer would move the slice out of the shared memory."""
    raise MarshalError(
        "a tensor that came with many others in one message shares their memory, which torch alone cannot pass on; its "
        "reducers were registered again (torch.multiprocessing.reductions.init_reductions) after torchwq's. Call that "
        "before importing torchwq, or pass on a clone"
    )


def slice_of(storage: torch.UntypedStorage) -> Slice | None:
    """Where ``storage`` is, if it is a shared slice."""
    found: Slice | None = getattr(storage, _ATTRIBUTE, None)
    return found
