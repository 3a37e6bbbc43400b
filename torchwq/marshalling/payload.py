"""What a message consists of beside its pickle, put together and taken apart.

A message that refers to blocks ends with a list of them, before its trailer: number and size of each, and how many
there are. Their descriptors are the message's last ones, in the same order. A large pickle's message refers to the
block that the pickle is in, and all that has just been said of the message is said in there.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Container, Iterable, Sequence
from typing import Any, Final

from ..memory import anonymous, content, pool, recycling
from ..memory.arrivals import Arrivals
from ..memory.block import Block
from ..memory.content import Buffer
from ..memory.ledger import UNTRACKED
from ..memory.packing import ROW, Packing, Row, most_own
from ..memory.parcel import BLOCK, REFERENCES, Parcel
from ..transport import bag
from ..transport.endpoint import MAX_FDS
from .letter import Letter

#: Buffers from this size on leave the pickle and are mapped by the reader instead of copied.
OUT_OF_BAND: Final = 32 * 1024
#: How long in its block the pickle is with the list of references behind it, and whether the descriptors are in a bag.
HEAD: Final = struct.Struct("=Q?")
#: Number and bytes of a block that a message refers to, and how many of these there are.
REFERENCE: Final = struct.Struct("=QQ")
#: Set in the bytes of a block that is one of the pickle's buffers.
BUFFER: Final = 1 << 63
COUNT: Final = struct.Struct("=I")
#: Set in that count if there are rows of packed storages before the list, with a count of their own behind them.
PACKED: Final = 1 << 31


class Attachments:
    """What both encoders collect beside the pickle itself."""

    def __init__(self) -> None:
        self.chunks: list[Any] = []
        self.fds: list[int] = []
        self.keep: list[Any] = []
        #: With their places in the message's list.
        self.blocks: dict[Block | Buffer, int] = {}
        #: Whether there is anything beside the pickle.
        self.more = False
        self.fresh: Container[Block] | None = None
        self.here = False
        self.starting: list[Any] | None = None
        #: Whether definitions that came from elsewhere travel as they are now: see ``definitions``.
        self.in_full = False
        self.enclosed: list[Any] = []
        self._copies: list[bytearray] = []
        self._packing: Packing | None = None

    def clear(self) -> None:
        """Let go of everything; what has left in a payload is the payload's."""
        self.chunks.clear()
        self.fds, self.keep, self.blocks = [], [], {}
        self.more = False
        self.fresh = None
        self.here = self.in_full = False
        self.starting = None
        self.enclosed, self._copies = [], []
        self._packing = None

    @property
    def packing(self) -> Packing:
        """The storages that are to be packed."""
        self.more = True
        if self._packing is None:
            self._packing = Packing()
        return self._packing

    @property
    def own_blocks(self) -> int:
        return len(self.blocks)

    def enclose(self, obj: Any) -> int:
        self.more = True
        self.enclosed.append(obj)
        return len(self.enclosed) - 1

    def attach(self, fd: int, owner: Any) -> int:
        self.more = True
        self.fds.append(fd)
        self.keep.append(owner)
        return len(self.fds) - 1

    def refer(self, block: Block, storage: Any) -> int:
        index = self.blocks.get(block)
        if index is None:
            self.more = True
            if block.number == UNTRACKED:
                recycling.prepare_to_send(block)
            self.blocks[block] = index = len(self.blocks)
            self.keep.append(storage)
        return index

    def take_buffer(self, buffer: pickle.PickleBuffer) -> bool:
        """pickle's ``buffer_callback``: True leaves the buffer in the pickle."""
        raw = buffer.raw()
        if raw.nbytes < OUT_OF_BAND:
            return True
        if self.here:
            self.more = True
            self._copies.append(bytearray(raw))
            return False
        if self.own_blocks >= most_own() or (self._packing is not None and self._packing.has_buffers):
            self.packing.take_buffer(raw)
            return False
        found = content.block_with([raw], raw.nbytes)
        if found is None:
            return True
        block, storage = found
        self.more = True
        # A buffer of its own, also if a block has the content of two.
        self.blocks[Buffer(block)] = len(self.blocks)
        self.keep.append(storage)
        return False

    def letter(self) -> bytes | Letter:
        """What was collected ``here``."""
        pickled = b"".join(self.chunks)
        return Letter(pickled, self.enclosed, self._copies) if self.more else pickled

    def payload(self, limit: int) -> bytes | Parcel:
        """What was collected, as one payload of at most ``limit`` bytes."""
        # A large buffer that had to stay in the pickle was written to it as it is.
        chunks = [chunk if isinstance(chunk, bytes) else memoryview(chunk).cast("B") for chunk in self.chunks]
        rows = self._packing.place(self.refer, chunks) if self._packing is not None else ()
        blocks = self.blocks
        fds = self.fds + [block.fd for block in blocks]
        in_bag = len(fds) > MAX_FDS - 4
        tail = _tail(rows, blocks)
        size = sum(map(len, chunks))
        if size + sum(map(len, tail)) > limit or in_bag:
            return self._large_payload([*chunks, *tail], fds, in_bag)
        if not blocks and not rows:
            pickled = b"".join(chunks)
            return Parcel(pickled, fds, self.keep) if fds else pickled
        data = b"".join((*chunks, *tail))
        parcel = Parcel(data, fds, self.keep, REFERENCES, [block.number for block in blocks], not self.fds)
        parcel.nbytes += sum(block.nbytes for block in blocks)
        return parcel

    def _large_payload(self, chunks: list[bytes | memoryview], fds: list[int], in_bag: bool) -> Parcel:
        numbers = [block.number for block in self.blocks]
        size = sum(map(len, chunks))
        if in_bag:
            sack = bag.pack(fds)
            fds, self.keep = [sack.fileno()], [*self.keep, sack]
        found = content.block_with(chunks, pool.capacity_for(size))
        if found is None:  # one descriptor, which is closed again as soon as the message has left, must be had
            fd, number, nbytes = anonymous.fill(chunks), UNTRACKED, size
            self.keep.append(anonymous.Descriptor(fd))
        else:
            block, storage = found
            fd, number, nbytes = block.fd, block.number, block.nbytes
            self.keep.append(storage)
        head = HEAD.pack(size, in_bag) + REFERENCE.pack(number, nbytes) + COUNT.pack(1)
        parcel = Parcel(head, [*fds, fd], self.keep, BLOCK, [*numbers, number], not (self.fds or in_bag))
        parcel.nbytes += size + sum(block.nbytes for block in self.blocks)
        return parcel


