"""Functions for the workers of these tests. Their module can be imported, so they travel by name."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from typing import Any

import numpy as np
import torch

import torchwq


def wait_for(flag: torch.Tensor, index: int = 0) -> None:
    """Wait, in a worker, until the owner or another worker has set ``flag[index]``."""
    while not flag[index]:
        time.sleep(0.001)


# --- the mapid rule: each function returns its arguments ---


def nothing() -> str:
    return "nothing"


def one_more(a: Any, k: Any) -> Any:
    return a, k


def one_more_positional_only(a: Any, k: Any, /) -> Any:
    return a, k


def star(*args: Any) -> Any:
    return args


def mapid_last(a: Any, mapid: int) -> Any:
    return a, mapid


def mapid_default(a: Any, mapid: int = -1) -> Any:
    return a, mapid


def mapid_after_default(a: Any, b: Any = "b", mapid: int = -1) -> Any:
    return a, b, mapid


def mapid_keyword_only(a: Any, *, mapid: int) -> Any:
    return a, mapid


def mapid_keyword_only_default(a: Any, *, mapid: int = -1) -> Any:
    return a, mapid


def other_default(a: Any, k: Any = "default") -> Any:
    return a, k


def keywords(a: Any, **rest: Any) -> Any:
    return a, rest


def two_more(a: Any, b: Any, c: Any) -> Any:
    return a, b, c


class Adder:
    def __init__(self, base: int) -> None:
        self.base = base

    def __call__(self, mapid: int) -> int:
        return self.base + mapid

    def method(self, k: int) -> int:
        return self.base * 10 + k

    @classmethod
    def of_class(cls, k: int) -> tuple[str, int]:
        return cls.__name__, k

    @staticmethod
    def static(k: int) -> int:
        return k * 2


# --- order, errors, ends ---


def in_reverse(ended: torch.Tensor, mapid: int) -> int:
    """Ends only when the worker after it has."""
    if mapid + 1 < len(ended):
        wait_for(ended, mapid + 1)
    ended[mapid] = 1
    return mapid * 10


def gated(gate: torch.Tensor, mapid: int) -> int:
    wait_for(gate)
    return mapid


def announced(gate: torch.Tensor, started: torch.Tensor, mapid: int) -> int:
    started[mapid] = 1
    wait_for(gate)
    return mapid


class Refused(Exception):
    """An exception with a field of its own."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text, code)
        self.code = code


class NotRebuilt(Exception):
    """Cannot be unpickled: its constructor wants more than its args."""

    def __init__(self, text: str, needed: int) -> None:
        super().__init__(text)
        self.needed = needed


