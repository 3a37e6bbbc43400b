"""The layout of messages: one class for each kind, and the table of them.

A message is bytes, and descriptors beside them. Its last byte says its kind, and so the class that writes and reads it;
:mod:`~torchwq.transport.trailer` has that byte, and the number before it. Each class says at its head what comes before
the trailer: no other module takes a message apart. This is one file, though a long one, so that the layout of messages
stands in one place.

A kind has four functions. ``encode`` writes a payload; its parameters differ from kind to kind. ``decode`` makes the
object, ``discard`` frees what a message holds that nobody decodes, and ``describe`` says in a few words what it
contains. To add a kind, write its class and add it to ``KINDS``.

A *reference* is the number and the size of a block of shared memory. A *row* is a slice of such a block: see
:class:`~torchwq.memory.packing.Row`. An *fd bundle* is a socket with descriptors in it: see
:mod:`torchwq.transport.fd_bundle`.

Other modules describe the messages within a process (:mod:`~torchwq.marshalling.local_message` and
:mod:`~torchwq.marshalling.copies`), those between a queue's owner and its workers beside the queue
(:mod:`torchwq.queues.protocol`), and the objects that a loader and its workers send (:mod:`torchwq.loading.messages`).

Invariants:

* ``decode`` and ``discard`` take over the descriptors, even if they fail.
* Each reference of a message is either taken or noted as discarded.
* ``describe`` imports and runs nothing that a message names.
"""

from __future__ import annotations

import contextlib
import pickle
import struct
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, Final

import torch

from ..memory import anonymous, content, pool, promises, recycling
from ..memory.block import Block
from ..memory.content import Buffer
from ..memory.counts import UNTRACKED
from ..memory.message import Message
from ..memory.packing import Row, rows_ending_at, rows_to_bytes
from ..memory.received_blocks import ReceivedBlocks
from ..transport import fd_bundle
from ..transport.descriptors import close_fds
from ..transport.endpoint import Received
from ..transport.trailer import BARE, KIND, PICKLE, SIZE, size_of_payload, trailer
from . import fast_path
from .describe import describe_pickle
from .reducers import InboundMessage

#: A reference (number and bytes of a block), and the number of references.
_REFERENCE: Final = struct.Struct("=QQ")
_COUNT: Final = struct.Struct("=I")
#: The only reference of a message, and their number.
_ONE: Final = struct.Struct("=QQI")
#: Flag in a reference's bytes: the block is one of the pickle's buffers.
_BUFFER: Final = 1 << 63
#: Flag in the number of references: rows come before the references.
_PACKED: Final = 1 << 31

_REFERENCES: Final = 1

_REFERENCE_SIZE: Final = _REFERENCE.size
_COUNT_SIZE: Final = _COUNT.size
_unpack_reference: Final = _REFERENCE.unpack_from
_unpack_references: Final = _REFERENCE.iter_unpack
_unpack_count: Final = _COUNT.unpack_from


class Kind(ABC):
    """A kind of message: a set of functions. It has no instances."""

    #: The last byte of such a message.
    kind: ClassVar[int]
    #: Whether ``pickle.loads`` decodes one that has no descriptors: it stops before the trailer.
    is_pickle: ClassVar[bool] = False

    @staticmethod
    @abstractmethod
    def decode(data: bytes, fds: list[int]) -> Any:
        """The object in the message. Raises whatever unpickling raises."""

    @staticmethod
    def discard(data: bytes, fds: list[int]) -> None:
        """Free what the message holds. Never raises."""
        close_fds(fds)

    @staticmethod
    def describe(data: bytes) -> str:
        """The message in a few words; here, of the pickle at its beginning."""
        try:
            return describe_pickle(data)
        except Exception:
            return f"an object of {size_of_payload(data)} bytes"


class Pickle(Kind):
    """A pickle, and the descriptors that were attached to it."""

    kind = PICKLE
    is_pickle = True

    @staticmethod
    def encode(pickled: bytes, fds: list[int], keep: list[Any]) -> Message:
        """The payload keeps ``keep``, the owners of ``fds``, alive."""
        return Message(pickled, fds, keep)

    @staticmethod
    def decode(data: bytes, fds: list[int]) -> Any:
        if not fds:
            return pickle.loads(data)
        try:
            return _loads(data, None, fds)
        finally:
            close_fds(fds)


