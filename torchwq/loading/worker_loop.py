"""The loop of a loader's worker: it answers each index with a batch, until the loader closes the connection.

Invariants:

* Each index gets exactly one answer, in order.
* A batch travels by value, in shared memory: a tensor goes by reference only if this worker has just collated it, so
  that nobody else has it. Whatever the consumer does with a batch, the dataset does not see it. A thread passes the
  batch as it is, as a loader without workers does.
* The worker ends when its connection ends, for whatever reason, after its present batch.
* A worker on another machine shares no words with its loader. Each message to it has the loader's words beside it, and
  each answer its own.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import torch

from ..marshalling import codec, exceptions, importable
from ..marshalling.local_message import LocalMessage
from ..marshalling.value_message import ValueMessage
from ..memory.message import Message
from ..memory.promises import ONLY_SENDER, SentBlocks
from ..transport.capabilities import OTHER_MACHINE, SAME_MACHINE, SAME_PROCESS, Capabilities
from ..transport.connection import Connection
from ..transport.local import LocalEndpoint
from . import collation
from .batch_maker import BatchMaker
from .config import LoaderConfig, WorkerConfig
from .counters import (
    AHEAD,
    ASLEEP,
    AT_WORK,
    BATCHES,
    BUSY,
    CONSUMED,
    CPU,
    GENERATION,
    IDLE,
    LIMIT,
    LOST,
    MADE,
    NBYTES,
    READY,
    SEND,
    TOLD,
    WAITED,
)
from .messages import Answer, Batch, End, Failure, NewEpoch

#: Nanoseconds between two looks at how long the worker was ready to run.
_DELAY_INTERVAL: Final = 20_000_000
#: A worker that is far enough ahead looks so many times whether it still is before it sleeps.
_SPINS: Final = 10


class WorkerLoop:
    """The work of one worker: a process, or, if its connection is within this process, a thread.

    Args:
        config, worker_config: the configuration of all workers, and of this one.
        connection: to the loader.
        peer: what the loader is capable of.
        has_main: whether the loader's process has forked this one, and so has the same ``__main__``.
    """

    def __init__(
        self,
        config: LoaderConfig,
        worker_config: WorkerConfig,
        connection: Connection | LocalEndpoint,
        peer: Capabilities,
        *,
        has_main: bool = False,
    ) -> None:
        self._config = config
        self._connection = connection
        self._has_main = has_main
        self._made = 0
        #: Whether the present answer is a batch.
        self._is_batch = False
        #: When the present answer was begun, and how much processor time had been used then.
        self._began = self._cpu = 0
        self._tasks: deque[Any] = deque()
        self._words = config.counters.of(worker_config.worker_id)
        self._flow = config.flow.of(worker_config.worker_id)
        self._fence = threading.RLock()
        self._in_thread = peer.same_process
        self._is_far = not peer.shares_memory
        self._spins = _SPINS if isinstance(connection, Connection) else 0
        self._limit = connection.outgoing.max_payload if isinstance(connection, Connection) else codec.UNLIMITED
        self._maker = BatchMaker(config, worker_config, self._in_thread, 0 if self._is_far else self._limit)
        if isinstance(connection, Connection):
            outbox = connection.outbox
            outbox.promises = SentBlocks(ONLY_SENDER, worker_config.room, outbox.send_control, self._flow, LOST)

    def run(self) -> None:
        """Answer until the loader closes the connection."""
        self._maker.set_up()
        slow_samples = self._maker.slow_samples
        words, flow, tasks, prefetch = self._words, self._flow, self._tasks, self._config.prefetch
        send: Callable[[Any], None] = self._connection.send
        clock = time.thread_time_ns if self._in_thread else time.process_time_ns
        delay = RunDelay(words)
        flow[AT_WORK] = IDLE
        since = time.perf_counter_ns()
        try:
            while True:
                if not tasks:
                    self._receive()
                    continue
                task = tasks.popleft()
                if type(task) is NewEpoch:
                    self._maker.begin_epoch(task.shared_seed)
                    since = time.perf_counter_ns()  # between epochs nobody wanted anything
                    continue
                generation, index = task
                while True:
                    wanted = generation == flow[GENERATION]
                    made = wanted or (generation >= 0 and self._made < flow[LIMIT])
                    if not made or self._made - flow[CONSUMED] < prefetch:
                        break
                    self._wait_until_consumed()  # meanwhile the loader may abandon the task
                self._began = began = flow[AT_WORK] = time.perf_counter_ns()
                words[WAITED] += began - since
                self._cpu = cpu = clock()
                payload = self._answer(index) if made else self._encode(End())
                del task, index
                nbytes = payload.nbytes if isinstance(payload, (Message, ValueMessage)) else _size(payload)
                sending = time.perf_counter_ns()
                send(payload)
                del payload  # at once: an error in it, which a thread shares with its loader, has the loader's frames
                self._made += 1
                flow[MADE], flow[AT_WORK] = self._made, IDLE
                since = time.perf_counter_ns()
                words[BUSY] += since - began
                words[SEND] += since - sending
                slow_samples.last_batch = sending - began
                words[CPU] += clock() - cpu
                delay.update(since)
                words[BATCHES] += made and self._is_batch
                words[NBYTES] += nbytes
        except (EOFError, BrokenPipeError):
            pass  # the loader has closed the connection, or is dead
        finally:
            flow[AT_WORK] = 0

    def _receive(self) -> None:
        received, take = None, self._connection.take
        while received is None:
            received = take() or self._connection.wait(take, None)
        message = codec.decode(*received)
        if self._is_far:
            flow, message = message
            self._flow[CONSUMED], self._flow[GENERATION], self._flow[LIMIT] = flow
        if type(message) is NewEpoch:
            self._tasks.append(message)
        elif message is not None:
            generation, indices = message
            self._tasks.extend([(generation, index) for index in indices])

    def _wait_until_consumed(self) -> None:
        began = time.perf_counter_ns()
        try:
            self._sleep_until_consumed()
        finally:
            self._words[AHEAD] += time.perf_counter_ns() - began

    def _sleep_until_consumed(self) -> None:
        flow, enough = self._flow, self._made - self._config.prefetch
        for _ in range(self._spins):
            os.sched_yield()
            if flow[CONSUMED] > enough:
                return
        flow[ASLEEP] = 1
        with self._fence:
            pass
        while flow[CONSUMED] <= enough:
            self._receive()
        flow[ASLEEP] = 0

    def _answer(self, index: Any) -> Any:
        """The message that answers an index."""
        answer = None
        if not self._in_thread:
            collation.collated_blocks.clear()
        try:
            answer = self._maker.make(index)
            self._is_batch = type(answer) is not End and type(answer) is not Failure
            return self._encode(answer)
        except Exception as error:
            try:
                return self._encode_without_states(answer, error)
            except Exception as still:
                return self._encode(self._maker.failure(still, index))
        finally:
            del answer  # the traceback of an error in it keeps this frame

    def _encode(self, answer: Any) -> Any:
        if type(answer) is Message:
            return answer  # the native part has collated a batch into it
        if self._in_thread:
            if self._config.auto_collation or type(answer) is Failure:
                return LocalMessage(None, [answer])
            # The dataset may have made it, and use it again.
            return codec.encode_one(answer, codec.UNLIMITED, "batch", owned_blocks=(), peer=SAME_PROCESS)
        if self._is_far:
            if type(answer) is Failure and isinstance(answer.error, BaseException):
                answer.error = exceptions.pack(answer.error, peer=OTHER_MACHINE)
            # The message waits until the loader asks for it, and the dataset may use its memory again meanwhile.
            counted, owned = (self._counts(answer), answer), collation.collated_blocks
            return codec.encode_one(counted, codec.UNLIMITED, "batch", owned_blocks=owned, peer=OTHER_MACHINE)
        importable.reader.has_main = self._has_main
        try:
            if type(answer) is Failure and isinstance(answer.error, BaseException):
                answer.error = exceptions.pack(answer.error)
            return codec.encode_one(answer, self._limit, "batch", owned_blocks=collation.collated_blocks)
        finally:
            importable.reader.has_main = False

    def _counts(self, answer: Any) -> tuple[int, ...]:
        """What the worker's words will be when it has sent the answer."""
        counts = list(self._words[:TOLD])
        counts[BUSY] += time.perf_counter_ns() - self._began
        counts[CPU] += time.process_time_ns() - self._cpu
        counts[BATCHES] += self._is_batch
        counts[NBYTES] += _nbytes_of(answer)
        return tuple(counts)

    def _encode_without_states(self, answer: Any, error: Exception) -> Any:
        """Send the answer without its states, if these cannot be sent. The loader's ``state_dict`` raises ``error``."""
        if not isinstance(answer, Answer):
            raise error
        packed = exceptions.pack(error, peer=OTHER_MACHINE if self._is_far else SAME_MACHINE)
        for snapshot in (answer.after, answer.before):
            if snapshot is not None:
                snapshot.iterator = snapshot.dataset = None
                snapshot.error = snapshot.error or packed
        return self._encode(answer)


