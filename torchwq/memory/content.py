"""Data that travel by value and are too large for a message: large arrays, and large pickles, each in a block.

By value means that the reader's copy is its own. The reader maps the block privately: a page is copied when it is
written to. So the data are copied once, into the block, and eight readers of the same data can have one block. Whether
the data are the same, a comparison with the last blocks shows. It takes no longer than copying, and ends at the first
difference.

Invariant: a block with ``has_content`` set is not written to until the pool has taken it again, which unsets it.
"""

from __future__ import annotations

import ctypes
import functools
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from ..transport.fork import reset_in_child
from . import pool, recycling, state_lock
from .block import Block
from .block_fields import MADE

#: How many blocks the data are compared with.
_MAX_LAST: Final = 4

_memcmp: Any = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)

_last: deque[Block] = deque(maxlen=_MAX_LAST)


@reset_in_child
def _reset() -> None:
    _last.clear()


class Buffer:
    """A block as one of a pickle's out-of-band buffers."""

    __slots__ = ("fd", "nbytes", "number")

    def __init__(self, block: Block) -> None:
        self.fd, self.nbytes, self.number = block.fd, block.nbytes, block.number


def block_containing(parts: Sequence[bytes | memoryview], nbytes: int) -> tuple[Block, Any] | None:
    """A block of ``nbytes`` that begins with ``parts``, one after the other, and its storage, which keeps it in use.

    Returns None if there is no descriptor for it. Raises ResourceError if there is no memory.
    """
    pieces = [_piece(part) for part in parts if len(part)]
    for block in list(_last):
        if block.nbytes == nbytes:
            storage = _storage_if_equal(block, pieces)
            if storage is not None:
                return block, storage
    filled = pool.fill_block(nbytes, functools.partial(_write, pieces))
    if filled is not None:
        block, _ = filled
        recycling.prepare_to_send(block)
        if block.kind == MADE:
            _last.append(block)
    return filled


def _write(pieces: Sequence[tuple[Any, int, int]], block: Block) -> tuple[Block, Any]:
    storage, address = block.storage, block.address
    for _, start, size in pieces:
        ctypes.memmove(address, start, size)
        address += size
    block.has_content = True
    return block, storage


def _piece(part: bytes | memoryview) -> tuple[Any, int, int]:
    """An array that keeps the bytes, their address, and their number."""
    array = np.frombuffer(part, np.uint8)
    return array, array.ctypes.data, array.nbytes


def _storage_if_equal(block: Block, pieces: Sequence[tuple[Any, int, int]]) -> Any:
    """The storage of ``block`` if it begins with ``pieces``, else None."""
    with state_lock.lock:
        if not block.has_content or block.kind != MADE:
            return None
        storage = block.storage  # keeps the pool from taking the block
    address = block.address
    for _, start, size in pieces:
        if _memcmp(address, start, size):
            return None
        address += size
    return storage
