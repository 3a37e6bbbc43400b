"""What other code does in the middle of a call of the native part: torch's functions and finalizers may run any."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

import torchwq
from tests.queues.handles import worker_handle
from torchwq import _native
from torchwq.marshalling.codec import CALL_LIMIT, encode
from torchwq.memory import counts as counts_module
from torchwq.memory import pool, recycling, state_lock, tree_table
from torchwq.memory.message import Message

pytestmark = pytest.mark.skipif(_native.core is None, reason=f"no native part: {_native.status.reason}")


class InTheMiddle(TorchFunctionMode):
    """Calls ``action`` before the first call of torch's function ``name``: another thread or a finalizer may do so."""

    def __init__(self, name: str, action: Callable[[], object]) -> None:
        super().__init__()
        self._name = name
        self._action: Callable[[], object] | None = action

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        assert self._action is None, f"nobody has called {self._name}"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        action = self._action
        if action is not None and getattr(func, "__name__", "") == self._name:
            self._action = None
            with torch._C.DisableTorchFunction():
                action()
        return func(*args, **(kwargs or {}))


def known(tensor: torch.Tensor) -> torch.Tensor:
    """Encode the tensor, so that its shape is known."""
    encode(tensor, CALL_LIMIT)
    return tensor


def test_the_pool_may_drop_a_ring_while_a_tensor_is_moved() -> None:
    size = 1111
    tensor = known(torch.zeros(size, dtype=torch.uint8))
    ring = pool.all_rings[pool.capacity_for(size)][size]
    block = ring.popleft()  # in use: an empty ring is what the pool drops
    assert not ring
    try:
        del ring
        with InTheMiddle("untyped_storage", pool.trim):
            payload = encode(torch.ones(size, dtype=torch.uint8), CALL_LIMIT)
        assert isinstance(payload, Message)
        del tensor
    finally:
        with state_lock.lock:
            recycling.retire(block)


def test_a_block_that_is_retired_meanwhile_is_not_sent_without_its_storage() -> None:
    first = known(torch.arange(8))
    encode([torch.arange(8), torch.zeros(5)], CALL_LIMIT)  # now the shape is known, and a block of the second's size
    block = recycling.block_of(first.untyped_storage())
    assert block is not None

    def retire() -> None:
        with state_lock.lock:
            recycling.retire(block)

    with InTheMiddle("untyped_storage", retire):
        payload = encode([first, torch.ones(5)], CALL_LIMIT)
    assert isinstance(payload, Message)
    assert all(isinstance(each, torch.UntypedStorage) for each in payload.keep)


class Refusing(TorchFunctionMode):
    """Raises an error instead of calling torch's function ``name``."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == self._name:
            raise ValueError("not allowed here")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["is_neg", "untyped_storage"])
def test_an_error_of_torch_names_the_object_that_cannot_be_sent(name: str) -> None:
    with torchwq.workqueue() as queue, worker_handle(queue) as worker:
        queue.write(torch.zeros(3))
        assert worker.read(timeout=10).shape == (3,)
        with Refusing(name), pytest.raises(torchwq.MarshalError, match=r"args\[0\].*not allowed here"):
            queue.write(torch.ones(3))


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_message_that_cannot_be_decoded_leaves_no_descriptors() -> None:
    large, small = encode(torch.zeros(1024), CALL_LIMIT), encode(torch.zeros(16), CALL_LIMIT)
    reference = struct.pack("=QQI", small.numbers[0], 64, 1)
    bad = Message(large.data[: -len(reference)] + reference, small.fds, small.keep, small.kind, small.numbers, True)
    with torchwq.workqueue() as queue, worker_handle(queue) as worker:
        queue._role.send(small)
        assert worker.read(timeout=10).shape == (16,)
        before = num_descriptors()
        for _ in range(3):
            queue._role.send(bad)
            with pytest.raises(RuntimeError, match="storage"):
                worker.read(timeout=10)
        assert num_descriptors() == before


def test_a_table_may_be_closed_while_it_is_asked() -> None:
    def close_and_deny(slot: int) -> bool:
        counts.close()
        return False

    table = tree_table.current()
    assert table is not None
    counts = counts_module.Counts(table._mapping, table.slot, close_and_deny)
    tensor = torch.zeros(3)
    payload = encode(tensor, CALL_LIMIT)
    assert isinstance(payload, Message)
    (number,) = payload.numbers
    table.set_flag(number, counts_module.IN_USE)
    try:
        assert counts.state(number) == counts_module.IN_FLIGHT
    finally:
        table.clear_flag(number, counts_module.IN_USE)


def test_a_wait_that_is_too_long_is_an_error() -> None:
    lock = _native.core.StateLock()
    with ThreadPoolExecutor(1) as pool_of_one:
        pool_of_one.submit(lock.acquire).result()
        for seconds in 1e12, 1e300, float("nan"):
            with pytest.raises(OverflowError):
                lock.acquire(timeout=seconds)
        pool_of_one.submit(lock.release).result()


def test_a_signal_handler_forks_while_its_thread_waits_for_the_lock() -> None:
    """The child's handler returns into the wait, and the child goes on with its own lock."""
    script = """
import os, signal, threading, time
import torch
from torchwq import _native
from torchwq.marshalling.codec import CALL_LIMIT, encode
from torchwq.memory import state_lock

encode(torch.zeros(3), CALL_LIMIT)
is_held, children = threading.Event(), []

def hold():
    with state_lock.lock:
        is_held.set()
        time.sleep(1.0)

def on_signal(*_):
    children.append(os.fork())

signal.signal(signal.SIGALRM, on_signal)
thread = threading.Thread(target=hold)
thread.start()
is_held.wait()
signal.setitimer(signal.ITIMER_REAL, 0.2)
payload = encode(torch.ones(3), CALL_LIMIT)
for _ in range(3):
    encode(torch.ones(3), CALL_LIMIT)
    assert not state_lock.is_locked_by_this_thread()
if children[0]:
    assert os.waitpid(children[0], 0)[1] == 0
    thread.join()
else:
    os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", script], timeout=60, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_reads_in_the_middle_of_reads_fit_on_a_small_stack() -> None:
    """Each level has less on the stack than a message may be long."""
    script = """
import threading
import torchwq

class Nested:
    def __reduce__(self):
        return read_next, ()

def read_next():
    import torchwq
    return torchwq.in_hand.read()[1]

torchwq.in_hand = channel = torchwq.channel()
channel._core.open_to_processes()
channel.write(*(Nested() for _ in range(14)), "the last")
found = []
threading.stack_size(512 * 1024)
thread = threading.Thread(target=lambda: found.append(channel.read()[1]))
thread.start()
thread.join()
assert found == ["the last"]
"""
    done = subprocess.run([sys.executable, "-c", script], timeout=60, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
