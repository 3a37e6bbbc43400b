"""Polls whether tensors still use the blocks that messages have brought, as no event tells.

A weak reference to a tensor would tell of its end. But torch refuses to swap a tensor that has one
(``torch.utils.swap_tensors``, which modules use), and a view may outlive the tensor anyway. So the owners of the
storage are counted (``Block.in_use``). Each message that is taken polls, because most tensors are gone by the time of
the next one; where no more messages come, the maintenance does.

The intervals double. A block is polled with each of the next two messages, then twice with every second one, and so on.
So a tensor that is dropped soon is noticed at once, one that is dropped late is noticed proportionally late, and one
that is kept for ever costs two polls for each doubling of its age. The oldest blocks are polled in turn, a few with
each message.

Invariant: a block with ``is_polled`` set is in one of the levels, or is just being polled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Final

from .. import _native
from .block import Block
from .block_fields import MAPPED

#: After so many polls, a block is one of the oldest.
_LEVELS: Final = 10


class PythonUsePoller:
    """Blocks that may be in use. Used under ``state_lock.lock``.

    Args:
        on_idle: called with a mapped block that nothing in this process uses any more. May be called several times.
    """

    def __init__(self, on_idle: Callable[[Block], None]) -> None:
        self._on_idle = on_idle
        #: By how often they were polled, and were in use.
        self._levels: list[deque[Block]] = [deque() for _ in range(_LEVELS + 1)]
        self._messages = 0

    def add(self, block: Block) -> None:
        """Poll it from now on."""
        if not block.is_polled:
            block.is_polled = True
            self._levels[0].append(block)

    def release(self, block: Block) -> None:
        """A mapped block may not be in use any more: look now, and poll it if it is."""
        if not self._try_release(block):
            self.add(block)

    def _try_release(self, block: Block) -> bool:
        """Returns whether the block need not be polled any more."""
        if block.kind == MAPPED:
            if block.in_use():
                return False
            self._on_idle(block)
        return True

    def poll(self, new_tensors: int) -> None:
        """Poll those whose time has come. ``new_tensors``: how many the message has that is being taken."""
        levels = self._levels
        self._messages = turn = self._messages + 1
        if levels[_LEVELS]:
            self._poll_level(_LEVELS, _LEVELS, new_tensors + 1)
        # Levels 0 and 1 each time, 2 and 3 every second time, 4 and 5 every fourth. The highest first, so that none is
        # polled twice.
        for level in range(min(2 * (turn & -turn).bit_length() - 1, _LEVELS - 1), -1, -1):
            if levels[level]:
                self._poll_level(level, level + 1, len(levels[level]))

    def poll_all(self, limit: int) -> None:
        """Poll all of them, but of the oldest at most ``limit``."""
        for level in reversed(range(_LEVELS + 1)):
            self._poll_level(level, min(level + 1, _LEVELS), limit if level == _LEVELS else len(self._levels[level]))

    def _poll_level(self, level: int, next_level: int, limit: int) -> None:
        blocks, later = self._levels[level], self._levels[next_level]
        for _ in range(min(limit, len(blocks))):
            if not blocks:
                return  # a finalizer has polled meanwhile
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


#: See ``PythonUsePoller``.
UsePoller: Final[Callable[[Callable[[Block], None]], Any]] = (
    PythonUsePoller if _native.core is None else _native.core.UsePoller
)
