"""Processes that pass shared tensors on, and a model of what each of them must see.

The test tells *processes*, through one queue for each, what to do with their tensors. A process may also own a queue,
whose handles the test has given to all others: so tensors go from process to process without passing the test. A
process without a queue asks others through a queue that is there for one answer only. A tensor is filled with one
number, which the model knows; whatever was sent, dropped, made and killed since, every process with the tensor must see
that number.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from typing import Any

import numpy as np
import torch

import torchwq
from torchwq.memory import maintenance, pool, received_blocks

WAIT = 30.0
#: What the test does while an answer is in flight.
MEANWHILE = ("nothing", "trim", "maintain", "fork")
#: What a process does between two questions of its.
BETWEEN = ("trim", "nothing")
#: Few, so that blocks are used again; the last is large enough to be mapped privately as an array.
SIZES = (2, 16, 600, 5000)


def run_commands(commands: torchwq.WorkQueue, has_queue: bool) -> None:
    """A process."""
    import contextlib
    import gc
    import queue

    import torch

    import torchwq

    gc.freeze()  # torch's own heap need not be looked through each time
    store: dict[int, Any] = {}
    sources: dict[int, torchwq.WorkQueue] = {}
    asking: Any = None
    with torchwq.workqueue() if has_queue else contextlib.nullcontext() as own:
        commands.write((os.getpid(), own))
        while True:
            what, *args = commands.read()
            answer: Any = None
            if what == "make":
                key, size = args
                store[key] = torch.full((size,), key)
            elif what == "make in place":
                key, size = args
                store[key] = torchwq.empty(size, dtype=torch.int64).fill_(key)
            elif what == "take":
                store[args[0]] = args[1]
            elif what == "give":
                answer = store[args[0]]
            elif what == "drop":
                del store[args[0]]
            elif what == "view":
                store[args[0]] = store[args[0]][1:]
            elif what == "fill":
                store[args[0]].fill_(args[1])
            elif what == "publish":
                own.write((args[0], store[args[0]]))
            elif what == "source":
                sources[args[0]] = args[1]
            elif what == "fetch":
                try:
                    key, tensor = sources[args[0]].read(timeout=10)
                    if args[1]:
                        store[key] = tensor
                    answer = key
                    del tensor
                except torchwq.QueueClosed:
                    answer = None
                except queue.Empty:
                    answer = "nothing"
            elif what == "ask":
                answer = asking = torchwq.workqueue()
            elif what == "reply":
                with args[0] as reply:
                    reply.write((args[1], store[args[1]]))
                del reply
            elif what == "hear":
                answer, tensor = asking.read(timeout=10)
                if args[0]:
                    store[answer] = tensor
                asking.close()
                asking = None
                del tensor
            elif what == "trim":
                gc.collect()
                pool.trim()
                received_blocks.trim()
            elif what == "check":
                overwrite_free_blocks(args[0])
                answer = {key: (int(value.min()), int(value.max())) for key, value in store.items()}
            elif what == "stop":
                return
            args = []
            commands.write(answer)
            answer = None


def overwrite_free_blocks(sizes: tuple[int, ...] = SIZES) -> None:
    """Write over every block of this process that it believes to be free."""
    for size in sizes:
        blocks = [torchwq.empty(size, dtype=torch.int64).fill_(-1) for _ in range(6)]
        del blocks


class ModelProcess:
    def __init__(self, has_queue: bool) -> None:
        self.commands = torchwq.workqueue()
        self.map = torchwq.map(1, run_commands, self.commands, has_queue)
        self.pid, self.own = self.commands.read(timeout=WAIT)
        #: The tensors that it must have, by their keys.
        self.has: set[int] = set()

    def tell(self, *command: Any) -> Any:
        self.commands.write(command)
        return self.commands.read(timeout=WAIT)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        try:
            self.map.join(WAIT)
        except torchwq.WorkerDied:
            pass
        self.close()

    def stop(self) -> None:
        self.commands.write(("stop",))
        self.map.join(WAIT)
        self.close()

    def close(self) -> None:
        if self.own is not None:
            self.own.close()
        self.commands.close()


class ProcessModel:
    """What the test knows to be true. All processes but the last have a queue."""

    def __init__(self, processes: int) -> None:
        self.without_queue = processes - 1
        self.done: Counter[str] = Counter()
        self.next_key = 1000
        #: What each tensor is filled with.
        self.value: dict[int, int] = {}
        #: Keys of arrays, which travel by value: copies do not see each other's changes, so these are not changed.
        self.arrays: set[int] = set()
        self.mine: dict[int, Any] = {}
        #: What is in flight from one process's own queue: (publisher, key).
        self.processes: dict[int, ModelProcess] = {}
        self.published: dict[int, list[int]] = {}
        for name in range(processes):
            self.enter(name)

    def enter(self, name: int) -> None:
        process = self.processes[name] = ModelProcess(name != self.without_queue)
        self.published[name] = []
        for other, each in self.processes.items():
            if other != name:
                if each.own is not None:
                    process.tell("source", other, each.own)
                if process.own is not None:
                    each.tell("source", name, process.own)

    def new_key(self) -> int:
        self.next_key += 1
        self.value[self.next_key] = self.next_key
        return self.next_key

    # Each of these is a step.

    def make(self, name: int | None, size: int, in_place: bool) -> None:
        self.done["make"] += 1
        key = self.new_key()
        if name is None:
            self.mine[key] = torchwq.empty(size, dtype=torch.int64).fill_(key) if in_place else torch.full((size,), key)
        else:
            self.processes[name].tell("make in place" if in_place else "make", key, size)
            self.processes[name].has.add(key)

    def give(self, key: int, name: int) -> None:
        """From the test to a process."""
        self.done["give"] += 1
        self.processes[name].tell("take", key, self.mine[key])
        self.processes[name].has.add(key)

    def give_array(self, size: int, name: int) -> None:
        """By value: the process's copy must not change when the test's does."""
        self.done["give array"] += 1
        key = self.new_key()
        self.arrays.add(key)
        array = np.full(size, key)
        self.processes[name].tell("take", key, array)
        array.fill(-1)
        self.processes[name].has.add(key)

    def collect(self, key: int, name: int, meanwhile: str) -> None:
        """From a process to the test, which retires all the memory it can while the answer is in flight."""
        self.done[f"collect, {meanwhile}"] += 1
        commands = self.processes[name].commands
        commands.write(("give", key))
        if meanwhile == "fork" and self.mine:
            self.fork(max(self.mine))
        elif meanwhile == "trim":
            pool.trim()
            received_blocks.trim()
        elif meanwhile == "maintain":
            for _ in range(3):
                maintenance.run()
        self.mine[key] = commands.read(timeout=WAIT)

    def publish(self, key: int, name: int) -> None:
        """From a process into its own queue."""
        self.done["publish"] += 1
        self.processes[name].tell("publish", key)
        self.published[name].append(key)

    def fetch(self, source: int, name: int, keep: bool) -> None:
        """From a process's own queue to another process."""
        key = self.processes[name].tell("fetch", source, keep)
        assert key == self.published[source].pop(0)
        if keep:
            self.processes[name].has.add(key)
        self.done["fetch"] += 1

    def ask(self, name: int, source: int, key: int, questions: int, between: str, keep: bool) -> None:
        """A process asks another for the same tensor several times, each time through a queue for this one answer."""
        self.done[f"ask, {between}"] += 1
        for left in reversed(range(questions)):
            reply = self.processes[name].tell("ask")
            self.processes[source].tell("reply", reply, key)
            reply.close()
            del reply
            assert self.processes[name].tell("hear", keep and not left) == key
            if between != "nothing" and left:
                self.processes[name].tell(between)
        if keep:
            self.processes[name].has.add(key)

    def drop(self, name: int | None, key: int) -> None:
        self.done["drop"] += 1
        if name is None:
            del self.mine[key]
        else:
            self.processes[name].tell("drop", key)
            self.processes[name].has.discard(key)

    def view(self, name: int, key: int) -> None:
        self.done["view"] += 1
        self.processes[name].tell("view", key)

    def fill(self, name: int, key: int) -> None:
        """Every process with the tensor sees it."""
        if key in self.arrays:
            return
        self.done["fill"] += 1
        self.value[key] += 1_000_000
        self.processes[name].tell("fill", key, self.value[key])

    def kill(self, name: int) -> None:
        """With all that it holds, and all that is in flight from it and to it."""
        self.done["kill"] += 1
        process = self.processes.pop(name)
        orphans = self.published.pop(name)
        process.kill()
        if orphans and self.processes:
            heir = next(iter(self.processes.values()))
            for key in orphans:  # what a dead owner had written can still be read, and its memory is there
                assert heir.tell("fetch", name, True) == key
                heir.has.add(key)
        self.enter(name)

    def fork(self, key: int) -> None:
        """A forked child sees the tensor of its parent, whatever the parent does with its own afterwards."""
        self.done["fork"] += 1
        tensor, expected = self.mine[key], self.value[key]
        ask, answer = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            code = 3
            try:
                os.read(ask[0], 1)
                code = int(not bool((tensor == expected).all()))
            finally:
                os._exit(code)
        del tensor, self.mine[key]
        overwrite_free_blocks()
        os.write(ask[1], b"x")
        _, status = os.waitpid(pid, 0)
        for fd in (*ask, *answer):
            os.close(fd)
        # Someone else may have changed what the key is filled with only before the fork.
        assert os.waitstatus_to_exitcode(status) == 0

    def check(self) -> None:
        """Every held tensor has its content, although all processes write over blocks that they believe are free."""
        overwrite_free_blocks()
        for key, tensor in self.mine.items():
            assert (tensor == self.value[key]).all(), f"the test's {key}: {tensor}, not {self.value[key]}"
        for name, process in self.processes.items():
            seen = process.tell("check", SIZES)
            expected = {key: (self.value[key],) * 2 for key in process.has}
            assert seen == expected, f"process {name} sees {seen}, not {expected}"

    def close(self) -> None:
        self.mine.clear()
        for process in self.processes.values():
            process.stop()
