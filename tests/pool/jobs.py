"""Functions for the workers of these tests. Their module can be imported, so they travel by name."""

from __future__ import annotations

import os
import signal
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch

import torchwq

_state = "as imported"


def wait_for(flag: torch.Tensor, index: int = 0) -> None:
    while not flag[index]:
        time.sleep(0.001)


def square(number: int) -> int:
    return number * number


def take_all(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


def gated(gate: torch.Tensor, result: Any = "done", started: torch.Tensor | None = None) -> Any:
    if started is not None:
        started[0] += 1
    wait_for(gate)
    return result


def meet(here: torch.Tensor, place: int) -> tuple[int, int]:
    """Returns when a worker is at each place: they must run at the same time."""
    here[place] = 1
    while not bool(here.all()):
        time.sleep(0.001)
    return os.getpid(), threading.get_ident()


#: ``note`` calls this.
note_done: Callable[[list[int]], Any] = list


def note(number: int) -> int:
    note_done([number])
    return number


def count_up(number: int) -> int:
    count = 0
    while count < number:
        count += 1
    return count


def fail(text: str) -> None:
    raise ZeroDivisionError(text)


def die(gate: torch.Tensor | None = None) -> None:
    if gate is not None:
        wait_for(gate)
    os.kill(os.getpid(), signal.SIGKILL)


def leave(status: int) -> None:
    raise SystemExit(status)


_kept: list[Any] = []


def keep(item: Any) -> Any:
    """Returns what it also keeps; see ``kept``."""
    _kept.append(item)
    return item


def kept() -> list[Any]:
    """Returns what ``keep`` has got, and forgets it."""
    found, _kept[:] = list(_kept), []
    return found


def are_same(first: Any, *, second: Any) -> bool:
    return first is second


#: The tensors that ``give_watched`` has made.
watched: list[weakref.ref[torch.Tensor]] = []


def give_watched() -> torch.Tensor:
    tensor = torch.zeros(3)
    watched.append(weakref.ref(tensor))
    return tensor


#: What ``Named`` calls when it is asked for its name.
on_name: Callable[[], None] = dict


class Named:
    """A task whose name is the result of a call."""

    def __call__(self) -> str:
        return "called"

    def __getattr__(self, name: str) -> Any:
        if name == "__qualname__":
            on_name()
        raise AttributeError(name)


def give_lock() -> Any:
    return {"held": threading.Lock()}


class NotRead:
    def __reduce__(self) -> Any:
        return not_read, ()


def not_read() -> None:
    raise LookupError("cannot be rebuilt here")


def give_unreadable() -> Any:
    return NotRead()


def fill(tensor: torch.Tensor, value: int) -> torch.Tensor:
    return tensor.fill_(value)


def set_up(runs: torch.Tensor, state: str) -> None:
    global _state
    info = torchwq.worker_info()
    assert info is not None
    runs[info.mapid] += 1
    _state = state


def state() -> str:
    return _state


def fail_to_set_up() -> None:
    raise LookupError("the database is not there")


def die_in_set_up() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def info() -> Any:
    return torchwq.worker_info()


def info_and_meet(here: torch.Tensor, place: int) -> Any:
    meet(here, place)
    return torchwq.worker_info()


def square_in_a_pool(number: int) -> int:
    with torchwq.BackgroundTaskPool(1) as pool:
        return pool.submit(square, number).result()
