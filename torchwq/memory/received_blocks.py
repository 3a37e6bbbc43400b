"""The blocks that messages bring: those of other processes, mapped once and kept, and this process's own.

A block that this process knows costs nothing but a look-up: its storage is still mapped, its pages are in the page
table. Where a connection has one reader (answers), a block that was sent over it before comes without a descriptor
(``promises``). Where any of several may read (questions), it comes with one, which is closed unused.

If this process may not open one more descriptor, it copies the data out of the block instead, with one warning.
"""

from __future__ import annotations

import bisect
import errno
import operator
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import numpy as np
import torch

from ..errors import ResourceError
from . import limits, maintenance, recycling, sharing, slices, state_lock, storages, tree_table
from .block import Block, Geometry
from .block_fields import ADOPTED, MADE, MAPPED, PLAIN
from .counts import IN_USE, UNTRACKED
from .packing import BUFFER, INLINE, SHARED, SMALL, WHOLE, Row
from .promises import Epoch

# By kind: MADE, MAPPED, ADOPTED, PLAIN.
_FLAGS: Final = (0, IN_USE, 0, 0)

_low: Final = operator.attrgetter("low")

#: How often this process knew a message's block, and how often it had to map one.
hits = misses = 0


class ReceivedBlocks:
    """The blocks of one message, which uses them until ``done``."""

    __slots__ = ("_blocks", "_buffers", "_data", "_fds", "_first", "_rows", "_slices", "_storages", "_views")

    def __init__(
        self,
        references: Sequence[tuple[int, int]],
        fds: list[int],
        first: int = 0,
        buffers: Sequence[int] = (),
        rows: Sequence[Row] = (),
        data: Sequence[Any] = (),
    ) -> None:
        """Take the blocks out of the message.

        Args:
            references: (number, bytes) of each block.
            fds: has the descriptors of the blocks from ``first`` on. Each is closed, and replaced by -1, as soon as it
                is not needed: a process may have room for all of a message's descriptors, but not twice. If empty, this
                process keeps the descriptors, see Note [in-band promises].
            buffers: which blocks are buffers of the pickle.
            rows: the slices in the blocks, and in ``data``, the parts of the message.

        Raises ResourceError if there is no memory for a block; none is taken then.
        """
        self._blocks: list[Block] = []
        self._storages: list[torch.UntypedStorage] = []
        if fds and len(fds) < first + len(references):
            raise ResourceError(0, f"a message of {len(references)} shared tensors has lost some of them on its way")
        self._fds, self._first = fds, first
        self._rows: dict[int, list[Row]] = {}
        for row in rows:
            self._rows.setdefault(row.group, []).append(row)
        self._data = data
        self._views: dict[int, Any] = {}
        self._slices: dict[Row, torch.UntypedStorage] = {}
        self._buffers = buffers
        with state_lock.lock:
            recycling.drain_finalizers()
            recycling.poll(len(references))
            try:
                self._take_all(references)
            except BaseException as error:
                # The table must never count one reference too many as received. After an interruption it is not known
                # which were counted, so no more are.
                if isinstance(error, ResourceError):
                    recycling.note_discarded(number for number, _ in references[len(self._blocks) :])
                self._release()
                raise

    def _take_all(self, references: Sequence[tuple[int, int]]) -> None:
        global hits
        by_number, table = recycling.by_number, tree_table.current()
        fds, at = self._fds, self._first
        for number, nbytes in references:
            fd = fds[at] if fds else -1
            block = by_number.get(number)
            storage = None if block is None else block.storage
            if block is not None and storage is not None and block.nbytes == nbytes:
                hits += 1
            else:
                block, storage = _new(number, nbytes, fd if fds else self._kept(number))
            if fd >= 0:
                fds[at] = -1
                os.close(fd)
            at += 1
            block.users += 1
            if table is not None and number != UNTRACKED:
                table.count_received(number, _FLAGS[block.kind])
            self._blocks.append(block)
            self._storages.append(storage)

    def _kept(self, number: int) -> int:
        """The descriptor that an earlier message has brought."""
        fd = self._fds.descriptor(number) if isinstance(self._fds, Epoch) else -1
        if fd < 0:
            raise ResourceError(0, "a message refers to shared memory that has not come with it: the message is lost")
        return fd

    def tensor(self, index: int, geometry: Geometry) -> torch.Tensor:
        """A new tensor on the message's block ``index``."""
        block = self._blocks[index]
        with state_lock.lock:  # a fork may retire the block at any time
            if block.kind == MAPPED or block.kind == MADE:
                tensor = recycling.prototype(block, geometry).detach()
                if block.kind == MAPPED:
                    recycling.start_polling(block)
                return tensor
        return storages.place(self._storages[index], *geometry)

    def packed_tensor(self, group: int, geometry: Geometry) -> torch.Tensor:
        """A new tensor of this geometry on the message's packed storage ``group``."""
        code, offset, size, stride = geometry
        itemsize = storages.DTYPES[code].itemsize
        row = self._row(group, offset * itemsize)
        geometry = code, offset - row.low // itemsize, size, stride
        return self.tensor(row.block, geometry) if row.kind == WHOLE else storages.place(self._packed(row), *geometry)

    def packed_storage(self, group: int) -> torch.UntypedStorage:
        """The message's packed storage ``group``, which must be in one piece."""
        row = self._row(group, 0)
        return self._storages[row.block] if row.kind == WHOLE else self._packed(row)

    def _row(self, group: int, at: int) -> Row:
        rows = self._rows[group]
        return rows[0] if len(rows) == 1 else rows[bisect.bisect_right(rows, at, key=_low) - 1]

    def _packed(self, row: Row) -> torch.UntypedStorage:
        storage = self._slices.get(row)
        if storage is None:
            if row.kind == INLINE:
                storage = self._copied(row)
            elif row.kind == SHARED and self._storages[row.block].is_shared():
                base = self._storages[row.block]
                storage = slices.cut_shared(self._view(row.block), base, row.shift, row.nbytes)
            else:
                storage = slices.cut(self._view(row.block), row.shift, row.nbytes)
            self._slices[row] = storage
        return storage

    def _inline(self, row: Row) -> memoryview:
        return memoryview(self._data[row.block])[row.shift : row.shift + row.nbytes]

    def _copied(self, row: Row) -> torch.UntypedStorage:
        """A storage with a copy of what a message has in itself: on memory that is used again, if it is large."""
        inline = self._inline(row)
        if row.nbytes > SMALL:
            whole = sharing.new(storages.bytes_geometry(row.nbytes), row.nbytes)
            if whole is not None:
                np.copyto(whole.numpy(), np.frombuffer(inline, np.uint8))
                return whole.untyped_storage()
        return slices.cut(bytearray(inline), 0, row.nbytes)

    def _view(self, index: int) -> Any:
        """The memory of a block, for slices, which keep the block in use."""
        view = self._views.get(index)
        if view is None:
            block = self._blocks[index]
            whole = storages.place(self._storages[index], *storages.bytes_geometry(block.nbytes))
            self._views[index] = view = whole.numpy()  # keeps the tensor alive
            with state_lock.lock:
                if block.kind == MAPPED:
                    recycling.watch(whole, block)
        return view

    def storage(self, index: int) -> torch.UntypedStorage:
        """The storage of the message's block ``index``."""
        return self._storages[index]

    def buffers(self) -> Iterator[memoryview]:
        """The pickle's buffers, in its order, for the reader to keep and to change."""
        yield from map(self.private_memory, self._buffers)
        packs: dict[int, memoryview] = {}
        for (row,) in self._rows.values():
            if row.kind == INLINE and row.group & BUFFER:
                yield memoryview(bytearray(self._inline(row)))
            elif row.group & BUFFER:
                if row.block not in packs:
                    packs[row.block] = self.private_memory(row.block)
                yield packs[row.block][row.shift : row.shift + row.nbytes]

    def memory(self, index: int) -> memoryview:
        """The bytes of a block, to read. Valid until ``done``."""
        return storages.memory(self._storages[index])

    def private_memory(self, index: int) -> memoryview:
        """The bytes of a block, to keep and to change: a page is copied when it is changed."""
        block, storage = self._blocks[index], self._storages[index]
        if block.kind == PLAIN and not storage.is_shared():
            return storages.lasting_memory(storage)  # is a copy already
        try:
            mapping, view = storages.map_private(storages.descriptor(storage), block.nbytes)
        except ResourceError as error:
            if error.errno != errno.EMFILE:
                raise
            return storages.lasting_memory(torch.UntypedStorage(block.nbytes).copy_(storage))
        with state_lock.lock:
            if block.kind in (MADE, MAPPED):
                block.users += 1
                recycling.watch(mapping, block, mapping=True)
        return view

    def done(self) -> None:
        """The message's objects exist: from now on only they keep the blocks in use."""
        with state_lock.lock:
            self._release()

    def _release(self) -> None:
        self._views.clear()
        self._slices.clear()
        self._storages.clear()
        now = time.monotonic()
        for block in self._blocks:
            block.users -= 1
            block.used_at = now
            if block.kind == MAPPED and not block.is_polled:
                recycling.release(block)
        self._blocks.clear()