class Bare(Pickle):
    """Only a pickle, as most small messages. It is its own payload, and travels without a number."""

    kind = BARE


class References(Kind):
    """A pickle that refers to blocks: the pickle, [data, rows and their number], references and their number.

    The descriptors are the attached ones, and then one for each reference; or none, if the reader keeps those of all
    references, see Note [in-band promises]. The bytes after the pickle are the message's *tail*.
    """

    kind = _REFERENCES

    @staticmethod
    def encode_tensor(begin: bytes, block: Block, storage: torch.UntypedStorage, limit: int) -> Message | None:
        """As ``encode_plain``, of one tensor."""
        nbytes = block.nbytes
        data = begin + _ONE.pack(block.number, nbytes, 1)
        if len(data) > limit:
            return None
        return Message(data, [block.fd], [storage], _REFERENCES, (block.number,), True, nbytes)

    @classmethod
    def encode_plain(
        cls, begin: bytes, is_packed: bool, blocks: Sequence[Block], storages: list[Any], limit: int
    ) -> Message | None:
        """The payload of the parts that ``fast_path`` has found; None if it has more than ``limit`` bytes.

        Args:
            begin: the pickle, and the rows after it if tensors are packed (``is_packed``).
            blocks: the blocks to which the message refers.
            storages: the storages of the blocks, which the payload keeps alive.
        """
        fds, numbers, parts = [], [], [begin]
        nbytes = 0
        for block in blocks:
            fds.append(block.fd)
            numbers.append(block.number)
            parts.append(_REFERENCE.pack(block.number, block.nbytes))
            nbytes += block.nbytes
        parts.append(_COUNT.pack(len(fds) | _PACKED if is_packed else len(fds)))
        data = b"".join(parts)
        if len(data) > limit:
            return None
        return Message(data, fds, storages, cls.kind, numbers, True, nbytes)

    @staticmethod
    def tail(rows: Sequence[Row], blocks: Iterable[Block | Buffer]) -> list[bytes]:
        """The bytes after the pickle: the rows, if there are any, and the references."""
        references = [_REFERENCE.pack(each.number, each.nbytes | _BUFFER * isinstance(each, Buffer)) for each in blocks]
        count = _COUNT.pack(len(references) | _PACKED * bool(rows))
        return [*(rows_to_bytes(rows) if rows else ()), *references, count]

    @classmethod
    def encode(
        cls, data: bytes, fds: list[int], keep: list[Any], blocks: Iterable[Block | Buffer], only_blocks: bool
    ) -> Message:
        """The payload of ``data``, a pickle with its ``tail``; the blocks' descriptors are the last of ``fds``."""
        nbytes = sum(block.nbytes for block in blocks)
        return Message(data, fds, keep, cls.kind, [block.number for block in blocks], only_blocks, nbytes)

    @staticmethod
    def decode(data: bytes, fds: list[int]) -> Any:
        try:
            at = len(data) - SIZE - _COUNT_SIZE
            (count,) = _unpack_count(data, at)
            start = at - (count & ~_PACKED) * _REFERENCE_SIZE
            shape = fast_path.shapes.get(data[:start])
            if shape is not None:
                if count == 1:
                    obj = fast_path.decode_one(shape, *_unpack_reference(data, start))
                else:
                    obj = fast_path.decode(shape, _unpack_references(data[start:at]))
                if obj is not None:
                    return obj
            end = at + _COUNT_SIZE
            obj = _loads(data, _received_blocks(data, end, fds), fds)
            if shape is None:
                fast_path.learn(obj, _rows(data, end))
            return obj
        finally:
            close_fds(fds)

    @staticmethod
    def numbers(data: bytes) -> list[int]:
        """The numbers of the message's blocks, in the order of its last descriptors."""
        return [number for number, _ in _references(data, size_of_payload(data))]

    @classmethod
    def discard(cls, data: bytes, fds: list[int]) -> None:
        with contextlib.suppress(Exception):  # then their maker takes them for lost after a while
            recycling.note_discarded(cls.numbers(data))
        close_fds(fds)


