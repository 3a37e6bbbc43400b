"""What messages bring: blocks of other processes, mapped once and kept, and this process's own ones coming home.

A block that was here before costs nothing but a look into the table: its storage is still mapped, its pages are in the
page table. Where a queue has one reader and its writers know it (answers), no descriptor comes with such a block. Where
any of many may read (questions), one comes all the same, and is closed unused.

If this process may not have one more descriptor, the data are copied out of the block instead, with one warning.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterable, Sequence
from typing import Final

import torch

from ..errors import ResourceError
from . import ledger, limits, recycling, storages
from .block import ADOPTED, MADE, MAPPED, PLAIN, Block, Geometry
from .ledger import HELD, KEPT, UNTRACKED
from .recycling import promise

# By kind: MADE, MAPPED, ADOPTED, PLAIN.
_FLAGS: Final = (0, HELD, 0, 0)
_FLAGS_KEPT: Final = (KEPT, HELD | KEPT, 0, 0)

#: How often a message's block was here already, and how often it had to be mapped.
hits = misses = 0


class Arrivals:
    """The blocks of one message, which uses them until ``done``."""

    __slots__ = ("_blocks", "_fds", "_storages", "buffers")

    def __init__(self, references: Sequence[tuple[int, int]], fds: Sequence[int], buffers: Sequence[int] = ()) -> None:
        """Take the blocks out of the message: (number, bytes) of each, and its descriptor, which stays the caller's.

        Without descriptors, this process has promised to have the blocks. Raises ResourceError if there is no memory
        for one; none is taken then.
        """
        self._blocks: list[Block] = []
        self._storages: list[torch.UntypedStorage] = []
        self._fds = fds or [-1] * len(references)
        #: Which of the blocks are the pickle's buffers, in its order.
        self.buffers = buffers
        with recycling.lock:
            recycling.settle()
            recycling.look_at_unwatched(2)
            try:
                self._take_all(references)
            except BaseException as error:
                # Never one reference too many may count as got. An interruption leaves that open, so it counts none.
                if isinstance(error, ResourceError):
                    recycling.note_lost(number for number, _ in references[len(self._blocks) :])
                self._release()
                raise

    def _take_all(self, references: Sequence[tuple[int, int]]) -> None:
        global hits
        table, book = recycling.table, ledger.current()
        flags = _flags()
        for (number, nbytes), fd in zip(references, self._fds, strict=True):
            block = table.get(number)
            storage = None if block is None else block.storage
            if block is not None and storage is not None and block.nbytes == nbytes:
                hits += 1
            else:
                block, storage = _new(number, nbytes, fd)
            block.users += 1
            if book is not None and number != UNTRACKED:
                book.count_got(number, flags[block.kind])
            self._blocks.append(block)
            self._storages.append(storage)

    def tensor(self, index: int, geometry: Geometry) -> torch.Tensor:
        """A new tensor on the message's block ``index``."""
        block = self._blocks[index]
        with recycling.lock:  # a fork may give the block up at any time
            if block.kind == MAPPED or block.kind == MADE:
                tensor = recycling.template(block, geometry).detach()
                if block.kind == MAPPED:
                    recycling.watch(tensor, block)
                return tensor
        return storages.place(self._storages[index], *geometry)

    def storage(self, index: int) -> torch.UntypedStorage:
        """The storage of the message's block ``index``."""
        return self._storages[index]

    def memory(self, index: int) -> memoryview:
        """The bytes of a block that is read and not changed. Valid until ``done``."""
        return storages.memory(self._storages[index])

    def private_memory(self, index: int) -> memoryview:
        """The bytes of a block, to keep and to change: a page is copied when it is changed."""
        block, storage = self._blocks[index], self._storages[index]
        if block.kind == PLAIN and not storage.is_shared():
            return storages.lasting_memory(storage)  # was copied out already
        fd = self._fds[index]
        try:
            mapping, view = storages.map_private(fd if fd >= 0 else storages.descriptor(storage), block.nbytes)
        except ResourceError as error:
            if error.errno != errno.EMFILE:
                raise
            return storages.lasting_memory(torch.UntypedStorage(block.nbytes).copy_(storage))
        with recycling.lock:
            if block.kind in (MADE, MAPPED):
                block.users += 1
                recycling.watch(mapping, block, mapping=True)
        return view

    def done(self) -> None:
        """What the message's objects use of the blocks, they use by themselves from now on."""
        with recycling.lock:
            self._release()

    def _release(self) -> None:
        self._storages.clear()
        now = time.monotonic()
        for block in self._blocks:
            block.users -= 1
            block.used_at = now
            if block.kind == MAPPED and not block.watches:
                recycling.release(block)
        self._blocks.clear()