def take_tensor(number: int, nbytes: int, geometry: Geometry) -> torch.Tensor | None:
    """The tensor of a message with nothing else, if this process knows its block. Else None, and takes nothing."""
    global hits
    with state_lock.lock:
        recycling.drain_finalizers()
        recycling.poll(1)
        block = recycling.by_number.get(number)
        if block is None or block.nbytes != nbytes:
            return None
        storage, table = block.storage, tree_table.current()
        if storage is None or table is None:
            return None
        hits += 1
        if block.kind == ADOPTED:
            tensor = storages.place(storage, *geometry)
        else:
            tensor = recycling.prototype(block, geometry).detach()
        table.count_received(number, _FLAGS[block.kind])
        if block.kind == MAPPED:
            block.used_at = time.monotonic()
            recycling.start_polling(block)
        return tensor


def take_tensors(
    references: Iterable[tuple[int, int]],
    geometries: Sequence[Geometry],
    shifts: Sequence[int] = (),
    key: Any = None,
) -> list[torch.Tensor] | None:
    """The same for a message of several tensors.

    Each has a block of its own, but that those whose ``shifts`` is not -1 are slices of the last block.

    Args:
        shifts: where each slice begins in its block, in bytes.
        key: the same object for all messages of the same ``geometries`` and ``shifts``.
    """
    global hits
    with state_lock.lock:
        recycling.drain_finalizers()
        recycling.poll(len(geometries))
        table, found = tree_table.current(), _known_blocks(references)
        if table is None or found is None:
            return None
        if not shifts:
            pairs = zip(found, geometries, strict=True)
            tensors = [recycling.prototype(block, geometry).detach() for block, geometry in pairs]
        else:
            tensors = _tensors_and_slices(found, geometries, shifts, key)
        now = time.monotonic()
        for block in found:
            table.count_received(block.number, _FLAGS[block.kind])
            if block.kind == MAPPED:
                block.used_at = now
                recycling.start_polling(block)
        hits += len(found)
        return tensors


