"""A worker of a loader: what it is given, and what it does until the loader is gone.

It follows torch's ``_worker_loop`` step by step where users can see it: seeds, ``get_worker_info``, ``worker_init_fn``,
fetchers, and that a failure is answered and the next index taken. Only how indices come and batches go is different.

Invariants:

* Each index gets exactly one answer, in order.
* A batch travels by value, in shared memory: a tensor goes by reference only if this worker has just collated it, and
  nobody else has it. So whatever the consumer does with a batch, the dataset does not see it. From a thread it goes as
  it is, as it does without workers.
* The worker ends when its connection does, whoever has closed it and however, after the batch that it is at.
"""

from __future__ import annotations

import contextlib
import copy
import dis
import os
import random
import threading
import time
import types
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch

from ..marshalling import codec, exceptions, importable
from ..marshalling.letter import Letter
from ..memory.parcel import Parcel
from ..memory.promises import ONLY_SENDER, SentBlocks
from ..transport.capabilities import SAME_PROCESS
from ..transport.connection import Connection
from ..transport.local import LocalEndpoint
from . import collation, internals, plain
from .counters import ASLEEP, BATCHES, BUSY, CONSUMED, GENERATION, LIMIT, NBYTES, WAITED, Counters
from .messages import Batch, End, Failure, NewEpoch, Snapshot
from .snapshots import GeneratorStates, SnapshotRecorder, set_generators

#: How often a worker that is far enough ahead looks whether it still is before it sleeps.
_SPINS: Final = 10


@dataclass
class LoaderConfig:
    """What all workers of a loader have in common."""

    kind: int
    dataset: Any
    auto_collation: bool
    collate_fn: Any
    drop_last: bool
    base_seed: int
    init_fn: Any
    batch_size: int | None
    #: Whether random numbers go on where they were, too.
    snapshots: bool
    #: After how many of its batches a worker tells from where it would go on; 0 for never.
    every: int
    counters: Counters
    flow: Counters
    #: How many batches a worker may make ahead.
    prefetch: int


@dataclass
class WorkerConfig:
    """What one of them has for itself."""

    worker_id: int
    num_workers: int
    shared_seed: int | None
    resume: Snapshot = field(default_factory=Snapshot)
    #: Whether ``resume`` is the end of an epoch, and another one begins.
    begins: bool = False
    #: For how many of its blocks the loader has room: see Note [in-band promises].
    room: int = 0


