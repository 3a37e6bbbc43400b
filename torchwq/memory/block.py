"""One block of shared memory as one process sees it, and whether that process uses it.

A block is a ``memfd`` with a torch storage on it. The block keeps the storage when the last tensor on it is gone, so
that the next tensor costs no descriptor, no mapping and no page fault. Whether the last one *is* gone shows in the
storage: one in use has more owners, in C++ or in Python, than an idle one. Whatever points into the memory by means
that torch or Python know of (views, ``numpy()``, DLPack, graphs of autograd, a storage in a variable) is an owner.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, Final

import torch

from . import slices, storages
from .ref_table import UNTRACKED
from .storages import Geometry as Geometry

#: What a block is to this process. MADE: this process uses its memory again. MAPPED: a message has brought it, and the
#: block keeps the storage for the next message. ADOPTED: torch has shared the storage, which is the user's, so the
#: block does not keep it. PLAIN: only the properties of a storage that a message needs; not registered.
MADE, MAPPED, ADOPTED, PLAIN = range(4)

#: For how many geometries a block has prototypes.
_MAX_PROTOTYPES: Final = 4


class SlicePrototypes:
    """Tensors that are slices of a block, to make others of by ``detach()``.

    Args:
        storage: the block's.
        key: an object that stands for ``places``.
        places: where each slice begins, in bytes, and the geometry of the tensor on it.
    """

    __slots__ = ("_storages", "key", "prototypes")

    def __init__(self, storage: torch.UntypedStorage, key: Any, places: Iterable[tuple[int, Geometry]]) -> None:
        self.key = key
        whole = storages.place(storage, *storages.bytes_geometry(storage.nbytes()))
        memory = whole.numpy()  # owns the storage for as long as any of the slices lives
        self.prototypes = [slices.tensor(memory, shift, geometry) for shift, geometry in places]
        self._storages = [prototype.untyped_storage() for prototype in self.prototypes]

    def is_in_use(self, index: int) -> bool:
        """Whether anything but its prototype is on this slice."""
        owners, references = storages.owners(self._storages[index])
        idle = storages.IDLE_OWNERS + 1
        if owners > idle or references > storages.IDLE_REFERENCES_WITH_TENSOR:
            return True
        return storages.owners(self._storages[index])[0] > idle  # see ``Block.in_use``


class Block:
    """One block. Changed under ``state_lock.lock`` only, but for a made one that only one thread has yet."""

    __slots__ = (
        "__weakref__",
        "_kept",
        "_storage",
        "address",
        "capacity",
        "expires_at",
        "fd",
        "has_content",
        "is_listed_idle",
        "is_orphaned",
        "is_polled",
        "kind",
        "nbytes",
        "number",
        "prototypes",
        "slice_prototypes",
        "used_at",
        "users",
        "watches",
    )

    def __init__(self, kind: int, storage: torch.UntypedStorage, fd: int, capacity: int = 0) -> None:
        self.kind = kind
        #: Its row and generation in the reference table; UNTRACKED if it has none.
        self.number = UNTRACKED
        self.nbytes = storage.nbytes()
        #: Bytes of memory, of which the storage shows the first ``nbytes``.
        self.capacity = capacity or self.nbytes
        #: A descriptor of the memory. The storage owns it.
        self.fd = fd
        self.address = storage.data_ptr()
        self._storage: Any = storage if kind in (MADE, MAPPED) else weakref.ref(storage)
        #: Tensors to make others of by ``detach()``, which takes a fraction of the time of placing one on a storage.
        self.prototypes: dict[Geometry, torch.Tensor] = {}
        #: The same for the slices of the last message.
        self.slice_prototypes: SlicePrototypes | None = None
        self._kept: Any = None
        #: How many private mappings of it this process has, and messages with it that are being decoded.
        self.users = 0
        #: Weak references to its private mappings, or to the adopted storage.
        self.watches: set[Any] = set()
        #: Whether it has the data that ``content`` has written.
        self.has_content = False
        #: Whether ``use_poller`` has it.
        self.is_polled = False
        #: Of a mapped one: whether the list of idle blocks has it, and whether its maker is gone.
        self.is_listed_idle = self.is_orphaned = False
        #: When a tensor or a message last got it (time.monotonic).
        self.used_at = 0.0
        #: When its references in flight will count as lost; 0 if none are.
        self.expires_at = 0.0

    @property
    def storage(self) -> Any:
        """The storage; None if it is adopted or plain, and its last tensor in this process is gone."""
        return self._storage if self.kind in (MADE, MAPPED) else self._storage()

    def new_prototype(self, geometry: Geometry) -> torch.Tensor:
        """Add a tensor of this geometry to the ``prototypes``. Only of a MADE or MAPPED block."""
        if len(self.prototypes) >= _MAX_PROTOTYPES:
            del self.prototypes[next(iter(self.prototypes))]
        self.prototypes[geometry] = prototype = storages.place(self._storage, *geometry)
        return prototype

    def keep_alive(self, memory: Any) -> None:
        """Keep the memory that a tensor has left until the block is used again."""
        self._kept = memory

    def in_use(self) -> bool:
        """Whether anything in this process uses it. Only of a MADE or MAPPED block."""
        if self.users:
            return True
        sliced = self.slice_prototypes
        if sliced is not None and any(map(sliced.is_in_use, range(len(sliced.prototypes)))):
            return True
        with_tensor = bool(self.prototypes) or sliced is not None
        idle_owners = storages.IDLE_OWNERS + len(self.prototypes) + (sliced is not None)
        idle_references = storages.IDLE_REFERENCES_WITH_TENSOR if with_tensor else storages.IDLE_REFERENCES
        owners, references = storages.owners(self._storage)
        if owners > idle_owners or references > idle_references:
            return True
        # A thread may have turned its last reference into a tensor between the two counts.
        return storages.owners(self._storage)[0] > idle_owners

    def drop(self) -> None:
        """Do not keep the storage any more."""
        if self.kind in (MADE, MAPPED):
            self.prototypes.clear()
            self.slice_prototypes = None
            self._kept = None
            self._storage = weakref.ref(self._storage)
        self.kind = PLAIN

    def __repr__(self) -> str:
        kind = ("made here", "mapped", "adopted", "plain")[self.kind]
        number = "untracked" if self.number == UNTRACKED else f"{self.number:#x}"
        return f"<block of {self.nbytes} bytes, {kind}, {number}>"