def _known_blocks(references: Iterable[tuple[int, int]]) -> list[Block] | None:
    """The blocks of a message, if this process has made or mapped all of them. Under the lock."""
    found = []
    for number, nbytes in references:
        block = recycling.by_number.get(number)
        if block is None or block.nbytes != nbytes or block.kind == ADOPTED:
            return None
        found.append(block)
    return found


def _tensors_and_slices(
    blocks: Sequence[Block], geometries: Sequence[Geometry], shifts: Sequence[int], key: Any
) -> list[torch.Tensor]:
    pack = blocks[-1]
    cached = pack.slice_prototypes
    if cached is None or cached.key is not key or not cached.are_in_place():
        sliced = iter(pack.new_slice_prototypes(key, geometries, shifts))
    else:
        sliced = iter(cached.prototypes)
    own = iter(blocks)
    return [
        (recycling.prototype(next(own), geometry) if shift < 0 else next(sliced)).detach()
        for geometry, shift in zip(geometries, shifts, strict=True)
    ]


def _new(number: int, nbytes: int, fd: int) -> tuple[Block, torch.UntypedStorage]:
    """A block for a reference to an unknown one, or to one of another size. Under the lock."""
    table = tree_table.current()
    tracked = table is not None and table.is_current(number) and number not in recycling.by_number
    storage = _map(fd, nbytes)
    if storage is None:
        storage = _copy_out(fd, nbytes)
    elif tracked:
        block = Block(MAPPED, storage, storages.descriptor(storage))
        block.number = number
        recycling.add(block)
        return block, storage
    return Block(PLAIN, storage, -1), storage


def _map(fd: int, nbytes: int) -> torch.UntypedStorage | None:
    """Map a block; None if this process may not open one more descriptor. Under the lock."""
    global misses
    while recycling.open_blocks >= limits.max_open_blocks():
        idle = recycling.next_idle()
        if idle is None:
            return None
        recycling.retire(idle)
    misses += 1
    try:
        return storages.open_shared(fd, nbytes)
    except ResourceError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            return None
        raise


def _copy_out(fd: int, nbytes: int) -> torch.UntypedStorage:
    storage = torch.UntypedStorage(nbytes)
    view = storages.memory(storage)
    done = 0
    while done < nbytes:
        done += os.preadv(fd, [view[done:]], done)
    limits.warn_of_copies()
    return storage


@maintenance.on_period
def _maintain(now: float) -> None:
    recycling.retire_idle(now - recycling.IDLE_TIMEOUT)


@state_lock.before_fork
def _before_fork() -> None:
    for block in list(recycling.by_number.values()):
        if block.kind == MAPPED and block.in_use():
            recycling.mark_escaped(block)


def trim() -> None:
    """Retire the mapped blocks that are not in use."""
    with state_lock.lock:
        recycling.drain_finalizers()
        recycling.poll_all()
        for block in list(recycling.by_number.values()):
            if block.kind == MAPPED and not block.in_use():
                recycling.release(block)
                recycling.retire(block)