class RunDelay:
    """Counts for how long this thread was ready to run while others had the processor, where the system tells (Linux).

    Without it, a worker on a busy machine would look as one that waits for a disk.
    """

    def __init__(self, words: memoryview) -> None:
        self._words = words
        self._next = 0
        try:
            fd = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
        except OSError:
            self._fd = -1
            return
        self._fd = fd
        self._before = self._read()
        weakref.finalize(self, os.close, fd)

    def _read(self) -> int:
        return int(os.pread(self._fd, 100, 0).split()[1])

    def update(self, now: int) -> None:
        """Count, if it is some time since this was done last. ``now``: time.perf_counter_ns."""
        if now < self._next or self._fd < 0:
            return
        self._next = now + _DELAY_INTERVAL
        try:
            after = self._read()
        except (OSError, ValueError, IndexError):
            self._fd = -1
            return
        self._words[READY] += after - self._before
        self._before = after


def _size(payload: bytes | LocalMessage) -> int:
    """Bytes of a pickle; or of the tensors of a thread's message, which are not copied."""
    return len(payload) if isinstance(payload, bytes) else _nbytes_of(payload.objects)


def _nbytes_of(batch: Any) -> int:
    """Bytes of the tensors in a batch."""
    if isinstance(batch, torch.Tensor):
        return batch.nbytes
    if isinstance(batch, Batch):
        return _nbytes_of(batch.data)
    if isinstance(batch, dict):
        return sum(map(_nbytes_of, batch.values()))
    if isinstance(batch, (list, tuple)):
        return sum(map(_nbytes_of, batch))
    return 0