class InBlock(Kind):
    """A message that is too large or has too many descriptors: a head, and a reference to the block with its content.

    The content is the bytes that ``References`` has before the trailer. The head says how many there are, and whether
    the content's descriptors are in an fd bundle. The message's descriptors are those, or the bundle, and then the
    block's.
    """

    kind = 2
    _HEAD: Final = struct.Struct("=Q?")

    @classmethod
    def encode(
        cls,
        chunks: Sequence[bytes | memoryview],
        fds: list[int],
        keep: list[Any],
        blocks: Iterable[Block | Buffer],
        in_bundle: bool,
    ) -> Message:
        """The payload of ``chunks``, a pickle with its ``tail``. Raises ResourceError.

        Args:
            fds: the descriptors that it needs, those of its ``blocks`` last.
            keep: the owners of ``fds``.
            in_bundle: whether they are too many for one message.
        """
        size = sum(map(len, chunks))
        if in_bundle:
            # It lives as long as the message, so nobody closes it, and Python warns of a socket that nobody has closed.
            carrier = anonymous.Descriptor(fd_bundle.pack(fds).detach())
            fds, keep = [carrier.fd], [*keep, carrier]
        found = content.block_containing(chunks, pool.capacity_for(size))
        if found is None:  # it needs one descriptor, only until the message has left
            fd, number, nbytes = anonymous.fill(chunks), UNTRACKED, size
            keep.append(anonymous.Descriptor(fd))
        else:
            block, storage = found
            fd, number, nbytes = block.fd, block.number, block.nbytes
            keep.append(storage)
        data = cls._HEAD.pack(size, in_bundle) + _ONE.pack(number, nbytes, 1)
        numbers = [*(block.number for block in blocks), number]
        return Message(data, [*fds, fd], keep, cls.kind, numbers, nbytes=size + sum(block.nbytes for block in blocks))

    @classmethod
    def _opened(cls, data: bytes, fds: list[int]) -> tuple[ReceivedBlocks, memoryview, bool]:
        """The block, whose ``done`` the caller calls; its content; whether the first descriptor is a bundle."""
        size, in_bundle = cls._HEAD.unpack_from(data)
        block = _received_blocks(data, size_of_payload(data), fds)
        return block, block.memory(0)[:size], in_bundle

    @classmethod
    def decode(cls, data: bytes, fds: list[int]) -> Any:
        try:
            block, inside, in_bundle = cls._opened(data, fds)
            try:
                if in_bundle:
                    carrier, fds[0] = fds[0], -1
                    fds[:1] = fd_bundle.unpack(carrier)
                return _loads(inside, _received_blocks(inside, len(inside), fds, behind=1), fds)
            finally:
                block.done()
        finally:
            close_fds(fds)

    @classmethod
    def discard(cls, data: bytes, fds: list[int]) -> None:
        with contextlib.suppress(Exception):  # then their maker takes them for lost after a while
            block, inside, _ = cls._opened(data, fds)
            try:
                references = _references(inside, len(inside))
            finally:
                block.done()
            recycling.note_discarded([number for number, _ in references])
        close_fds(fds)

    @staticmethod
    def describe(data: bytes) -> str:
        return "a large object"


