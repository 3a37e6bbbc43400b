"""What messages bring: blocks of other processes, mapped once and kept, and this process's own ones coming home.

A block that was here before costs nothing but a look into the table: its storage is still mapped, its pages are in the
page table, and the descriptor that came with the message is closed unused. (It comes all the same, because nobody who
sends can know who will read; and so that the memory outlives its maker. It costs 3 µs.)

If this process may not have one more descriptor, the data are copied out of the block instead, with one warning.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence

import torch

from ..errors import ResourceError
from . import ledger, limits, recycling, storages
from .block import ADOPTED, MADE, MAPPED, PLAIN, Block, Geometry
from .ledger import HELD

#: How often a message's block was here already, and how often it had to be mapped.
hits = misses = 0


class Arrivals:
    """The blocks of one message, which uses them until ``done``."""

    __slots__ = ("_blocks", "_fds", "_storages", "buffers")

    def __init__(self, references: Sequence[tuple[int, int]], fds: Sequence[int], buffers: Sequence[int] = ()) -> None:
        """Take the blocks out of the message: (number, bytes) of each, and its descriptor, which stays the caller's.

        Raises ResourceError if there is no memory for one; none is taken then.
        """
        self._blocks: list[Block] = []
        self._storages: list[torch.UntypedStorage] = []
        self._fds = fds
        #: Which of the blocks are the pickle's buffers, in its order.
        self.buffers = buffers
        with recycling.lock:
            recycling.settle()
            recycling.look_at_unwatched(2)
            try:
                for (number, nbytes), fd in zip(references, fds, strict=True):
                    self._take(number, nbytes, fd)
            except BaseException as error:
                # Never one reference too many may count as got. An interruption leaves that open, so it counts none.
                if isinstance(error, ResourceError):
                    recycling.note_lost(number for number, _ in references[len(self._blocks) :])
                self._release()
                raise

    def _take(self, number: int, nbytes: int, fd: int) -> None:
        global hits
        block = recycling.table.get(number)
        storage = None if block is None else block.storage
        book = ledger.current()
        tracked = book is not None and book.is_current(number)
        if block is not None and storage is not None and block.nbytes == nbytes:
            hits += 1
        else:
            block, storage = None, _map(fd, nbytes)
            if storage is None:
                storage = _copy_out(fd, nbytes)
            elif tracked and number not in recycling.table:
                block = Block(MAPPED, storage, storages.descriptor(storage))
                block.number = number
                recycling.add(block)
        if block is None:
            block = Block(PLAIN, storage, -1)
        block.users += 1
        if tracked:
            assert book is not None
            book.count_got(number, HELD if block.kind == MAPPED else 0)
        self._blocks.append(block)
        self._storages.append(storage)

    def tensor(self, index: int, geometry: Geometry) -> torch.Tensor:
        """A new tensor on the message's block ``index``."""
        block = self._blocks[index]
        if block.kind == MAPPED:
            tensor = recycling.template(block, geometry).detach()
            recycling.watch(tensor, block)
            return tensor
        if block.kind == MADE:
            return recycling.template(block, geometry).detach()
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
        try:
            mapping, view = storages.map_private(self._fds[index], block.nbytes)
        except ResourceError as error:
            if error.errno != errno.EMFILE:
                raise
            return storages.lasting_memory(torch.UntypedStorage(block.nbytes).copy_(storage))
        if block.kind in (MADE, MAPPED):
            with recycling.lock:
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
            tensor = recycling.template_under_lock(block, geometry).detach()
        if block.kind == MAPPED:
            book.count_got(number, HELD)
            block.used_at = time.monotonic()
            recycling.watch(tensor, block)
        else:
            book.count_got(number, 0)
        return tensor


def _map(fd: int, nbytes: int) -> torch.UntypedStorage | None:
    """Map a block; None if this process may not have one more descriptor. Under the lock."""
    global misses
    if recycling.open_blocks >= limits.descriptors():
        _give_up_idle()
        if recycling.open_blocks >= limits.descriptors():
            return None
    misses += 1
    try:
        return storages.open_shared(fd, nbytes)
    except ResourceError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            return None
        raise


def _give_up_idle() -> None:
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
    book = ledger.current()
    mapped = [block for block in recycling.table.values() if block.kind == MAPPED]
    for block in mapped:
        stale = book is None or not book.is_current(block.number)
        if (stale or now - block.used_at > recycling.IDLE) and not block.in_use():
            recycling.release(block)
            recycling.give_up(block)


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
