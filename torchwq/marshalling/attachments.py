"""The parts of a message that both encoders collect beside the pickle, and the kind of message these make."""

from __future__ import annotations

import pickle
from collections.abc import Container
from typing import Any, Final

from ..errors import MarshalError
from ..memory import content, recycling
from ..memory.block import Block
from ..memory.content import Buffer
from ..memory.counts import UNTRACKED
from ..memory.message import Message
from ..memory.packing import Packing, max_own_blocks
from ..transport.capabilities import SAME_MACHINE
from ..transport.endpoint import MAX_FDS
from .local_message import LocalMessage
from .value_message import ValueMessage
from .wire import InBlock, Pickle, References

#: Buffers of at least this size leave the pickle, and the reader maps them instead of copying them.
OUT_OF_BAND: Final = 32 * 1024


class Attachments:
    """The chunks of a pickle, and the descriptors, blocks and objects that travel with it. See ``reducers.Encoder``."""

    def __init__(self) -> None:
        self.chunks: list[Any] = []
        self.fds: list[int] = []
        self.keep_alive: list[Any] = []
        #: Each with its index in the message's list.
        self.blocks: dict[Block | Buffer, int] = {}
        #: Whether there is anything beside the pickle.
        self.has_attachments = False
        self.owned_blocks: Container[Block] | None = None
        #: For a peer on another machine: see ``Packing.beside``.
        self.stable_blocks: Container[Block] | None = None
        self.peer = SAME_MACHINE
        self.worker_resources: list[Any] | None = None
        #: Whether definitions that this process has received travel as they are now: see Note [definitions].
        self.full_definitions = False
        self.objects: list[Any] = []
        self._buffers: list[bytearray] = []
        self._packing: Packing | None = None

    def clear(self) -> None:
        """Forget everything: the payload owns it now."""
        self.chunks.clear()
        self.fds, self.keep_alive, self.blocks = [], [], {}
        self.has_attachments = False
        self.owned_blocks = self.stable_blocks = None
        self.peer, self.full_definitions = SAME_MACHINE, False
        self.worker_resources = None
        self.objects, self._buffers = [], []
        self._packing = None

    @property
    def packing(self) -> Packing:
        self.has_attachments = True
        if self._packing is None:
            self._packing = Packing()
        return self._packing

    @property
    def block_count(self) -> int:
        return len(self.blocks)

    def attach_object(self, obj: Any) -> int:
        self.has_attachments = True
        self.objects.append(obj)
        return len(self.objects) - 1

    def attach_fd(self, fd: int, owner: Any) -> int:
        if not self.peer.passes_descriptors:
            raise MarshalError("a handle, or whatever else has a file descriptor, cannot be sent to another machine")
        self.has_attachments = True
        self.fds.append(fd)
        self.keep_alive.append(owner)
        return len(self.fds) - 1

    def attach_block(self, block: Block, storage: Any) -> int:
        index = self.blocks.get(block)
        if index is None:
            self.has_attachments = True
            if block.number == UNTRACKED:
                recycling.prepare_to_send(block)
            self.blocks[block] = index = len(self.blocks)
            self.keep_alive.append(storage)
        return index

    def take_buffer(self, buffer: pickle.PickleBuffer) -> bool:
        """``pickle.Pickler`` calls it for each buffer; True leaves the buffer in the pickle."""
        raw = buffer.raw()
        if raw.nbytes < OUT_OF_BAND:
            return True
        if not self.peer.shares_memory:
            self.packing.take_buffer(raw)
            return False
        if self.peer.same_process:
            self.has_attachments = True
            self._buffers.append(bytearray(raw))
            return False
        if self.block_count >= max_own_blocks() or (self._packing is not None and self._packing.has_buffers):
            self.packing.take_buffer(raw)
            return False
        found = content.block_containing([raw], raw.nbytes)
        if found is None:
            return True
        block, storage = found
        self.has_attachments = True
        # Each buffer is an entry of its own, even if one block has the content of two.
        self.blocks[Buffer(block)] = len(self.blocks)
        self.keep_alive.append(storage)
        return False

    def local_message(self) -> bytes | LocalMessage:
        """The payload for a peer in this process."""
        pickled = b"".join(self.chunks)
        return LocalMessage(pickled, self.objects, self._buffers) if self.has_attachments else pickled

    def value_message(self) -> bytes | ValueMessage:
        """The payload for a peer on another machine."""
        pickled = b"".join(self.chunks)
        if not self.has_attachments:
            return pickled
        rows, parts = ([], []) if self._packing is None else self._packing.beside(self.stable_blocks)
        return ValueMessage(pickled, rows, parts, self.objects)

    def payload(self, limit: int) -> bytes | Message | LocalMessage | ValueMessage:
        """The payload for the peer: of at most ``limit`` bytes, if that is another process of this machine."""
        if self.peer.same_process:
            return self.local_message()
        return self.shared_message(limit) if self.peer.shares_memory else self.value_message()

    def shared_message(self, limit: int) -> bytes | Message:
        """The payload for a peer in another process of this machine."""
        # The pickler writes a large buffer that stays in the pickle as the object that it is.
        chunks = [chunk if isinstance(chunk, bytes) else memoryview(chunk).cast("B") for chunk in self.chunks]
        rows = self._packing.place(self.attach_block, chunks) if self._packing is not None else ()
        blocks = self.blocks
        only_blocks = not self.fds
        fds = self.fds + [block.fd for block in blocks]
        in_bundle = len(fds) > MAX_FDS - 4
        size = sum(map(len, chunks))
        if not blocks and not rows and not in_bundle and size <= limit:
            pickled = b"".join(chunks)
            return Pickle.encode(pickled, fds, self.keep_alive) if fds else pickled
        chunks += References.tail(rows, blocks)
        if in_bundle or sum(map(len, chunks)) > limit:
            return InBlock.encode(chunks, fds, self.keep_alive, blocks, in_bundle)
        return References.encode(b"".join(chunks), fds, self.keep_alive, blocks, only_blocks)