class NotPickled(Exception):
    """Cannot even be pickled."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class NoText(Exception):
    def __str__(self) -> str:
        raise ValueError("this exception has no text")


def fail_with(kind: str) -> None:
    if kind == "refused":
        raise Refused("no", 42)
    if kind == "not rebuilt":
        raise NotRebuilt("the original text", 1)
    if kind == "not pickled":
        raise NotPickled("the original text")
    if kind == "no text":
        raise NoText
    if kind == "local":

        class Local(ValueError):
            pass

        raise Local("of a function")
    if kind == "tensor":
        raise Refused("a tensor", torch.arange(3))  # type: ignore[arg-type]
    if kind == "array":
        raise Refused("an array", np.ones(1_000_000))  # type: ignore[arg-type]
    if kind == "long":
        raise ValueError("x" * 1_000_000)
    if kind == "chained":
        try:
            raise KeyError("the reason")
        except KeyError as error:
            raise RuntimeError("the consequence") from error
    if kind == "interrupt":
        raise KeyboardInterrupt


def fail_if(bad: tuple[int, ...], mapid: int) -> int:
    if mapid in bad:
        raise_deeply(mapid)
    return mapid


def raise_deeply(mapid: int) -> None:
    errors = [ZeroDivisionError, KeyError, OSError]
    raise errors[mapid % 3](f"worker {mapid} failed")


def fail_or_wait(gate: torch.Tensor, ended: torch.Tensor, bad: tuple[int, ...], mapid: int) -> int:
    """Those in ``bad`` fail at once, the others wait for the gate."""
    if mapid in bad:
        raise_deeply(mapid)
    wait_for(gate)
    ended[mapid] = 1
    return mapid


def end_by(how: str, mapid: int = 0) -> str:
    if how.startswith("SIG"):
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        os.kill(os.getpid(), getattr(signal, how))
        time.sleep(60)
    elif how.startswith("_exit"):
        os._exit(int(how[5:]))
    elif how == "exit text":
        sys.exit("the last words")
    elif how == "exit":
        sys.exit()
    else:
        sys.exit(int(how[4:]))
    return "not reached"


def die_or_wait(gate: torch.Tensor, pids: torch.Tensor, mapid: int) -> int:
    pids[mapid] = os.getpid()
    wait_for(gate)
    return mapid


def exit_in_thread(ended: torch.Tensor) -> str:
    """A thread that is no daemon is waited for, as an interpreter does."""

    def later() -> None:
        time.sleep(0.2)
        ended[0] = 1

    threading.Thread(target=later).start()
    return "returned"


def read_all(queue: torchwq.WorkQueue, started: torch.Tensor, mapid: int) -> None:
    started[mapid] = 1
    while True:
        queue.read()


def answer_one(queue: torchwq.WorkQueue, started: torch.Tensor, mapid: int) -> int:
    started[mapid] = 1
    queue.write(queue.read())
    return mapid


def double_questions(queue: torchwq.WorkQueue) -> int:
    count = 0
    for question in queue:
        queue.write(question * 2)
        count += 1
    return count


# --- results ---


def give(kind: str) -> Any:
    if kind == "lock":
        return {"hooks": [None, threading.Lock()]}
    if kind == "generator":
        return (number for number in range(3))
    if kind == "closure":
        data = list(range(1000))
        return lambda: data
    if kind == "big":
        return bytes(20_000_000)
    if kind == "none":
        return None
    raise AssertionError(kind)


class NotRead:
    """Can be pickled, not unpickled."""

    def __reduce__(self) -> Any:
        return not_read, ()


def not_read() -> None:
    raise LookupError("cannot be rebuilt here")


def give_unreadable(bad: int, mapid: int) -> Any:
    return NotRead() if mapid == bad else mapid


def give_tensor(ready: torch.Tensor, gate: torch.Tensor, mapid: int) -> torch.Tensor:
    return torch.full((3,), mapid)


def set_and_return(tensor: torch.Tensor, mapid: int) -> torch.Tensor:
    tensor[mapid] = mapid + 1
    return tensor


def set_flag(flag: torch.Tensor) -> None:
    flag[0] = 1


def flag_at_gate(gate: torch.Tensor, flag: torch.Tensor) -> None:
    wait_for(gate)
    flag[0] = 1


# --- worker_info ---


def who_am_i() -> Any:
    return torchwq.worker_info()


def random_numbers() -> tuple[int, int, int, int]:
    info = torchwq.worker_info()
    assert info is not None
    return (
        torch.initial_seed() - info.seed,
        int(torch.randint(2**31, ()).item()),
        random.getrandbits(31),
        int(np.random.randint(2**31)),
    )


def speak(mapid: int) -> None:
    print(f"worker {mapid} to stdout")
    print(f"worker {mapid} to stderr", file=sys.stderr)
    os.write(1, f"worker {mapid} to descriptor 1\n".encode())


def threads() -> int:
    return torch.get_num_threads()


def interrupted(gate: torch.Tensor, pids: torch.Tensor) -> str:
    pids[0] = os.getpid()
    wait_for(gate)
    return "went on"


# --- workers of workers ---


def answer_by_name(name: str, gate: torch.Tensor, outer: int, mapid: int) -> tuple[int, int, bool]:
    with torchwq.workqueue(name) as queue:
        queue.write((queue.read(), outer, mapid))
        wait_for(gate)  # a queue whose workers have all gone tells its owner so
        return outer, mapid, queue.creator


def nested(name: str, gate: torch.Tensor, mapid: int) -> list[tuple[int, int, bool]]:
    return torchwq.map(2, answer_by_name, name, gate, mapid).join()


def own_queue(mapid: int) -> list[int]:
    """A worker that owns a queue and has workers that read from it."""
    with torchwq.workqueue() as queue:
        workers = torchwq.map(2, double_questions, queue)
        queue.write(*range(10 * mapid, 10 * mapid + 5))
        answers = sorted(queue.read() for _ in range(5))
        queue.write(None, None)
        assert sum(workers.join()) == 5
    return answers


def nested_failure() -> None:
    torchwq.map(3, fail_if, (1,)).join()


def leave_workers(pids: torch.Tensor, gate: torch.Tensor) -> None:
    """Starts two workers that would wait for ever, and waits itself."""
    torchwq.map(2, die_or_wait, gate, pids)
    wait_for(gate)


def return_with_workers(pids: torch.Tensor, gate: torch.Tensor) -> str:
    """Starts two workers that would wait for ever, and returns."""
    torchwq.map(2, die_or_wait, gate, pids)
    while not bool(pids.all()):
        time.sleep(0.001)
    return "returned"
