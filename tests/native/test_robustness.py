"""The native part, damaged messages, finalizers in its middle, many threads: it does not crash, and keeps nothing."""

from __future__ import annotations

import gc
import itertools
import os
import pickle
import random
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import torchwq
from tests.queues.handles import worker_handle
from torchwq import _native
from torchwq.marshalling.codec import CALL_LIMIT, encode
from torchwq.marshalling.wire import References
from torchwq.memory import recycling, state_lock, tree_table
from torchwq.memory.message import Message
from torchwq.memory.promises import KeptBlocks
from torchwq.transport import kinds
from torchwq.transport.connection import Connection
from torchwq.transport.descriptors import close_fds
from torchwq.transport.trailer import trailer

pytestmark = pytest.mark.skipif(_native.core is None, reason=f"no native part: {_native.status.reason}")

OBJECTS: dict[str, Callable[[], Any]] = {
    "tuple": lambda: (1, 2.5, "abc"),
    "nested": lambda: {"a": [1, (None, True)], "b": b"xyz"},
    "tensor": lambda: torch.arange(16.0),
    "dict": lambda: {f"key {index}": torch.full((4, 5), index) for index in range(10)},
    "list": lambda: [torch.ones(3), torch.zeros(2, 2, dtype=torch.int64)],
}


def message_of(obj: Any) -> tuple[bytes, Any]:
    """A message's bytes, and what keeps its blocks alive."""
    payload = encode(obj, CALL_LIMIT)
    return (payload, None) if isinstance(payload, bytes) else (payload.data + trailer(0, payload.kind), payload)


# Damaged messages


def damaged(data: bytes, dice: random.Random) -> bytes:
    """The message with some bytes changed, cut out, doubled, or with a number in it that is an extreme."""
    changed = bytearray(data)
    for _ in range(dice.choice([1, 1, 2, 8])):
        at = dice.randrange(len(changed)) if changed else 0
        kind = dice.randrange(5)
        if kind == 0 and changed:
            changed[at] = dice.randrange(256)
        elif kind == 1:
            del changed[at : at + dice.randrange(1, 20)]
        elif kind == 2:
            changed[at:at] = changed[at : at + dice.randrange(1, 20)]
        elif kind == 3:
            extreme = dice.choice([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1])
            end = len(changed) - dice.choice([9, 13, 21, 29, 37])  # where the tail has numbers
            if end >= 0:
                changed[end : end + 8] = extreme.to_bytes(8, "little")[: len(changed) - end]
        elif changed:
            changed[-1] = dice.choice([1, 1, 0, ord("."), 2, 255])
    return bytes(changed)


def decode_natively(data: bytes, kept: KeptBlocks) -> bool:
    """Take and decode a message that may be damaged. Returns whether the native part has decoded it, or refused to."""
    messages = iter([(data, [])])
    received = kept.take(lambda: next(messages, None))
    if received is None or not data or data[-1] != 1:  # unpickling damaged bytes may do anything
        return False
    _native.core.decode_plain(*received)
    return True


def fuzz(count: int, seed: int) -> None:
    messages = [message_of(make()) for make in OBJECTS.values()]
    dice = random.Random(seed)
    kept = KeptBlocks(References, [0])
    decoded = 0
    while decoded < count:
        try:
            decoded += decode_natively(damaged(dice.choice(messages)[0], dice), kept)
        except (RuntimeError, ValueError, TypeError, OverflowError, MemoryError, IndexError, struct.error):
            decoded += 1
    with state_lock.lock:  # some were counted as received that nobody has sent
        for _, payload in messages:
            for number in [] if payload is None else payload.numbers:
                recycling.retire(recycling.by_number[number])


def test_damaged_messages_do_no_harm() -> None:
    fuzz(20_000, 1)
    tensor = torch.arange(16.0)
    data, payload = message_of(tensor)
    payload.on_send()
    assert _native.core.decode_plain(data, []).tolist() == tensor.tolist()


@pytest.mark.soak
def test_a_million_damaged_messages_do_no_harm() -> None:
    for seed in range(50):
        fuzz(20_000, seed)