def _tail(rows: Sequence[Row], blocks: Iterable[Block | Buffer]) -> list[bytes]:
    """What a message ends with: the rows of packed storages, if there are any, and the list of references."""
    references = [REFERENCE.pack(each.number, each.nbytes | BUFFER * isinstance(each, Buffer)) for each in blocks]
    count = COUNT.pack(len(references) | PACKED * bool(rows))
    return [*packed_rows(rows), *references, count] if rows else [*references, count]


def packed_rows(rows: Sequence[Row]) -> list[bytes]:
    return [*(ROW.pack(*row) for row in rows), COUNT.pack(len(rows))]


def arrivals_of(data: bytes | memoryview, end: int, fds: list[int], behind: int = 0) -> Arrivals:
    """Take out the blocks that are listed in what ends at ``end``; ``behind`` are descriptors after theirs."""
    references = listed(data, end)
    rows = rows_of(data, end - COUNT.size - len(references) * REFERENCE.size) if is_packed(data, end) else ()
    buffers = [index for index, (_, nbytes) in enumerate(references) if nbytes & BUFFER]
    if buffers:
        references = [(number, nbytes & ~BUFFER) for number, nbytes in references]
    first = max(0, len(fds) - behind - len(references))
    return Arrivals(references, fds, first, buffers, rows, data if rows else b"")


def is_packed(data: bytes | memoryview, end: int) -> bool:
    """Whether there are rows before the list of references that ends at ``end``."""
    return bool(COUNT.unpack_from(data, end - COUNT.size)[0] & PACKED)


def rows_of(data: bytes | memoryview, end: int) -> list[Row]:
    """The rows of packed storages, with their count, that end at ``end``."""
    (count,) = COUNT.unpack_from(data, end - COUNT.size)
    start = end - COUNT.size - count * ROW.size
    return list(map(Row._make, ROW.iter_unpack(data[start : start + count * ROW.size])))


def listed(data: bytes | memoryview, end: int) -> list[tuple[int, int]]:
    """The list of references that ends at ``end``: number and bytes, with the mark of a buffer in the bytes."""
    count = COUNT.unpack_from(data, end - COUNT.size)[0] & ~PACKED
    start = end - COUNT.size - count * REFERENCE.size
    if count == 1:
        return [REFERENCE.unpack_from(data, start)]
    return list(REFERENCE.iter_unpack(data[start : start + count * REFERENCE.size]))
