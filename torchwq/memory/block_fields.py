"""The fields of a block that the hot path needs, and whether anything in this process uses the block.

They are part of the native part, with a twin in Python. :class:`torchwq.memory.block.Block` derives from them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

import torch

from .. import _native
from . import slices, storages
from .storages import Geometry

#: What a block is to this process. MADE: this process uses its memory again. MAPPED: a message has brought it, and the
#: block keeps the storage for the next message. ADOPTED: torch has shared the storage, which is the user's, so the
#: block does not keep it. PLAIN: only the properties of a storage that a message needs; not registered.
MADE, MAPPED, ADOPTED, PLAIN = range(4)

#: For how many geometries a block has prototypes.
_MAX_PROTOTYPES: Final = 4


class SlicePrototypes:
    """Tensors that are slices of a block, to make others of by ``detach()``.

    A tensor that was made of one has its storage. torch moves that storage to other memory if the user shares the
    tensor; then the prototypes are of no use any more.

    Args:
        storage: the block's.
        key: an object that stands for ``places``.
        places: where each slice begins, in bytes, and the geometry of the tensor on it.
    """

    __slots__ = ("addresses", "key", "keys", "prototypes", "storages")

    def __init__(self, storage: torch.UntypedStorage, key: Any, places: Iterable[tuple[int, Geometry]]) -> None:
        self.key = key
        whole = storages.place(storage, *storages.bytes_geometry(storage.nbytes()))
        memory = whole.numpy()  # owns the storage for as long as any of the slices lives
        self.prototypes = [slices.tensor(memory, shift, geometry) for shift, geometry in places]
        #: Where they are.
        self.addresses = [prototype.data_ptr() for prototype in self.prototypes]
        #: The slices, and torch's keys of them.
        self.storages = [prototype.untyped_storage() for prototype in self.prototypes]
        self.keys = [storages.key(storage) for storage in self.storages]

    def are_in_place(self) -> bool:
        """Whether torch has moved none of them."""
        return [prototype.data_ptr() for prototype in self.prototypes] == self.addresses

    def any_in_use(self) -> bool:
        """Whether anything but its prototype is on one of the slices."""
        return any(map(self._is_in_use, range(len(self.prototypes))))

    def _is_in_use(self, index: int) -> bool:
        owners, references = storages.owners(self.storages[index])
        idle = storages.IDLE_OWNERS + 1
        if owners > idle or references > storages.IDLE_REFERENCES_WITH_TENSOR:
            return True
        return storages.owners(self.storages[index])[0] > idle  # see ``PythonBlockFields.in_use``


class PythonBlockFields:
    """See :class:`torchwq.memory.block.Block`."""

    __slots__ = (
        "_prototypes",
        "address",
        "cdata",
        "expires_at",
        "fd",
        "has_content",
        "is_listed_idle",
        "is_orphaned",
        "is_polled",
        "kept_storage",
        "kind",
        "left_memory",
        "nbytes",
        "number",
        "slice_prototypes",
        "used_at",
        "users",
    )

    kind: int
    number: int
    #: Bytes of the storage, and the address of its memory.
    nbytes: int
    address: int
    #: A descriptor of the memory. The storage owns it.
    fd: int

    def __init__(self) -> None:
        #: The storage, if the block keeps it, and torch's key of it.
        self.kept_storage: Any = None
        self.cdata: int | None = None
        #: Tensors to make others of by ``detach()``, which takes a fraction of the time of placing one on a storage.
        self._prototypes: dict[Geometry, torch.Tensor] = {}
        #: The same for the slices of the last message.
        self.slice_prototypes: SlicePrototypes | None = None
        #: The memory that a tensor which moved here has left, until the block is used again.
        self.left_memory: Any = None
        #: How many private mappings of it this process has, and messages with it that are being decoded.
        self.users = 0
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
    def num_prototypes(self) -> int:
        """How many prototypes it has."""
        return len(self._prototypes)

    def find_prototype(self, geometry: Geometry) -> torch.Tensor | None:
        """The prototype of this geometry, if there is one."""
        return self._prototypes.get(geometry)

    def add_prototype(self, geometry: Geometry, prototype: torch.Tensor) -> None:
        """Keep a prototype; in the place of the oldest, if there are many."""
        if len(self._prototypes) >= _MAX_PROTOTYPES:
            del self._prototypes[next(iter(self._prototypes))]
        self._prototypes[geometry] = prototype

    def clear_prototypes(self) -> None:
        """Drop all prototypes."""
        self._prototypes.clear()

    def in_use(self) -> bool:
        """Whether anything in this process uses it. Only of a MADE or MAPPED block."""
        if self.users:
            return True
        sliced = self.slice_prototypes
        if sliced is not None and sliced.any_in_use():
            return True
        prototypes = len(self._prototypes)
        with_tensor = prototypes or sliced is not None
        idle_owners = storages.IDLE_OWNERS + prototypes + (sliced is not None)
        idle_references = storages.IDLE_REFERENCES_WITH_TENSOR if with_tensor else storages.IDLE_REFERENCES
        owners, references = storages.owners(self.kept_storage)
        if owners > idle_owners or references > idle_references:
            return True
        # A thread may have turned its last reference into a tensor between the two counts.
        return storages.owners(self.kept_storage)[0] > idle_owners


BlockFields = PythonBlockFields
if not TYPE_CHECKING and _native.core is not None:
    BlockFields = _native.core.BlockFields


def calibrate_native(block: Any) -> None:
    """Let the native part count the owners of this block, which nothing uses and which has no prototype yet."""
    _native.core.calibrate(block, False)
    block.new_prototype(storages.bytes_geometry(block.nbytes))
    _native.core.calibrate(block, True)