class BacklogMessage(Kind):
    """Many messages, the *items*, as one: a process that ends hands them all on. There are no bytes.

    The one descriptor is an fd bundle. Its first is memory with the items, pickled, each with how many descriptors it
    has; those follow.
    """

    kind = 3

    @classmethod
    @contextlib.contextmanager
    def encode(cls, items: Iterable[tuple[bytes, Sequence[int]]]) -> Iterator[tuple[bytes, int]]:
        """The message and the descriptor to send with it; the descriptors of ``items`` stay whose they are.

        Raises OSError if memory or descriptors have run out.
        """
        fds: list[int] = []
        parts = []
        for data, own in items:
            fds += own
            parts.append((data, len(own)))
        fd = anonymous.fill([pickle.dumps(parts)])
        with contextlib.closing(anonymous.Descriptor(fd)), fd_bundle.pack([fd, *fds]) as carrier:
            yield trailer(0, cls.kind), carrier.fileno()

    @classmethod
    def is_one(cls, data: bytes) -> bool:
        """Whether a message that has brought descriptors is one."""
        return data[KIND] == cls.kind

    @staticmethod
    def decode(data: bytes, fds: list[int]) -> deque[Received]:
        """The items, in order."""
        inside = fd_bundle.unpack(fds.pop())
        with contextlib.closing(anonymous.Descriptor(inside.pop(0))) as memory:
            parts = pickle.loads(anonymous.map_private(memory.fd))
        items: deque[Received] = deque()
        for item, count in parts:
            items.append((item, inside[:count]))
            del inside[:count]
        return items

    @classmethod
    def discard(cls, data: bytes, fds: list[int]) -> None:
        with contextlib.suppress(Exception):
            for item in cls.decode(data, fds):
                discard(*item)
        close_fds(fds)

    @staticmethod
    def describe(data: bytes) -> str:
        return "items of a channel"


class Forget(Kind):
    """A sender's id and the numbers of blocks whose descriptors the reader drops, see Note [in-band promises].

    ``promises`` writes and reads this kind and the next.
    """

    kind = promises.FORGET

    @staticmethod
    def decode(data: bytes, fds: list[int]) -> Any:
        raise ValueError("this message concerns the connection, and has no object")

    @staticmethod
    def describe(data: bytes) -> str:
        return "blocks to forget"


class Left(Forget):
    """The id of a sender that has ended."""

    kind = promises.LEFT


#: Every kind, by the last byte of its messages.
KINDS: Final[dict[int, type[Kind]]] = {
    each.kind: each for each in (Bare, Pickle, References, InBlock, BacklogMessage, Forget, Left)
}

#: The kinds that a queue itself unpickles where they have no descriptors.
PICKLES: Final = frozenset(kind for kind, each in KINDS.items() if each.is_pickle)

#: The function that decodes a message, by its last byte.
DECODERS: Final = {kind: each.decode for kind, each in KINDS.items()}


def discard(data: bytes, fds: list[int]) -> None:
    """Free what a message holds that nobody will decode. Takes over ``fds``."""
    KINDS[data[KIND]].discard(data, fds)


def describe(data: bytes) -> str:
    """The message in a few words."""
    return KINDS[data[KIND]].describe(data)


def _loads(data: bytes | memoryview, received_blocks: ReceivedBlocks | None, fds: list[int]) -> Any:
    if received_blocks is None:
        with InboundMessage(fds, None):
            return pickle.loads(data)
    try:
        with InboundMessage(fds, received_blocks):
            return pickle.loads(data, buffers=received_blocks.buffers())
    finally:
        received_blocks.done()


def _received_blocks(data: bytes | memoryview, end: int, fds: list[int], behind: int = 0) -> ReceivedBlocks:
    """Take the blocks of the references that end at ``end``; ``behind`` descriptors follow theirs."""
    references = _references(data, end)
    rows = _rows(data, end)
    buffers = [index for index, (_, nbytes) in enumerate(references) if nbytes & _BUFFER]
    if buffers:
        references = [(number, nbytes & ~_BUFFER) for number, nbytes in references]
    first = max(0, len(fds) - behind - len(references))
    return ReceivedBlocks(references, fds, first, buffers, rows, (data,) if rows else ())


def _references(data: bytes | memoryview, end: int) -> list[tuple[int, int]]:
    """The references that end at ``end``: number and bytes, with the mark of a buffer in the bytes."""
    end -= _COUNT_SIZE
    count = _unpack_count(data, end)[0] & ~_PACKED
    start = end - count * _REFERENCE_SIZE
    return [_unpack_reference(data, start)] if count == 1 else list(_unpack_references(data[start:end]))


def _rows(data: bytes | memoryview, end: int) -> Sequence[Row]:
    """The rows before the references that end at ``end``, if there are any."""
    end -= _COUNT_SIZE
    (count,) = _unpack_count(data, end)
    return rows_ending_at(data, end - (count & ~_PACKED) * _REFERENCE_SIZE) if count & _PACKED else ()
