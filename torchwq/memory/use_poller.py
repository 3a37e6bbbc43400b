"""When to poll whether a block is still used here, as long as nobody tells.

A tensor's death could be told by a weak reference to it. But torch refuses to swap a tensor that has one
(``torch.utils.swap_tensors``, which modules use), and a view may outlive the tensor anyway. So it is looked at: how
many owners the storage has (``Block.in_use``). Whoever takes a message looks, because most tensors are gone by the time
of the next one; and a timer, where no more messages come.

A block is looked at with each of the next two messages, then with every second one, twice, and so on. So what is
dropped soon is noticed at once, what is dropped late is noticed late in proportion, and what is kept for ever costs two
looks for each doubling of its age. From a certain age on, blocks are looked at in turn, a few with each message.

Invariant: a block with ``is_polled`` set is in here, or just being looked at.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

from .block import Block

#: How often a block is looked at before it is looked at in turn with all others that are as old.
_LEVELS: Final = 10


class UsePoller:
    """Blocks that may be in use. Not safe by itself.

    Args:
        try_release: looks at a block; returns whether it need not be looked at any more.
    """

    def __init__(self, try_release: Callable[[Block], bool]) -> None:
        self._try_release = try_release
        #: By how often they were looked at, and were in use; those of the last are looked at in turn.
        self._levels: list[deque[Block]] = [deque() for _ in range(_LEVELS + 1)]
        self._messages = 0

    def add(self, block: Block) -> None:
        """Look at it from now on, if that is not done already."""
        if not block.is_polled:
            block.is_polled = True
            self._levels[0].append(block)

    def poll(self, new_tensors: int) -> None:
        """Look at those whose time has come. ``new_tensors``: how many tensors the message has that is being taken."""
        levels = self._levels
        self._messages = turn = self._messages + 1
        if levels[_LEVELS]:
            self._poll_level(_LEVELS, _LEVELS, new_tensors + 1)
        # Those of levels 0 and 1 each time, of 2 and 3 every second time, of 4 and 5 every fourth. The highest first,
        # so that none is looked at twice.
        for level in range(min(2 * (turn & -turn).bit_length() - 1, _LEVELS - 1), -1, -1):
            if levels[level]:
                self._poll_level(level, level + 1, len(levels[level]))

    def poll_all(self, limit: int) -> None:
        """Look at all of them, but of the oldest at most ``limit``."""
        for level in reversed(range(_LEVELS + 1)):
            self._poll_level(level, min(level + 1, _LEVELS), limit if level == _LEVELS else len(self._levels[level]))

    def _poll_level(self, level: int, next_level: int, limit: int) -> None:
        blocks, later = self._levels[level], self._levels[next_level]
        for _ in range(min(limit, len(blocks))):
            if not blocks:
                return  # a finalizer has looked meanwhile
            block = blocks.popleft()
            block.is_polled = done = False
            try:
                done = self._try_release(block)
            finally:
                if not done and not block.is_polled:
                    block.is_polled = True
                    later.append(block)

    def clear(self) -> None:
        for blocks in self._levels:
            blocks.clear()