class WorkerLoop:
    """The work of one worker."""

    def __init__(self, config: LoaderConfig, own_config: WorkerConfig) -> None:
        self._config = config
        self._own_config = own_config
        self._dataset = config.dataset
        self._fetcher: Any = None
        self._failure: Exception | None = None
        self._ended = False
        self._batches = 0
        self._recorder = SnapshotRecorder(config.kind, config.every, None, copies=False)
        #: From where this epoch began, until the first answer has told it.
        self._before: Snapshot | None = None
        self._limit = 0
        self._made = 0
        self._tasks: deque[Any] = deque()
        self._words = config.counters.of(own_config.worker_id)
        self._flow = config.flow.of(own_config.worker_id)
        self._fence = threading.RLock()
        self._is_thread = False
        self._has_main = False
        self._spins = _SPINS

    def run(self, connection: Connection, *, has_main: bool = False) -> None:
        """Answer until the loader closes the connection. In a process of its own.

        Args:
            has_main: whether the loader's process has the same ``__main__``: it has forked this one.
        """
        self._has_main = has_main
        self._limit = connection.to.max_payload
        outbox = connection.outbox
        outbox.promises = SentBlocks(ONLY_SENDER, self._own_config.room, outbox.send_aside)
        self._connection: Connection | LocalEndpoint = connection
        self._set_up()
        self._work(connection.send)

    def run_in_thread(self, connection: LocalEndpoint) -> None:
        """The same in a thread of the loader's process."""
        self._is_thread = True
        self._spins = 0
        self._connection = connection
        self._set_up_thread()
        self._work(connection.send)

    def _work(self, send: Callable[[Any], None]) -> None:
        words, flow, tasks, prefetch = self._words, self._flow, self._tasks, self._config.prefetch
        since = time.perf_counter_ns()
        try:
            while True:
                if not tasks:
                    self._receive()
                    continue
                task = tasks.popleft()
                if type(task) is NewEpoch:
                    self._begin(task.shared_seed)
                    continue
                generation, index = task
                while True:
                    wanted = generation == flow[GENERATION]
                    made = wanted or (generation >= 0 and self._made < flow[LIMIT])
                    if not made or self._made - flow[CONSUMED] < prefetch:
                        break
                    self._wait_until_consumed()  # after which it may not be wanted any more
                began = time.perf_counter_ns()
                words[WAITED] += began - since
                payload = self._answer(index) if made else self._encode(End())
                del task, index
                send(payload)
                self._made += 1
                since = time.perf_counter_ns()
                words[BUSY] += since - began
                words[BATCHES] += 1
                words[NBYTES] += payload.nbytes if isinstance(payload, Parcel) else _size(payload)
                del payload
        except (EOFError, BrokenPipeError):
            pass  # the loader is gone, or has no use for more

    def _receive(self) -> None:
        received, take = None, self._connection.take
        while received is None:
            received = take() or self._connection.wait(take, None)
        message = codec.decode(*received)
        if type(message) is NewEpoch:
            self._tasks.append(message)
        elif message is not None:
            generation, indices = message
            self._tasks.extend([(generation, index) for index in indices])

    def _wait_until_consumed(self) -> None:
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

    def _set_up(self) -> None:
        config, own_config = self._config, self._own_config
        torch.set_num_threads(1)
        seed = config.base_seed + own_config.worker_id
        random.seed(seed)
        torch.manual_seed(seed)
        np.random.seed(internals.numpy_seed(config.base_seed, own_config.worker_id))
        collation.install(in_thread=False)
        self._dataset = internals.seeded(config.dataset, own_config.shared_seed)
        internals.set_worker_info(own_config.worker_id, own_config.num_workers, seed, self._dataset)
        self._begin_work()

    def _set_up_thread(self) -> None:
        """Threads share the generators of random numbers, and the dataset's data, but not its attributes."""
        config, own_config = self._config, self._own_config
        collation.install(in_thread=True)
        with contextlib.suppress(Exception):
            self._dataset = copy.copy(config.dataset)
        self._dataset = internals.seeded(self._dataset, own_config.shared_seed)
        seed = config.base_seed + own_config.worker_id
        internals.set_worker_info_of_thread(own_config.worker_id, own_config.num_workers, seed, self._dataset)
        self._begin_work()

    def _begin_work(self) -> None:
        config, own_config = self._config, self._own_config
        try:
            if config.init_fn is not None:
                config.init_fn(own_config.worker_id)
            generators = GeneratorStates() if config.snapshots and not self._is_thread else None
            self._recorder = SnapshotRecorder(config.kind, config.every, generators, copies=self._is_thread)
            self._go_on(copy.deepcopy(own_config.resume) if self._is_thread else own_config.resume, own_config.begins)
        except Exception as error:
            self._failure = error

    def _go_on(self, resume: Snapshot, begins: bool) -> None:
        """Be where a worker was; with ``begins``, and begin the next epoch there."""
        if resume.dataset is not None:
            self._dataset.load_state_dict(resume.dataset)
        if not begins or resume.iterator is not None or resume.again:
            self._make_fetcher()
        iterator: Any = getattr(self._fetcher, "dataset_iter", None)
        if resume.iterator is not None:
            iterator.load_state_dict(resume.iterator)
        elif not begins and self._config.kind == internals.ITERABLE and resume.dataset is None:
            # What has no state of its own is iterated again up to where it was.
            if resume.random is None:
                resume.noted = resume.batches
            samples = self._config.batch_size if self._config.auto_collation and self._config.batch_size else 1
            plain.skip(iterator, resume.noted * samples)
        if resume.random is not None and not self._is_thread:
            set_generators(resume.random)
        if not begins or resume.again:
            self._make_again(resume)
        if begins:
            self._make_fetcher()
        self._note_beginning()

    def _make_again(self, resume: Snapshot) -> None:
        """Make and drop what was made after the rest of the snapshot was noted."""
        self._batches = resume.batches
        if resume.ended:
            self._fetcher.ended = True
        indices = resume.again
        if indices is None and self._config.kind == internals.ITERABLE:
            size = self._config.batch_size if self._config.auto_collation else None
            indices = [None if size is None else [None] * size] * (resume.batches - resume.noted)
        for index in indices or ():
            with contextlib.suppress(Exception):  # it was raised, or will be
                self._fetcher.fetch(index)

    def _make_fetcher(self) -> None:
        config = self._config
        self._fetcher = internals.make_fetcher(
            config.kind, self._dataset, config.auto_collation, config.collate_fn, config.drop_last
        )
        self._ended = False
        self._batches = 0

    def _note_beginning(self) -> None:
        self._recorder.begin(self._dataset, self._fetcher)
        self._before = self._recorder.take(self._batches) if self._recorder.watches else None

    def _begin(self, shared_seed: int | None) -> None:
        self._dataset = internals.seeded(self._dataset, shared_seed)
        try:
            self._make_fetcher()
            self._note_beginning()
        except Exception as error:
            self._failure = error

    def _answer(self, index: Any) -> Any:
        if not self._is_thread:
            collation.made.clear()
        try:
            if self._failure is not None:
                failure, self._failure = self._failure, None
                raise failure
            if self._ended:
                raise StopIteration
            data = self._fetcher.fetch(index)
        except StopIteration as stop:
            if self._config.kind == internals.ITERABLE:
                self._ended = True
                return self._encode_noted(End(self._snapshot(), self._beginning()))
            return self._fail(stop, index)
        except Exception as error:
            return self._fail(error, index)
        self._batches += 1
        try:
            notes = self._recorder
            if not notes.watches or (self._before is None and not notes.is_due(self._batches)):
                return self._encode(data)
            after = notes.take(self._batches) if notes.is_due(self._batches) else None
            if after is not None and self._before is None and notes.says_nothing(after):
                return self._encode(data)
            return self._encode_noted(Batch(data, after, self._beginning()))
        except Exception as error:
            return self._fail(error, index)

    def _beginning(self) -> Snapshot | None:
        before, self._before = self._before, None
        return before

    def _snapshot(self) -> Snapshot:
        if self._recorder.watches:
            return self._recorder.take(self._batches)
        return Snapshot(self._batches, ended=bool(getattr(self._fetcher, "ended", False)))

    def _encode_noted(self, answer: Batch | End | Failure) -> Any:
        """An answer with notes; if it is these that cannot be sent, that is for whoever asks for the state."""
        try:
            return self._encode(answer)
        except Exception as error:
            packed = exceptions.pack(error)
            for note in (answer.after, answer.before):
                if note is not None:
                    note.iterator = note.dataset = None
                    note.error = note.error or packed
            return self._encode(answer)

    def _encode(self, answer: Any) -> Any:
        if self._is_thread and self._config.auto_collation:
            return Letter(None, [answer])
        if self._is_thread:  # what the dataset itself may have, and use again
            return codec.encode_one(answer, codec.UNLIMITED, "batch", fresh=(), peer=SAME_PROCESS)
        importable.reader.has_main = self._has_main
        try:
            payload: bytes | Parcel = codec.encode_one(answer, self._limit, "batch", fresh=collation.made)
        finally:
            importable.reader.has_main = False
        return payload

    def _fail(self, error: Exception, index: Any) -> Any:
        after = self._recorder.take(self._batches) if self._recorder.watches else None
        if self._is_thread:
            return Letter(None, [Failure(error, _place(error, index), after, self._beginning())])
        importable.reader.has_main = self._has_main
        try:
            failure = Failure(exceptions.pack(error), _place(error, index), after, self._beginning())
            return codec.encode(failure, self._limit, upvalues=True)
        finally:
            importable.reader.has_main = False


