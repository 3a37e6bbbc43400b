"""What is in the extension module. The twins in Python say what each thing does."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, final

import torch
from typing_extensions import disjoint_base

#: A message's bytes, and its descriptors, or what stands for them: ``transport.endpoint.Received``.
_Received: TypeAlias = tuple[bytes, Any]
#: ``memory.storages.Geometry``.
_Geometry: TypeAlias = tuple[int, int, tuple[int, ...], tuple[int, ...]]

# --- module.c ---

#: Stands for what it was built from: see ``sources.digest``. Empty if it was built by hand.
sources: str

# --- lock.c ---

@final
class StateLock:
    """Twin: ``threading.RLock``."""

    def __new__(cls) -> StateLock: ...
    def __enter__(self) -> bool: ...
    def __exit__(self, *exception: object) -> None: ...
    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool: ...
    def release(self) -> None: ...
    def _is_owned(self) -> bool: ...

# --- sockets.c ---

@disjoint_base
class SeqpacketCalls:
    """Twin: ``transport.seqpacket.PythonSeqpacketCalls``."""

    fd: int

    def try_send(self, data: bytes, fds: Sequence[int] = (), /) -> bool: ...
    def try_receive(self) -> tuple[bytes, list[int]] | None: ...

def set_sockets(
    no_fds: list[int], on_error: Callable[[int, bool], None], on_fds: Callable[[list[int], bool], list[int]], /
) -> None: ...
def sleep(epoll: int, fd: int, seconds: float, interval: float, asleep: set[int], /) -> None: ...
def spin(fd: int, alarm: int, ns: int, polls_per_yield: int, /) -> int: ...

# --- counts.c ---

@final
class Counts:
    """Twin: ``memory.counts.PythonCounts``."""

    def __new__(cls, address: int, length: int, slot: int, is_alive: Callable[[int], bool]) -> Counts: ...
    def close(self) -> None: ...
    def count_sent(self, number: int, /) -> None: ...
    def count_received(self, number: int, flags: int, /) -> None: ...
    def set_flag(self, number: int, flag: int, /) -> None: ...
    def clear_flag(self, number: int, flag: int, /) -> None: ...
    def state(self, number: int, /) -> int: ...
    def is_current(self, number: int, /) -> bool: ...

# --- block.c ---

@disjoint_base
class BlockFields:
    """Twin: ``memory.block_fields.PythonBlockFields``."""

    kind: int
    fd: int
    users: int
    is_polled: bool
    is_listed_idle: bool
    is_orphaned: bool
    has_content: bool
    number: int
    nbytes: int
    address: int
    used_at: float
    expires_at: float
    kept_storage: Any
    cdata: int | None
    slice_prototypes: Any
    left_memory: Any

    @property
    def num_prototypes(self) -> int: ...
    def find_prototype(self, geometry: _Geometry, /) -> torch.Tensor | None: ...
    def add_prototype(self, geometry: _Geometry, prototype: torch.Tensor, /) -> None: ...
    def clear_prototypes(self) -> None: ...
    def in_use(self) -> bool: ...

def calibrate(block: BlockFields, with_tensor: bool, /) -> None: ...

# --- torch.c ---

def set_torch(
    tensor: type[torch.Tensor], detach: Any, is_neg: Any, requires_grad: Any, use_count: Any, table: Any, /
) -> bool: ...
def learn_dtype(tensor: torch.Tensor, code: int, /) -> bool: ...
def look(tensor: torch.Tensor, /) -> tuple[int, int, int, tuple[int, ...], tuple[int, ...]] | None: ...

# --- poller.c ---

@final
class UsePoller:
    """Twin: ``memory.use_poller.PythonUsePoller``."""

    def __new__(cls, on_idle: Callable[[Any], None]) -> UsePoller: ...
    def add(self, block: BlockFields, /) -> None: ...
    def release(self, block: BlockFields, /) -> None: ...
    def poll(self, new_tensors: int, /) -> None: ...
    def poll_all(self, limit: int, /) -> None: ...
    def clear(self) -> None: ...

# --- memory.c ---

def set_memory(
    lock: StateLock, poller: UsePoller, finalized: deque[Any], drain: Callable[[], None], addresses: dict[int, Any], /
) -> None: ...
def set_lock(lock: StateLock, /) -> None: ...
def set_counts(counts: Counts | None, /) -> None: ...
def register_block(block: BlockFields, /) -> None: ...
def unregister_block(block: BlockFields, /) -> None: ...
def unregister_all() -> None: ...
def hits() -> int: ...

# --- message.c ---

@disjoint_base
class MessageFields:
    """Twin: ``memory.message.PythonMessageFields``."""

    data: bytes
    fds: Sequence[int]
    keep: Sequence[Any]
    numbers: Sequence[int]
    counts_sent: Sequence[Callable[[int], None]]
    nbytes: int
    kind: int
    only_blocks: bool

    def on_send(self) -> None: ...

def set_message(cls: type[MessageFields], /) -> None: ...

# --- outbox.c ---

@disjoint_base
class OutboxFields:
    """Twin: ``transport.outbox.PythonOutboxFields``."""

    endpoint: Any
    sending_thread: int
    submitted: deque[tuple[Any, int]]
    pending: deque[tuple[Any, int]]
    numbered: bool
    number: int
    on_sent: Callable[[int, bytes], None] | None
    promises: Any
    needs_flush: bool
    is_closed: bool
    is_broken: bool

    def send(self, payload: Any, /) -> None: ...

@disjoint_base
class SentFields:
    """Twin: ``memory.promises.PythonSentFields``."""

    sent: set[int]
    recent: set[int]
    words: Sequence[int]
    loss_index: int
    seen_losses: int
    uncertain: set[int]

# --- receive.c ---

@disjoint_base
class KeptFields:
    """Twin: ``memory.promises.PythonKeptFields``."""

    kind: int
    epoch: Any
    is_closed: bool

    def take(self, receive: Callable[[], _Received | None], /) -> _Received | None: ...

@disjoint_base
class AnswerFields:
    """Twin: ``queues.answers.PythonAnswerFields``."""

    receiving: StateLock
    inbox: deque[_Received]
    kept: KeptFields
    receive: Callable[[], _Received | None]
    is_looking: bool

    def take(self) -> _Received | None: ...
    def take_from_socket(self) -> _Received | None: ...

@disjoint_base
class HistoryFields:
    """Twin: ``queues.history.PythonHistoryFields``."""

    last: int
    largest: int
    keep_every: int
    append: Callable[[bytes], None]
    keep: Callable[[], None]
    count: Callable[[], None] | None

    def note_sent(self, number: int, data: bytes, /) -> None: ...

@disjoint_base
class TakerFields:
    """Twin: ``queues.taking.PythonTakerFields``."""

    taking: StateLock
    receive: Callable[[], _Received | None]
    known: set[int]
    busy: set[int]
    closed: str
    room: Any
    address: int
    state: int
    written: int

    def take(self) -> _Received | None: ...
    def idle(self, ident: int, /) -> None: ...
    def answered(self, ident: int, data: bytes, /) -> None: ...

# --- channel.c ---

@final
class SharedWord:
    """See ``peers.shared_words.SharedWords.native_word``. Made of its address and its memory; a call adds one."""

    def close(self) -> None: ...

@disjoint_base
class SenderFields:
    """Twin: ``channels.fast_send.PythonSenderFields``."""

    outbox: OutboxFields
    endpoint: Any
    sent: Callable[[], None]
    closed: SharedWord | None
    open: Any
    write_any: Callable[[Any], Any]
    write_encoded: Callable[[bytes], Any]
    max_payload: int
    is_active: bool

    def try_write(self, obj: Any, /) -> Any: ...

@disjoint_base
class ReceiverFields:
    """Twin: ``channels.fast_receive.PythonReceiverFields``."""

    endpoint: Any
    attempts: Callable[[], None]
    taken: Callable[[], None]
    closed: SharedWord | None
    open_state: Any
    closed_state: Any
    read_any: Callable[[], Any]
    read_received: Callable[[_Received], Any]
    is_active: bool

    def try_read(self) -> Any: ...

# --- move.c ---

def set_move(
    functions: tuple[Any, ...], moving: dict[Any, Any], rings: dict[int, Any], is_free: Callable[[Any], bool], /
) -> bool: ...
def calibrate_move(tensor: torch.Tensor, /) -> None: ...

# --- plain.c ---

@final
class Shape:
    """What ``add_shape`` keeps."""

def add_shape(
    cls: type,
    keys: tuple[str, ...],
    geometries: tuple[_Geometry, ...],
    shifts: tuple[int, ...],
    prefix: bytes,
    key: Any,
    /,
) -> None: ...
def encode_plain(obj: Any, limit: int, /) -> MessageFields | bytes | None: ...
def set_loads(loads: Callable[[bytes], Any], /) -> None: ...
def decode_plain(data: bytes, fds: list[int], /) -> Any: ...
def clear_shapes() -> None: ...

# --- collate.c ---

def collate(samples: list[Any], limit: int, /) -> Any: ...
def set_collate(
    map: dict[Any, Any],
    known: dict[Any, Any],
    modes: tuple[Callable[[], int], Callable[[], int]],
    codes: tuple[int, int],
    functions: tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any], Callable[..., Any]],
    /,
) -> None: ...