#: Between them they have every opcode that the native part knows.
PICKLED: list[Any] = [
    (1, 2.5, "abc"),
    {"a": [1, (None, True)], "b": b"xyz"},
    [0, 255, 256, 65_535, 65_536, -1, -(2**31), 2**31, 2**62, -(2**63), False, 0.0, "é" * 5, "x" * 300, b"y" * 300],
    [(), [], {}, (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [5], {6: 7}, {8: 9, (10,): 11}],
    [[["again"] * 3, "again"], {"again": [["again"]]}],
]


class LeftToPickle(Exception):
    """The native part has asked pickle to read a message."""


@pytest.fixture
def without_pickle() -> Iterator[None]:
    """What is left to pickle raises LeftToPickle: for pickle, damaged bytes are any program."""

    def refuse(data: bytes) -> Any:
        raise LeftToPickle

    _native.core.set_loads(refuse)
    yield
    _native.core.set_loads(pickle.loads)


def fuzz_pickles(count: int, seed: int) -> int:
    """Give the native part damaged pickles. Returns how many it has read, each as pickle reads it."""
    pickles = [pickle.dumps(obj, 5) for obj in PICKLED]
    dice = random.Random(seed)
    read = 0
    for _ in range(count):
        data = damaged(dice.choice(pickles), dice) + b"."
        try:
            found = _native.core.decode_plain(data, [])
        except LeftToPickle:
            continue
        assert repr(found) == repr(pickle.loads(data)), data  # it has read it to the end: nothing in it harms
        read += 1
    return read


@pytest.mark.usefixtures("without_pickle")
def test_damaged_messages_without_tensors_do_no_harm() -> None:
    for obj in PICKLED:
        assert repr(_native.core.decode_plain(pickle.dumps(obj, 5), [])) == repr(obj)
    assert fuzz_pickles(20_000, 1) > 1000


@pytest.mark.soak
@pytest.mark.usefixtures("without_pickle")
def test_a_million_damaged_messages_without_tensors_do_no_harm() -> None:
    print(sum(fuzz_pickles(20_000, seed) for seed in range(50)), "of a million were read by the native part")


#: These tell the native part about torch and the other rooms, once.
SET_UP = ("set_", "clear_", "calibrate", "learn_", "add_", "register_", "unregister_")


def test_functions_refuse_arguments_that_make_no_sense() -> None:
    core = _native.core
    bad = [None, 3, -1, 2**70, "x", b"", (), [], {}, object(), torch.ones(2)]
    names = [name for name in dir(core) if callable(getattr(core, name)) and not name.startswith("_")]
    changing = {name for name in names if name.startswith(SET_UP)}
    for name in sorted(set(names) - changing):
        for args in itertools.chain([()], ((one,) for one in bad), itertools.product(bad, bad)):
            try:
                getattr(core, name)(*args)
            except Exception as error:
                assert not isinstance(error, SystemError), (name, args)


def test_objects_that_are_not_complete_say_so() -> None:
    for name, methods in {
        "AnswerFields": ["take", "take_from_socket"],
        "TakerFields": ["take"],
        "BlockFields": ["in_use"],
        "ReceiverFields": ["try_read"],
    }.items():
        for method in methods:
            with pytest.raises(RuntimeError):
                getattr(getattr(_native.core, name)(), method)()
    with pytest.raises(RuntimeError):
        _native.core.SenderFields().try_write(1)
    with pytest.raises(TypeError):
        _native.core.HistoryFields().note_sent(1, b"")
    with pytest.raises(EOFError):
        closed = _native.core.SeqpacketCalls()
        closed.fd = -1
        closed.try_receive()


# Nothing is kept


def pass_on(connections: tuple[Connection, Connection], obj: Any) -> Any:
    """Send an object over a connection, and read it."""
    connections[0].send(encode(obj, CALL_LIMIT))
    received = connections[1].take()
    assert received is not None
    data, fds = received
    found = _native.core.decode_plain(data, fds)
    close_fds(fds)
    return found


@pytest.fixture
def connections() -> Iterator[tuple[Connection, Connection]]:
    ours, theirs = kinds.pair()
    one, other = Connection(ours), Connection(theirs)
    yield one, other
    one.close()
    other.close()


def growth(pass_on: Callable[[], object], count: int) -> int:
    """By how many memory blocks of Python the process has grown after so many messages."""
    for _ in range(500):
        pass_on()
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(count):
        pass_on()
    gc.collect()
    return sys.getallocatedblocks() - before


@pytest.mark.parametrize("kind", OBJECTS)
def test_messages_leave_no_references_behind(kind: str, connections: tuple[Connection, Connection]) -> None:
    assert growth(lambda: pass_on(connections, OBJECTS[kind]()), 2000) < 200


@pytest.mark.soak
@pytest.mark.parametrize("kind", OBJECTS)
def test_a_million_messages_leave_no_references_behind(kind: str, connections: tuple[Connection, Connection]) -> None:
    assert growth(lambda: pass_on(connections, OBJECTS[kind]()), 1_000_000) < 1000


def growth_of_channel(kind: str, count: int) -> int:
    """The same with a channel, as it is between processes."""
    with torchwq.channel() as channel:
        channel._core.open_to_processes()

        def pass_through() -> None:
            channel.write(OBJECTS[kind]())
            channel.read(True)

        return growth(pass_through, count)


@pytest.mark.parametrize("kind", OBJECTS)
def test_items_of_a_channel_leave_no_references_behind(kind: str) -> None:
    assert growth_of_channel(kind, 2000) < 200


@pytest.mark.soak
@pytest.mark.parametrize("kind", OBJECTS)
def test_a_million_items_of_a_channel_leave_no_references_behind(kind: str) -> None:
    assert growth_of_channel(kind, 1_000_000) < 1000


def test_objects_in_messages_keep_their_reference_counts(connections: tuple[Connection, Connection]) -> None:
    tensor = torch.arange(16.0)
    held = {"a": tensor, "b": torch.ones(3)}
    nested = ["x" * 9, {"k" * 9: ("x" * 8, None, True, 10**9)}]
    inside = [*nested, *nested[1], *nested[1].values(), *nested[1]["k" * 9]]
    pass_on(connections, held)
    watched = [tensor, held, held["b"], nested, *inside, torch.Tensor, None, True]
    before = [sys.getrefcount(each) for each in watched]
    for _ in range(50):
        pass_on(connections, held)
        pass_on(connections, tensor)
        pass_on(connections, nested)
    after = [sys.getrefcount(each) for each in watched]
    changes = [a - b for a, b in zip(after, before, strict=True)]
    assert changes[: 4 + 4] == [0] * 8
    assert all(abs(change) < 20 for change in changes[8:])


# In the middle


class Cycle:
    """Garbage whose finalizer runs where the collector does, which in C code is at any allocation (before 3.12)."""

    def __init__(self, action: Callable[[], object]) -> None:
        self.itself = self
        self.action = action

    def __del__(self) -> None:
        self.action()


@pytest.mark.parametrize("kind", OBJECTS)
def test_a_finalizer_in_the_middle_of_writing_and_reading_writes_and_reads(kind: str) -> None:
    got: list[Any] = []
    written = itertools.count()

    def in_the_middle() -> None:
        queue.write(("finalizer", next(written)))
        found = worker.read(True)
        if found is not None:
            got.append(found)

    with torchwq.workqueue() as queue, worker_handle(queue) as worker:
        threshold = gc.get_threshold()
        gc.set_threshold(1)
        try:
            for _ in range(300):
                Cycle(in_the_middle)
                queue.write(OBJECTS[kind]())
                found = worker.read(timeout=10)
                got.append(found)
        finally:
            gc.set_threshold(*threshold)
        gc.collect()
        while (found := worker.read(True)) is not None:
            got.append(found)
    of_finalizers = [each for each in got if isinstance(each, tuple) and each[:1] == ("finalizer",)]
    assert sorted(number for _, number in of_finalizers) == list(range(next(written)))
    assert len(got) == 300 + len(of_finalizers)
    assert len(of_finalizers) > 100


@pytest.mark.parametrize("kind", OBJECTS)
def test_threads_at_one_end_get_each_message_once(kind: str, connections: tuple[Connection, Connection]) -> None:
    count, taken = 400, []
    lock = threading.Lock()

    def write(turn: int) -> None:
        connections[0].send(encode((turn, "number"), CALL_LIMIT))
        connections[0].send(encode(OBJECTS[kind](), CALL_LIMIT))

    def read() -> None:
        while True:
            received = connections[1].take()
            if received is None:
                with lock:
                    if len(taken) == 2 * count:
                        return
                time.sleep(0)
                continue
            found = _native.core.decode_plain(*received)
            close_fds(received[1])
            with lock:
                taken.append(found)

    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        list(pool.map(write, range(count)))
        for each in readers:
            each.result(timeout=30)
    numbers = sorted(each[0] for each in taken if isinstance(each, tuple) and each[1:] == ("number",))
    assert numbers == list(range(count))


def test_the_lock_is_reentrant_and_one_threads() -> None:
    lock = _native.core.StateLock()
    with lock, lock:
        assert lock._is_owned()
        other: list[Any] = []
        thread = threading.Thread(target=lambda: other.extend([lock.acquire(False), lock.acquire(timeout=0.05)]))
        thread.start()
        thread.join()
        assert other == [False, False]
        with pytest.raises(RuntimeError), ThreadPoolExecutor(1) as pool:
            pool.submit(lock.release).result()
    assert not lock._is_owned()
    total = 0

    def add() -> None:
        nonlocal total
        for _ in range(2000):
            with lock:
                before = total
                os.sched_yield()
                total = before + 1

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert total == 8000


def test_a_message_counts_its_references_where_there_is_no_table_yet() -> None:
    payload = encode(torch.ones(7), CALL_LIMIT)
    assert isinstance(payload, Message)
    table = tree_table.current()
    assert table is not None
    _native.core.set_counts(None)
    try:
        payload.on_send()
    finally:
        tree_table.use(table)
    assert table.state(payload.numbers[0]) == 3, "in flight"
    payload.on_send_failed()