def _size(payload: bytes | Letter) -> int:
    """Bytes of a message that is not a parcel. Of a thread's, which are not copied, those of its tensors."""
    return len(payload) if isinstance(payload, bytes) else nbytes_of(payload.enclosed)


def nbytes_of(batch: Any) -> int:
    """Bytes of the tensors in a batch."""
    if isinstance(batch, torch.Tensor):
        return batch.nbytes
    if isinstance(batch, Batch):
        return nbytes_of(batch.data)
    if isinstance(batch, dict):
        return sum(map(nbytes_of, batch.values()))
    if isinstance(batch, (list, tuple)):
        return sum(map(nbytes_of, batch))
    return 0


def _place(error: BaseException, index: Any) -> str:
    """At which index it has happened: that of the sample, if a frame of torch's fetcher still shows it."""
    traceback, in_fetcher = error.__traceback__, False
    while traceback is not None:
        frame = traceback.tb_frame
        was_in_fetcher, in_fetcher = in_fetcher, frame.f_globals.get("__name__") == "torch.utils.data._utils.fetch"
        if in_fetcher and "idx" in frame.f_locals:
            return f"at index {frame.f_locals['idx']!r}"
        if was_in_fetcher and not in_fetcher:
            # From Python 3.12 on the fetcher's loop has no frame of its own, and its variable is gone.
            return f"at {_asked_for(frame, index)}"
        traceback = traceback.tb_next
    return f"at {describe_index(index)}"


def _asked_for(frame: types.FrameType, index: Any) -> str:
    """Which of the batch's indices the dataset has been asked for, as far as its frame shows it."""
    code = frame.f_code
    if code.co_name == "__getitem__" and code.co_argcount > 1 and isinstance(index, (list, tuple)):
        name = code.co_varnames[1]
        found = frame.f_locals.get(name)
        if any(each is found for each in index) and not _sets(code, name):
            return f"index {found!r}"
    return describe_index(index)


def _sets(code: types.CodeType, name: str) -> bool:
    """Whether the code may give its variable another value."""
    for instruction in dis.get_instructions(code):
        if instruction.opname.startswith(("STORE_", "DELETE_")):
            names = instruction.argval  # of some instructions several
            if name in (names if isinstance(names, tuple) else (names,)):
                return True
    return False


def describe_index(index: Any) -> str:
    """The indices of a batch in a few words."""
    if isinstance(index, (list, tuple)) and index and all(each is None for each in index):
        return f"a batch of {len(index)}"
    if index is None:
        return "a sample"
    text = repr(index)
    if len(text) > 200:
        text = f"{text[:150]} ... {text[-40:]}"
    return f"the batch of indices {text}" if isinstance(index, (list, tuple)) else f"index {text}"