def take_tensor(number: int, nbytes: int, geometry: Geometry) -> torch.Tensor | None:
    """The tensor of a message that is nothing but one, if its block is here. Else None, and nothing is taken."""
    global hits
    with recycling.lock:
        recycling.settle()
        block = recycling.table.get(number)
        if block is None or block.nbytes != nbytes:
            return None
        storage, book = block.storage, ledger.current()
        if storage is None or book is None:
            return None
        hits += 1
        if block.kind == ADOPTED:
            tensor = storages.place(storage, *geometry)
        else:
            tensor = recycling.template(block, geometry).detach()
        book.count_got(number, _flags()[block.kind])
        if block.kind == MAPPED:
            block.used_at = time.monotonic()
            recycling.watch(tensor, block)
        return tensor


def take_tensors(references: Iterable[tuple[int, int]], geometries: Sequence[Geometry]) -> list[torch.Tensor] | None:
    """The same for a message of several tensors, each on a block of its own."""
    global hits
    with recycling.lock:
        recycling.settle()
        table, book = recycling.table, ledger.current()
        if book is None:
            return None
        found = []
        for number, nbytes in references:
            block = table.get(number)
            if block is None or block.nbytes != nbytes or block.kind == ADOPTED:
                return None
            found.append(block)
        flags, now = _flags(), time.monotonic()
        tensors = []
        for block, geometry in zip(found, geometries, strict=True):
            kind = block.kind
            tensor = recycling.template(block, geometry).detach()
            book.count_got(block.number, flags[kind])
            if kind == MAPPED:
                block.used_at = now
                recycling.watch(tensor, block)
            tensors.append(tensor)
        hits += len(tensors)
        return tensors


def _flags() -> tuple[int, int, int, int]:
    """What the ledger has to know of a block that a message has brought, by its kind. Under the lock."""
    return _FLAGS_KEPT if promise() else _FLAGS


def _new(number: int, nbytes: int, fd: int) -> tuple[Block, torch.UntypedStorage]:
    """A block for a reference to one that is not in the table, or not as it is there. Under the lock."""
    book = ledger.current()
    tracked = book is not None and book.is_current(number) and number not in recycling.table
    storage = recycling.storage_of_parting(number, revive=tracked)
    if storage is None:
        storage = _map(fd, nbytes) if fd >= 0 else _lost()
    if storage is None:
        storage = _copy_out(fd, nbytes)
    elif tracked:
        block = Block(MAPPED, storage, storages.descriptor(storage))
        block.number = number
        recycling.add(block)
        return block, storage
    return Block(PLAIN, storage, -1), storage


def _lost() -> torch.UntypedStorage:
    raise ResourceError(
        0,
        "a message refers to shared memory that this process does not have any more, because its sender was stopped "
        "for seconds in the middle of sending it: the message is lost",
    )


def _map(fd: int, nbytes: int) -> torch.UntypedStorage | None:
    """Map a block; None if this process may not have one more descriptor. Under the lock."""
    global misses
    while recycling.open_blocks >= limits.descriptors():
        idle = recycling.next_idle()
        if idle is None:
            return None
        recycling.give_up(idle)
    misses += 1
    try:
        return storages.open_shared(fd, nbytes)
    except ResourceError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            return None
        raise


def _give_up_idle() -> None:
    """Give up the mapped blocks that nobody uses here. Under the lock."""
    for block in list(recycling.table.values()):
        if block.kind == MAPPED and not block.in_use():
            recycling.release(block)
            recycling.give_up(block)


def _copy_out(fd: int, nbytes: int) -> torch.UntypedStorage:
    storage = torch.UntypedStorage(nbytes)
    view = storages.memory(storage)
    done = 0
    while done < nbytes:
        done += os.preadv(fd, [view[done:]], done)
    limits.warn_of_copies()
    return storage


def _tick(now: float) -> None:
    recycling.give_up_idle(now - recycling.IDLE)


recycling.at_tick(_tick)


@recycling.before_fork
def _before_fork() -> None:
    for block in list(recycling.table.values()):
        if block.kind == MAPPED and block.in_use():
            recycling.give_away(block)


def trim() -> None:
    """Give up the mapped blocks that are not in use."""
    with recycling.lock:
        recycling.settle()
        recycling.look_at_unwatched(len(recycling.table))
        _give_up_idle()
