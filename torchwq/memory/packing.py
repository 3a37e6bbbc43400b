"""Packs many storages of one message into few blocks: not each tensor needs a descriptor, a mapping and a count.

Each packed storage stays a storage of its own, exactly as large as its data: a *slice* of its block's memory. So its
neighbours do not show: ``torch.save`` writes its bytes and no more, and it cannot be resized, as no shared storage can.

By value, what is copied is not each tensor, but the parts of a storage that the message's tensors see. So views of one
storage arrive as views of one storage, and what they have in common is copied once.

By reference, a storage is moved into its slice, and the tensor with it. That needs a tensor that alone owns its
storage. Only a message of many tensors is packed: a block with one tensor is free as soon as that tensor is gone.

Invariants:

* A slice keeps its block's storage: the block is in use as long as any of its slices is.
* Slices do not overlap.
* All copying and moving is done when the message is complete.
* For want of descriptors, data are copied into the message itself. For a reader that shares no memory they travel
  beside its pickle, and are not copied here: see ``beside``.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Container, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from . import limits, pool, recycling, sharing, storages
from .block import Block
from .slices import aligned, cut_shared, slice_of

#: Up to so many bytes are copied into a block with others in less time than a block of their own takes.
SMALL: Final = 32 * 1024
#: How many tensors of one message get blocks of their own at most, where they could be packed.
_MAX_OWN_BLOCKS: Final = 64
#: About how many bytes one block with slices has, and how many such blocks a message has at most.
_PACK_BYTES: Final = 64 << 20
_MAX_PACKS: Final = 32

#: Where a slice is: in the message itself, or beside it; in a block; in a block, and the writer has it, too; or it is a
#: whole block.
INLINE, SLICE, SHARED, WHOLE = range(4)

#: Set in the number of a buffer of the pickle, which is no storage.
BUFFER: Final = 1 << 31


class Row(NamedTuple):
    """How a message describes one slice."""

    kind: int
    #: The number of its storage in the message, and where in the storage it begins, in bytes.
    group: int
    low: int
    nbytes: int
    #: The index of its block in the message, and where in the block it begins. INLINE: of the part of the message
    #: (0 for the message itself), and where in that part.
    block: int
    shift: int


_ROW: Final = struct.Struct("=BIQQIQ")
_COUNT: Final = struct.Struct("=I")


def rows_to_bytes(rows: Sequence[Row]) -> list[bytes]:
    """Rows as a message has them: one after the other, then their number."""
    return [*(_ROW.pack(*row) for row in rows), _COUNT.pack(len(rows))]


def rows_ending_at(data: bytes | memoryview, end: int) -> list[Row]:
    """The rows whose number ends at ``end`` in a message."""
    end -= _COUNT.size
    (count,) = _COUNT.unpack_from(data, end)
    return list(map(Row._make, _ROW.iter_unpack(data[end - count * _ROW.size : end])))


#: Lets a block travel with the message; returns its index.
Refer = Callable[[Block, torch.UntypedStorage], int]


def max_own_blocks() -> int:
    """How many blocks of their own a message's tensors may have, where they could be packed."""
    return min(_MAX_OWN_BLOCKS, max(1, limits.max_open_blocks() // 4))


class _Group:
    """One storage of the message: the parts to be copied, or the tensor to be moved."""

    __slots__ = ("buffer", "parts", "step", "storage", "tensor")

    def __init__(
        self,
        storage: torch.UntypedStorage | None = None,
        tensor: torch.Tensor | None = None,
        buffer: memoryview | None = None,
    ) -> None:
        #: None if the tensor is to be moved, which must own its storage alone.
        self.storage = storage
        self.tensor = tensor
        #: A buffer to be copied, if it is no storage.
        self.buffer = buffer
        self.parts: list[tuple[int, int]] = []
        #: The largest size of an element: parts begin at a multiple of it.
        self.step = 1

    def clusters(self) -> list[tuple[int, int]]:
        """The parts, merged where they overlap or touch; all merged, if that at most doubles the bytes."""
        if len(self.parts) == 1:
            return self.parts
        merged: list[tuple[int, int]] = []
        for low, high in sorted(self.parts):
            if merged and low <= merged[-1][1]:
                merged[-1] = merged[-1][0], max(high, merged[-1][1])
            else:
                merged.append((low // self.step * self.step, high))
        low, high = merged[0][0], merged[-1][1]
        return [(low, high)] if high - low <= 2 * sum(high - low for low, high in merged) else merged


class _Item(NamedTuple):
    """A part of a storage that is to be a slice."""

    group: int
    low: int
    nbytes: int


class Packing:
    """The storages of one message that are to be packed, or have been."""

    def __init__(self) -> None:
        self._groups: list[_Group] = []
        self._numbers: dict[int, int] = {}
        #: Whether it has buffers: all later ones must be packed, too, to keep their order.
        self.has_buffers = False

    def _number(self, storage: torch.UntypedStorage) -> int:
        number = self._numbers.get(storage._cdata)
        if number is None:
            self._numbers[storage._cdata] = number = len(self._groups)
            self._groups.append(_Group(storage))
        return number

    def copy(self, tensor: torch.Tensor, span: int) -> int:
        """Let the part of its storage that a dense tensor spans be copied, ``span`` > 0 elements.

        Returns the number of the storage in the message.
        """
        number = self._number(tensor.untyped_storage())
        group, size, offset = self._groups[number], tensor.element_size(), tensor.storage_offset()
        group.parts.append((int(offset) * size, (int(offset) + span) * size))
        group.step = max(group.step, size)
        return number

    def move(self, tensor: torch.Tensor) -> int:
        """Let a dense tensor be moved, which alone owns its storage."""
        self._groups.append(_Group(tensor=tensor))
        return len(self._groups) - 1

    def take_buffer(self, buffer: memoryview) -> None:
        """Add the next one of the pickle's buffers."""
        self._groups.append(_Group(buffer=buffer))
        self.has_buffers = True

    def refer(self, storage: torch.UntypedStorage) -> int:
        """Add a reference to a shared slice."""
        return self._number(storage)

    def beside(self, stable: Container[Block] | None) -> tuple[list[Row], list[memoryview]]:
        """The places of everything that travels beside a message, and its parts, in order.

        Args:
            stable: the blocks that nobody writes to until the message has been sent: a part on them is that memory
                itself, which it keeps. Others are copied. If None, none is copied: the message is sent at once.
        """
        rows: list[Row] = []
        parts: list[memoryview] = []
        for number, group in enumerate(self._groups):
            if group.buffer is not None:
                rows.append(Row(INLINE, number | BUFFER, 0, group.buffer.nbytes, len(parts), 0))
                parts.append(group.buffer if stable is None else memoryview(bytes(group.buffer)))
                continue
            storage = group.storage
            assert storage is not None
            memory = storages.lasting_memory(storage)
            is_stable = stable is None or recycling.block_of(storage) in stable
            for low, high in group.clusters():
                rows.append(Row(INLINE, number, low, high - low, len(parts), 0))
                parts.append(memory[low:high] if is_stable else memoryview(bytes(memory[low:high])))
        return rows, parts

    def place(self, refer: Refer, chunks: list[Any]) -> list[Row]:
        """Copy and move everything to its place; returns the places. Raises ResourceError if there is no memory.

        Args:
            refer: lets the message refer to a block.
            chunks: the message so far. What can be on no block is appended.
        """
        return _Placement(self._groups, refer, chunks).rows if len(self._groups) > 1 else self._place_one(refer, chunks)

    def _place_one(self, refer: Refer, chunks: list[Any]) -> list[Row]:
        """The same, faster for the most frequent case: one small tensor that is copied."""
        group = self._groups[0]
        if len(group.parts) == 1:
            low, high = group.parts[0]
            assert group.storage is not None
            if high - low <= SMALL:
                copied = pool.copy(group.storage, low, high - low, is_short=True)
                if copied is not None:
                    return [Row(WHOLE, 0, low, high - low, refer(*copied), 0)]
        return _Placement(self._groups, refer, chunks).rows


class _Inline:
    """Appends parts of storages, and buffers, to the ``chunks`` of the message."""

    def __init__(self, groups: Sequence[_Group], chunks: list[Any]) -> None:
        self._groups = groups
        self._chunks = chunks
        self._end = -1

    def row(self, item: _Item, flag: int = 0) -> Row:
        group = self._groups[item.group]
        if group.buffer is not None:
            data = bytes(group.buffer)
        else:
            storage = group.storage if group.tensor is None else group.tensor.untyped_storage()
            assert storage is not None
            data = bytes(storages.memory(storage)[item.low : item.low + item.nbytes])
        if self._end < 0:
            self._end = sum(map(len, self._chunks))
        self._chunks.append(data)
        shift, self._end = self._end, self._end + item.nbytes
        return Row(INLINE, item.group | flag, item.low, item.nbytes, 0, shift)


class _Placement:
    """Puts storages and buffers onto blocks."""

    def __init__(self, groups: Sequence[_Group], refer: Refer, chunks: list[Any]) -> None:
        self._groups = groups
        self._refer = refer
        self._message = _Inline(groups, chunks)
        self.rows: list[Row] = []
        own: list[_Item] = []
        small: list[_Item] = []
        moved: list[_Item] = []
        buffers: list[_Item] = []
        for number, group in enumerate(groups):
            if group.tensor is not None:
                moved.append(_Item(number, 0, group.tensor.untyped_storage().nbytes()))
            elif group.buffer is not None:
                buffers.append(_Item(number, 0, group.buffer.nbytes))
            elif group.parts:
                alone = len(group.parts) == 1
                for low, high in group.clusters():
                    item = _Item(number, low, high - low)
                    (own if alone and item.nbytes > SMALL and len(own) < max_own_blocks() else small).append(item)
            else:
                self._refer_to_slice(number, group)
        if len(small) == 1 and len(groups[small[0].group].parts) == 1:
            own, small = [*own, *small], []
        for item in own:
            self._pack([item], self._copy, WHOLE)
        for part in _packs(small):
            self._pack(part, self._copy, SLICE)
        for part in _packs(moved):
            self._pack(part, self._move, SHARED)
        for part in _packs(buffers):
            self._pack(part, self._copy, SLICE, BUFFER)

    def _refer_to_slice(self, number: int, group: _Group) -> None:
        storage = group.storage
        found = None if storage is None else slice_of(storage)
        assert storage is not None
        assert found is not None
        block = recycling.block_of(found.base)
        if block is None or not sharing.is_current(block):
            block = sharing.share_storage(found.base)
        if block is None:
            self._inline(_Item(number, 0, storage.nbytes()))
            return
        row = SHARED, number, 0, storage.nbytes(), self._refer(block, found.base), found.shift
        self.rows.append(Row(*row))

    def _pack(self, items: Sequence[_Item], fill: Callable[..., Any], kind: int, flag: int = 0) -> None:
        """Let ``items`` be slices of one new block."""
        shifts, end = [], 0
        for item in items:
            shifts.append(end)
            end = aligned(end + item.nbytes)
        nbytes = shifts[-1] + items[-1].nbytes
        is_short = nbytes <= SMALL and kind != SHARED  # moving takes locks of its own
        filled = pool.fill_block(nbytes, functools.partial(fill, items, shifts), is_short)
        if filled is None:
            for item in items:
                self._inline(item, flag)
            return
        block, storage, elsewhere = filled
        index = self._refer(block, storage)
        for item, shift in zip(items, shifts, strict=True):
            if item.group not in elsewhere:
                self.rows.append(Row(kind, item.group | flag, item.low, item.nbytes, index, shift))
        for number in elsewhere:
            self._refer_to_moved(number)

    def _copy(self, items: Sequence[_Item], shifts: Sequence[int], block: Block) -> Any:
        address = block.address
        for item, shift in zip(items, shifts, strict=True):
            group = self._groups[item.group]
            if group.buffer is not None:
                source = np.frombuffer(group.buffer, np.uint8).ctypes.data
            else:
                assert group.storage is not None
                source = group.storage.data_ptr() + item.low
            ctypes.memmove(address + shift, source, item.nbytes)
        return block, block.storage, ()

    def _move(self, items: Sequence[_Item], shifts: Sequence[int], block: Block) -> Any:
        base = block.storage
        memory = storages.lasting_memory(base)
        elsewhere = []
        for item, shift in zip(items, shifts, strict=True):
            tensor = self._groups[item.group].tensor
            assert tensor is not None
            if not sharing.move_to(tensor, functools.partial(cut_shared, memory, base, shift, item.nbytes)):
                elsewhere.append(item.group)
        return block, base, elsewhere

    def _refer_to_moved(self, number: int) -> None:
        """Refer to a tensor that another thread has moved meanwhile, or that has got a view, where it is."""
        tensor = self._groups[number].tensor
        assert tensor is not None
        try:
            block = sharing.share(tensor)
        except sharing.IsSlice:
            self._refer_to_slice(number, _Group(tensor.untyped_storage()))
            return
        storage = tensor.untyped_storage()
        if block is None:
            self._inline(_Item(number, 0, storage.nbytes()))
        else:
            self.rows.append(Row(WHOLE, number, 0, storage.nbytes(), self._refer(block, storage), 0))

    def _inline(self, item: _Item, flag: int = 0) -> None:
        if not flag:
            limits.warn_of_copies()
        self.rows.append(self._message.row(item, flag))


def _packs(items: Sequence[_Item]) -> list[list[_Item]]:
    """``items`` in order, grouped by the blocks that they will be on."""
    most = max(_PACK_BYTES, sum(item.nbytes for item in items) // _MAX_PACKS + 1)
    packs: list[list[_Item]] = []
    left = 0
    for item in items:
        if not packs or item.nbytes > left:
            packs.append([])
            left = most
        packs[-1].append(item)
        left -= item.nbytes
    return packs
