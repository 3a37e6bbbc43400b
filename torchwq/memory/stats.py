"""Statistics of the shared memory, for users who look for a leak."""

from __future__ import annotations

from dataclasses import dataclass

from .. import _native
from . import limits, pool, received_blocks, recycling, state_lock, tree_table
from .block_fields import ADOPTED, MAPPED
from .counts import IN_FLIGHT, IN_USE, UNTRACKED


@dataclass(frozen=True, slots=True)
class MemoryStats:
    """The shared memory of this process at one moment.

    A block is a piece of shared memory with one tensor (or several views of one), or with large data of a message.

    Attributes:
        blocks: blocks that this process has made and keeps.
        bytes: their memory, in bytes.
        limit: how many bytes of it are kept at most when they are free.
        free: how many of the blocks can be used again now.
        in_use: how many of them tensors of this process use.
        in_flight: how many of them are in messages that nobody has read yet.
        held_remotely: how many of them other processes use.
        adopted: tensors' storages that torch has shared, and that have been sent.
        mapped: blocks of other processes that are mapped here.
        mapped_bytes: the bytes of these that tensors can see.
        mapped_in_use: how many of them tensors of this process use.
        hits: how often a message brought a block that was mapped here already, or that this process had made.
        misses: how often it brought one that had to be mapped.
        copies: how often tensors were copied, because descriptors were short.
    """

    blocks: int
    bytes: int
    limit: int
    free: int
    in_use: int
    in_flight: int
    held_remotely: int
    adopted: int
    mapped: int
    mapped_bytes: int
    mapped_in_use: int
    hits: int
    misses: int
    copies: int


def memory_stats() -> MemoryStats:
    """The statistics of this moment."""
    with state_lock.lock:
        recycling.drain_finalizers()
        recycling.poll_all()
        table = tree_table.current()
        made = pool.blocks()
        states = [
            table.state(block.number) if table is not None and block.number != UNTRACKED else None for block in made
        ]
        used = [block.in_use() for block in made]
        others = list(recycling.by_number.values())
        mapped = [block for block in others if block.kind == MAPPED]
        return MemoryStats(
            blocks=len(made),
            bytes=sum(block.capacity for block in made),
            limit=limits.memory_limit(),
            free=sum(not mine and state not in (IN_FLIGHT, IN_USE) for mine, state in zip(used, states, strict=True)),
            in_use=sum(used),
            in_flight=states.count(IN_FLIGHT),
            held_remotely=states.count(IN_USE),
            adopted=sum(block.kind == ADOPTED for block in others),
            mapped=len(mapped),
            mapped_bytes=sum(block.nbytes for block in mapped),
            mapped_in_use=sum(block.in_use() for block in mapped),
            hits=received_blocks.hits + (0 if _native.core is None else _native.core.hits()),
            misses=received_blocks.misses,
            copies=limits.copies,
        )
