"""One block of shared memory as one process sees it, and whether that process uses it.

A block is a ``memfd`` with a torch storage on it. The block keeps the storage when the last tensor on it is gone, so
that the next tensor costs no descriptor, no mapping and no page fault. Whether the last one *is* gone shows in the
storage: one in use has more owners, in C++ or in Python, than an idle one. Whatever points into the memory by means
that torch or Python know of (views, ``numpy()``, DLPack, graphs of autograd, a storage in a variable) is an owner.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch

from .. import _native
from . import storages
from .block_fields import MADE, MAPPED, PLAIN, BlockFields, SlicePrototypes, calibrate_native
from .counts import UNTRACKED
from .storages import Geometry as Geometry


class Block(BlockFields):
    """One block. Changed under ``state_lock.lock`` only, but for a made one that only one thread has yet."""

    __slots__ = ("__weakref__", "_adopted", "capacity", "watches")

    def __init__(self, kind: int, storage: torch.UntypedStorage, fd: int, capacity: int = 0) -> None:
        super().__init__()
        self.kind = kind
        #: Its row and generation in the reference table; UNTRACKED if it has none.
        self.number = UNTRACKED
        self.nbytes = storage.nbytes()
        #: Bytes of memory, of which the storage shows the first ``nbytes``.
        self.capacity = capacity or self.nbytes
        #: A descriptor of the memory. The storage owns it.
        self.fd = fd
        self.address = storage.data_ptr()
        self._adopted: Any = None
        if kind in (MADE, MAPPED):
            self.kept_storage, self.cdata = storage, storages.key(storage)
        else:
            self._adopted = weakref.ref(storage)
        #: Weak references to its private mappings, or to the adopted storage.
        self.watches: set[Any] = set()

    @property
    def storage(self) -> Any:
        """The storage; None if it is adopted or plain, and its last tensor in this process is gone."""
        return self.kept_storage if self.kind in (MADE, MAPPED) else self._adopted()

    def new_prototype(self, geometry: Geometry) -> torch.Tensor:
        """Add a tensor of this geometry to the prototypes. Only of a MADE or MAPPED block."""
        prototype = storages.place(self.kept_storage, *geometry)
        self.add_prototype(geometry, prototype)
        return prototype

    def new_slice_prototypes(
        self, key: Any, geometries: Sequence[Geometry], shifts: Sequence[int]
    ) -> list[torch.Tensor]:
        """Tensors of these geometries that are slices of it, in the place of others; only of a MADE or MAPPED block.

        Args:
            key: an object that stands for the others.
            geometries, shifts: where each tensor is, and where its slice begins; -1 for none.
        """
        places = [place for place in zip(shifts, geometries, strict=True) if place[0] >= 0]
        self.slice_prototypes = made = SlicePrototypes(self.kept_storage, key, places)
        return made.prototypes

    def drop(self) -> None:
        """Do not keep the storage any more."""
        if self.kind in (MADE, MAPPED):
            self.clear_prototypes()
            self.slice_prototypes = self.left_memory = None
            self._adopted, self.kept_storage, self.cdata = weakref.ref(self.kept_storage), None, None
        self.kind = PLAIN

    def __repr__(self) -> str:
        kind = ("made here", "mapped", "adopted", "plain")[self.kind]
        number = "untracked" if self.number == UNTRACKED else f"{self.number:#x}"
        return f"<block of {self.nbytes} bytes, {kind}, {number}>"


if _native.core is not None and storages.CAN_RECYCLE:
    calibrate_native(Block(MADE, torch.UntypedStorage(8), -1))
