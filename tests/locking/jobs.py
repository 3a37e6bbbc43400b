"""What workers run in the tests of mutexes. Importable, so it travels by name."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import torch

import torchwq
from torchwq.locking.layout import NUM_WAITING


def count(mutex: torchwq.Mutex, shared: torch.Tensor, times: int) -> None:
    for _ in range(times):
        with mutex:
            value = float(shared[0])
            shared[0] = value + 1


def hold_until(mutex: torchwq.Mutex, held: torchwq.Channel, gate: torchwq.Channel) -> None:
    with mutex:
        held.write("held")
        gate.read()


def hold_and_die(mutex: torchwq.Mutex, number: int) -> None:
    mutex.acquire()
    os.kill(os.getpid(), number)


def hold_and_end(mutex: torchwq.Mutex) -> None:
    mutex.acquire()


def rounds(mutex: torchwq.Mutex, shared: torch.Tensor, n: int, times: int, mapid: int) -> list[int]:
    """After each barrier all slots show the same round."""
    positions = []
    for number in range(times):
        shared[mapid] = number
        positions.append(mutex.barrier(n))
        assert bool((shared[:n] >= number).all())
        mutex.barrier(n)
    return positions


def wait_at_barrier(mutex: torchwq.Mutex, n: int) -> Any:
    try:
        return mutex.barrier(n)
    except torchwq.WorkerDied as death:
        return death


def wait_twice(mutex: torchwq.Mutex, n: int) -> Any:
    """Go on with one fewer after a death."""
    try:
        mutex.barrier(n)
    except torchwq.WorkerDied:
        return mutex.barrier(n - 1)
    return "nobody died"


def die(mutex: torchwq.Mutex) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(mutex: torchwq.Mutex) -> None:
    raise ValueError("cannot come")


def end(mutex: torchwq.Mutex) -> None:
    pass


def when_told(gate: torchwq.Channel, end: Any, mutex: torchwq.Mutex) -> None:
    gate.read()
    end(mutex)


def leave_a_thread_at_the_barrier(mutex: torchwq.Mutex, n: int) -> None:
    """End while a daemon thread waits."""
    threading.Thread(target=mutex.barrier, args=(n,), daemon=True).start()
    table = mutex._state.table
    while not table.get_word(table.slot, NUM_WAITING):
        time.sleep(0.01)
