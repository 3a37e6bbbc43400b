"""One block of shared memory as one process sees it, and whether that process uses it.

A block is a ``memfd`` with a torch storage on it, which is kept when the last tensor on it is gone, so that the next
one costs no descriptor, no mapping and no page fault. Whether it *is* gone shows in the storage: it has more owners,
in C++ or in Python, than an idle one. Whatever points into the memory by means that torch or Python know of (views,
``numpy()``, DLPack, graphs of autograd, a storage in a variable) is such an owner.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, Final

import torch

from . import slices, storages
from .ref_table import UNTRACKED
from .storages import Geometry as Geometry

#: What a block is to this process. MADE: its memory is used again here. MAPPED: a message brought it; its storage is
#: kept for the next message. ADOPTED: shared by torch; the storage is the user's and is not kept. PLAIN: in no
#: table, only what a message needs to know of a storage.
MADE, MAPPED, ADOPTED, PLAIN = range(4)

#: How many ways to lie on a block are remembered.
_MAX_PROTOTYPES: Final = 4


class SlicePrototypes:
    """Tensors that are slices of a block, to make others of by ``detach()``, and what keeps the block for them.

    Args:
        storage: the block's.
        key: what tells how they lie there.
        places: where each begins, in bytes, and how it lies on its slice.
    """

    __slots__ = ("_storages", "key", "prototypes")

    def __init__(self, storage: torch.UntypedStorage, key: Any, places: Iterable[tuple[int, Geometry]]) -> None:
        self.key = key
        whole = storages.place(storage, *storages.bytes_geometry(storage.nbytes()))
        memory = whole.numpy()  # one owner of the storage, for as long as any of the slices lives
        self.prototypes = [slices.tensor(memory, shift, geometry) for shift, geometry in places]
        self._storages = [prototype.untyped_storage() for prototype in self.prototypes]

    def is_in_use(self, index: int) -> bool:
        """Whether there is any other tensor, or anything else, on this slice."""
        owners, references = storages.owners(self._storages[index])
        idle = storages.IDLE_OWNERS + 1
        if owners > idle or references > storages.IDLE_REFERENCES_WITH_TENSOR:
            return True
        return storages.owners(self._storages[index])[0] > idle  # see ``Block.in_use``


class Block:
    """One block. Changed under ``state_lock.lock`` only, but for a made one that is not lent yet."""

    __slots__ = (
        "__weakref__",
        "_kept",
        "_storage",
        "_view",
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
        #: Its name in the reference table; UNTRACKED if it has none.
        self.number = UNTRACKED
        self.nbytes = storage.nbytes()
        #: Bytes of memory, of which the storage shows the first ``nbytes``.
        self.capacity = capacity or self.nbytes
        #: A descriptor of the memory; the storage's.
        self.fd = fd
        self.address = storage.data_ptr()
        self._storage: Any = storage if kind in (MADE, MAPPED) else weakref.ref(storage)
        #: Making a tensor that lies as another one does takes a fraction of what placing one on a storage takes.
        self.prototypes: dict[Geometry, torch.Tensor] = {}
        #: The same for tensors that are slices of it, as they lay there in the last message.
        self.slice_prototypes: SlicePrototypes | None = None
        self._view: memoryview | None = None
        self._kept: Any = None
        #: How many private mappings of it there are here, and messages with it that are being decoded.
        self.users = 0
        #: Weak references to what tells of its own death that it is gone: private mappings, an adopted storage.
        self.watches: set[Any] = set()
        #: Whether it has the data of a message, as ``content`` has written them.
        self.has_content = False
        #: Whether it is looked at now and then because something may use it (``use_poller``).
        self.is_polled = False
        #: Of a mapped one: whether it is among those that were found idle, and whether its maker is gone.
        self.is_listed_idle = self.is_orphaned = False
        #: When it was last given to someone (time.monotonic).
        self.used_at = 0.0
        #: When references to it that are under way will be believed to be lost; 0 if none are.
        self.expires_at = 0.0

    @property
    def storage(self) -> Any:
        """The storage; None if it is adopted or plain, and its last tensor in this process is gone."""
        return self._storage if self.kind in (MADE, MAPPED) else self._storage()

    def new_prototype(self, geometry: Geometry) -> torch.Tensor:
        """A tensor that lies so on the block, from now on among the ``prototypes``. Only of a MADE or MAPPED one."""
        if len(self.prototypes) >= _MAX_PROTOTYPES:
            del self.prototypes[next(iter(self.prototypes))]
        self.prototypes[geometry] = prototype = storages.place(self._storage, *geometry)
        return prototype

    def keep_alive(self, what: Any) -> None:
        """Let ``what`` live until the block is used again."""
        self._kept = what

    def bytes(self) -> memoryview:
        """The memory. Must not outlive the block's storage."""
        if self._view is None:
            self._view = storages.memory(self._storage)
        return self._view

    def in_use(self) -> bool:
        """Whether anything in this process uses it. Only for a MADE or MAPPED one."""
        if self.users:
            return True
        slice_prototypes = self.slice_prototypes
        if slice_prototypes is not None and any(
            map(slice_prototypes.is_in_use, range(len(slice_prototypes.prototypes)))
        ):
            return True
        with_tensor = bool(self.prototypes) or slice_prototypes is not None
        idle_owners = storages.IDLE_OWNERS + len(self.prototypes) + (slice_prototypes is not None)
        idle_references = storages.IDLE_REFERENCES_WITH_TENSOR if with_tensor else storages.IDLE_REFERENCES
        owners, references = storages.owners(self._storage)
        if owners > idle_owners or references > idle_references:
            return True
        # A thread may have turned its last reference into a tensor between the two counts.
        return storages.owners(self._storage)[0] > idle_owners

    def drop(self) -> None:
        """Keep the storage no more."""
        if self.kind in (MADE, MAPPED):
            self.prototypes.clear()
            self.slice_prototypes = None
            self._view = self._kept = None
            self._storage = weakref.ref(self._storage)
        self.kind = PLAIN

    def __repr__(self) -> str:
        kind = ("made here", "mapped", "adopted", "plain")[self.kind]
        number = "untracked" if self.number == UNTRACKED else f"{self.number:#x}"
        return f"<block of {self.nbytes} bytes, {kind}, {number}>"
