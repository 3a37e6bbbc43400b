"""The contenders of the queue benchmark: each one worker process that answers every question with the
question.

All of the peers' workers are forked: the fastest start there is, and no difference once they run. Each one
reads, unpickles, pickles and writes one message at a time, as a worker does that has something to do in
between. The raw socket is the limit for anything written in Python: the same pickles and system calls with
nothing around them.
"""

from __future__ import annotations

import multiprocessing
import pickle
import select
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any

import torch.multiprocessing

import torchwq

MB = 1_000_000
FOREVER_S = 100_000.0
FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Case:
    """Messages of one kind, `in_flight` of them at a time."""

    name: str
    message: Any
    in_flight: int

    @property
    def large(self) -> bool:
        return isinstance(self.message, bytes)


@dataclass(frozen=True)
class Peer:
    """A running contender."""

    name: str
    write: Callable[[Any], None]
    read: Callable[[], Any]
    close: Callable[[], None]
    suits: Callable[[Case], bool] = lambda case: True


def answer(read: Callable[[], Any], write: Callable[[Any], None]) -> None:
    """What the worker of every peer does, until it reads None."""
    for question in iter(read, None):
        write(question)


def fork(read: Callable[[], Any], write: Callable[[Any], None]) -> BaseProcess:
    """Starts a worker that answers what it reads."""
    process = FORK.Process(target=answer, args=(read, write), daemon=True)
    process.start()
    return process


# --- torchwq ---


def answer_queue(q: torchwq.WorkQueue) -> None:
    """The same for torchwq, in its own words."""
    for question in q:
        q.write(question)


def open_queue(work: Callable[[torchwq.WorkQueue], None]) -> tuple[torchwq.WorkQueue, Callable[[], None]]:
    """A queue with one worker that runs `work`, and what ends both."""
    q = torchwq.workqueue()
    workers = torchwq.map(1, work, q)

    def close() -> None:
        q.write(None)
        workers.join()
        q.close()

    return q, close


def start_torchwq() -> Peer:
    q, close = open_queue(answer_queue)
    return Peer("torchwq", q.write, q.read, close)


# --- queues in pairs: one for the questions, one for the answers ---


def start_pair(
    name: str, make: Callable[[], Any], suits: Callable[[Case], bool] = lambda case: True, **get: float
) -> Peer:
    """A peer of two queues from `make`; `get` are further arguments for reading from one."""
    questions, answers = make(), make()
    worker = fork(partial(questions.get, **get), answers.put)

    def close() -> None:
        questions.put(None)
        worker.join()
        for each in (questions, answers):
            each.close()

    return Peer(name, questions.put, partial(answers.get, **get) if get else answers.get, close, suits)


def start_faster_fifo() -> Peer | None:
    """faster-fifo's queue, or None where it is not installed."""
    try:
        from faster_fifo import Queue
    except ImportError:
        return None
    # Messages lie in a ring of a fixed size; a get without a timeout gives up after 10 s.
    return start_pair("faster-fifo", partial(Queue, max_size_bytes=16 * MB), timeout=FOREVER_S)


def start_pipe() -> Peer:
    ours, theirs = FORK.Pipe()
    process = fork(theirs.recv, theirs.send)

    def close() -> None:
        ours.send(None)
        process.join()
        ours.close()
        theirs.close()

    return Peer("mp.Pipe", ours.send, ours.recv, close, one_at_a_time_if_large)


def one_at_a_time_if_large(case: Case) -> bool:
    """SimpleQueue.put waits until all is in the pipe: two sides that put large messages never get done."""
    return not case.large or case.in_flight == 1


# --- the limit: a socket with pickles ---


class Packets:
    """Pickles as packets: one system call each way per message, whose limits the kernel keeps."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end

    def write(self, message: Any) -> None:
        self.end.send(pickle.dumps(message, protocol=5))

    def read(self) -> Any:
        return pickle.loads(self.end.recv(65536))


class Frames:
    """Pickles in a stream, a length before each: a packet cannot be larger than the socket's buffer.

    Reads while it writes. Otherwise two sides that both write, with full buffers, would wait for each other.
    """

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self.end = end
        self.arrived: deque[bytearray] = deque()
        self.frame, self.filled, self.in_header = bytearray(8), 0, True

    def write(self, message: Any) -> None:
        body = pickle.dumps(message, protocol=5)
        for part in (len(body).to_bytes(8, "little"), body):
            rest = memoryview(part)
            while rest:
                try:
                    rest = rest[self.end.send(rest) :]
                except BlockingIOError:
                    readable, _, _ = select.select([self.end], [self.end], [])
                    if readable:
                        self.receive()

    def read(self) -> Any:
        while not self.arrived:
            select.select([self.end], [], [])
            self.receive()
        return pickle.loads(self.arrived.popleft())

    def receive(self) -> None:
        """Takes what is there."""
        with suppress(BlockingIOError):
            while count := self.end.recv_into(memoryview(self.frame)[self.filled :]):
                self.filled += count
                if self.filled < len(self.frame):
                    continue
                if self.in_header:
                    self.frame = bytearray(int.from_bytes(self.frame, "little"))
                else:
                    self.arrived.append(self.frame)
                    self.frame = bytearray(8)
                self.filled, self.in_header = 0, not self.in_header


def start_raw_socket(
    kind: socket.SocketKind, link: type[Packets] | type[Frames], suits: Callable[[Case], bool]
) -> Peer:
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    for end in (ours, theirs):
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, option, 4 * MB)  # the system may give less
    owner, other = link(ours), link(theirs)
    worker = fork(other.read, other.write)
    theirs.close()

    def close() -> None:
        owner.write(None)
        worker.join()
        ours.close()

    return Peer("raw socket", owner.write, owner.read, close, suits)


# --- all of them ---


def start_peers() -> list[Peer]:
    """Starts every contender; torchwq as the last, for the workers of the others are forked from here."""
    forked = [
        start_pair("mp.Queue", FORK.Queue),
        start_pair("mp.SimpleQueue", FORK.SimpleQueue, one_at_a_time_if_large),
        start_pipe(),
        start_pair("torch.mp.Queue", torch.multiprocessing.get_context("fork").Queue),
        start_faster_fifo(),
        start_raw_socket(socket.SOCK_SEQPACKET, Packets, lambda case: not case.large),
        start_raw_socket(socket.SOCK_STREAM, Frames, lambda case: case.large),
    ]
    return [start_torchwq(), *(peer for peer in forked if peer is not None)]
