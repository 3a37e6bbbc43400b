"""The shortest way for the commonest message with a tensor: one plain dense tensor and nothing else.

Such a message is the same pickle again and again, but for the number of the block, which is not in the pickle. So the
pickle is made once for each way to lie on a block, and recognised by its bytes at the reader, which then has nothing
to unpickle. What either side does not know takes the general way; the bytes are those of the general way, too.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Container
from typing import Any, Final

import torch

from ..memory import recycling, sharing
from ..memory.arrivals import take_tensor
from ..memory.block import MAPPED, Block, Geometry
from ..memory.ledger import UNTRACKED
from ..memory.parcel import REFERENCES, TRAILER, Parcel
from ..memory.recycling import block_of
from ..memory.storages import geometry
from .tensors import is_unusual, rebuild

#: Number and bytes of the one block, how many there are: as the general way lays them down.
_TAIL: Final = struct.Struct("=QQI")
_BEHIND: Final = _TAIL.size + TRAILER
#: How many different pickles are remembered.
_MOST: Final = 1024

_pickles: dict[Geometry, bytes] = {}
_geometries: dict[bytes, Geometry] = {}


class _Tensor:
    """Is pickled as a tensor that lies so on the first block of its message."""

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry

    def __reduce__(self) -> Any:
        code, offset, size, stride = self._geometry
        return rebuild, (0, code, offset, tuple(size), stride)


def _pickle_of(geometry: Geometry) -> bytes:
    if len(_pickles) >= _MOST:
        _pickles.clear()
        _geometries.clear()
    _pickles[geometry] = pickled = pickle.dumps(_Tensor(geometry), 5)
    _geometries[pickled] = geometry
    return pickled


def encode(tensor: torch.Tensor, limit: int, fresh: Container[Block] | None = None) -> Parcel | None:
    """The payload of a message with a plain tensor, which is shared then, or copied unless it is on a block of
    ``fresh``; None if it has to take the general way."""
    if tensor.requires_grad or is_unusual(tensor):
        return None
    storage = tensor.untyped_storage()
    block = block_of(storage)
    if fresh is not None and (block is None or block not in fresh):
        copied = sharing.copy(tensor) if tensor.numel() else None
        if copied is None:
            return None
        block, storage, where = copied
        return _parcel(block, storage, where, limit)
    if block is None:
        if storage.nbytes() == 0 or sharing.is_for_torch(storage):
            return None
        del storage
        block = sharing.share(tensor)
        if block is None:
            return None
        storage = tensor.untyped_storage()
    elif block.kind == MAPPED and not sharing.is_current(block):
        return None
    return _parcel(block, storage, geometry(tensor), limit)


def _parcel(block: Block, storage: torch.UntypedStorage, where: Geometry, limit: int) -> Parcel | None:
    if block.number == UNTRACKED:
        recycling.prepare_to_send(block)
    data = (_pickles.get(where) or _pickle_of(where)) + _TAIL.pack(block.number, block.nbytes, 1)
    if len(data) > limit:
        return None
    parcel = Parcel(data, [block.fd], [storage], REFERENCES, (block.number,), True)
    parcel.nbytes += block.nbytes
    return parcel


def decode(data: bytes) -> torch.Tensor | None:
    """The tensor of such a message, if its like was here before. Else None, and nothing is taken."""
    pickled = data[:-_BEHIND]
    where = _geometries.get(pickled)
    if where is None:
        return None
    number, nbytes, _ = _TAIL.unpack_from(data, len(pickled))
    return take_tensor(number, nbytes, where)


def learn(tensor: torch.Tensor) -> None:
    """Such a tensor came the general way: know its like the next time."""
    if not tensor.requires_grad and not is_unusual(tensor):
        where = geometry(tensor)
        if where not in _pickles:
            _pickle_of(where)
