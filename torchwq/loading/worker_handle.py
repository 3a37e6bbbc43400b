"""One worker as its loader sees it: the indices sent to it, its answers, and the connection to it.

Each worker has a connection of its own, whose other end is in no other process. So the connection ends with the worker.
A worker that is a thread has a connection within this process, which passes the dataset and the batches as they are. So
has one on another machine, as seen from here: its backend carries the messages on.

Invariants:

* A worker answers in order. So a count says which answers are *stale*: the first ``stale`` of those that the consumer
  has not taken are answers that nobody wants any more.
* Only the consumer's thread sends indices and counts answers as ``consumed``. It also receives the answers, unless
  another thread pins them.
* ``received`` is the snapshot after the last answer of this epoch that the consumer's thread has received. A death is
  reported after all answers before it, so it is also the last snapshot before a death. Before the first answer it has
  only the random number generators after the last answer, stale or not, of the epoch before.
* The loader closes its descriptors of the worker's end as soon as the worker has them.
"""

from __future__ import annotations

import contextlib
import pickle
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from ..errors import ResourceError, WorkerDied
from ..marshalling import codec
from ..marshalling.local_message import LocalMessage
from ..marshalling.wire import References
from ..memory.promises import KeptBlocks
from ..transport import descriptors
from ..transport.connection import Connection
from ..transport.endpoint import Endpoint, Received
from ..transport.local import LocalEndpoint
from ..workers.backend import Backend
from ..workers.worker import death_error
from .config import LoaderConfig, WorkerConfig
from .counters import ASLEEP, CONSUMED, GENERATION, LIMIT, LOST
from .messages import Answer, NewEpoch, Snapshot
from .processes import END_TIMEOUT, Process

Start = Callable[[WorkerConfig, Any], Process]
"""Starts a worker with this configuration and this end of the connection."""


def connection_of(end: Endpoint | LocalEndpoint) -> Connection | LocalEndpoint:
    """The connection of an end. An end within this process is a connection itself."""
    return end if isinstance(end, LocalEndpoint) else Connection(end)


#: Wakes a worker, and means nothing else.
_WAKE: Final = pickle.dumps(None)


class WorkerGone(Exception):
    """The connection to a worker has ended."""

    def __init__(self, worker: WorkerHandle) -> None:
        super().__init__(worker.worker_id)
        self.worker = worker


class WorkerHandle:
    """A worker, and after its death the one in its place.

    Args:
        start: starts it.
        worker_config: its own configuration.
        config: what all workers have in common.
        backend: connects it.
    """

    def __init__(self, start: Start, worker_config: WorkerConfig, config: LoaderConfig, backend: Backend) -> None:
        self.worker_id = worker_config.worker_id
        self._connect = backend.connect
        self._peer = backend.peer
        #: Whether no shared words say how many answers the consumer has taken.
        self.is_far = not backend.peer.shares_memory
        #: How many the worker was told of.
        self._told = 0
        self._start = start
        self._worker_config = worker_config
        self._flow = config.flow.of(worker_config.worker_id)
        self._words = config.counters.of(worker_config.worker_id)
        self._prefetch = config.prefetch
        self._fence = threading.RLock()
        #: Held while a thread takes from the connection: the one that receives, or sometimes the reactor's.
        self._receiving = threading.RLock()
        #: Indices for the worker that ``flush`` will send.
        self.unsent: list[Any] = []
        self._generation = 0
        # Indices sent to it; answers received; answers that the consumer has taken.
        self._sent = self._received = self._consumed = 0
        self.stale = 0
        #: False if its part of an iterable dataset has ended in this epoch.
        self.active = True
        #: Its snapshots after the last answer that was handed out, and after the last that was received.
        self.snapshot = self.received = worker_config.resume
        self._open()

    def _open(self) -> None:
        """Start the worker. If that fails, nothing is left open."""
        # The worker starts last: after that, an error would have to end it.
        with contextlib.ExitStack() as opened, contextlib.ExitStack() as passed_on:
            try:
                ours, theirs = self._connect()
                is_local = isinstance(theirs, LocalEndpoint)
                if not is_local:
                    passed_on.callback(theirs.close)
                self.connection = connection_of(ours)
                opened.callback(self.connection.close)
                self._closed = False
                opened.callback(setattr, self, "_closed", True)
                self._kept: KeptBlocks | None = None
                if not is_local:
                    self._kept = KeptBlocks(References, self._flow, LOST, self._receive_asides)
                    opened.callback(self._kept.close)
                    _, self._worker_config.room = self._kept.add_sender()
                self.process: Process = self._start(self._worker_config, theirs)
                self._max_payload = ours.max_payload
            except ResourceError:
                raise
            except OSError as error:
                raise descriptors.resource_error(error) from error
            opened.pop_all()

    def flush(self) -> None:
        """Send it its ``unsent`` indices."""
        if self.unsent:
            unsent, self.unsent = self.unsent, []
            self._sent += len(unsent)
            if self._peer.same_process:  # it would see if the sampler changes its list
                unsent = [index.copy() if type(index) is list else index for index in unsent]
            self.send((self._generation, unsent))

    def consumed(self) -> None:
        """The consumer has taken an answer, so the worker may make one more batch."""
        self._consumed += 1
        with self._fence:
            self._flow[CONSUMED] = self._consumed
        if self._flow[ASLEEP] or (self.is_far and self._sent - self._told > self._prefetch):
            self.send(None)

    def drop_stale(self, answer: Any) -> None:
        """The consumer has taken a stale answer, of which it keeps only the random number generators."""
        self.stale -= 1
        if isinstance(answer, Answer) and answer.after is not None:
            self.received = Snapshot(rng=answer.after.rng)
        self.consumed()

    def abandon_tasks(self, prefetch: int) -> None:
        """Make all answers that have not been taken stale.

        The worker makes the batches of the first ``prefetch`` all the same, as torch's loader has them made. So the
        dataset's random numbers afterwards do not depend on how far the worker had come.
        """
        self.stale = self._sent - self._consumed
        self._flow[LIMIT] = self._consumed + prefetch
        self.unsent.clear()
        self._generation += 1
        self._flow[GENERATION] = self._generation

    def begin_epoch(self, shared_seed: int | None) -> None:
        """Let it iterate anew. ``shared_seed`` is the seed that all workers of a datapipe share."""
        self.snapshot = self.received = Snapshot(rng=self.received.rng)
        self._worker_config.shared_seed = shared_seed
        self.send(NewEpoch(shared_seed))

    def send(self, message: Any) -> None:
        """Send a message; None only wakes the worker. A dead worker is noticed when its answer is waited for."""
        try:
            if isinstance(self.connection, LocalEndpoint) and not self.is_far:
                self.connection.send(LocalMessage(None, [message]))
            elif isinstance(self.connection, LocalEndpoint):
                self._told = self._consumed
                flow = self._consumed, self._flow[GENERATION], self._flow[LIMIT]
                far = flow, message
                self.connection.send(codec.encode_one(far, codec.UNLIMITED, "the sampler's index", peer=self._peer))
            else:
                wakes = message is None
                self.connection.send(
                    _WAKE if wakes else codec.encode_one(message, self._max_payload, "the sampler's index")
                )
        except BrokenPipeError:
            pass

    @property
    def has_answered(self) -> bool:
        """Whether an answer has come from it."""
        return self._received > 0

    @property
    def unreceived(self) -> int:
        """How many answers will still come."""
        return self._sent - self._received

    @property
    def unanswered(self) -> int:
        """For how many indices of this epoch the consumer has not taken the answer."""
        return self._sent - self._consumed - self.stale + len(self.unsent)

    def answer_in(self, received: Received) -> Any:
        """Decode an answer. Raises whatever unpickling raises."""
        answer = codec.decode(*received)
        if self.is_far:
            counts, answer = answer
            for word, count in enumerate(counts):
                self._words[word] = count
        return answer

    def take(self) -> Received | None:
        """The next answer, if it has come. Raises EOFError if none will come."""
        with self._receiving:
            take = self.connection.take
            received = take() if self._kept is None else self._kept.take(take)
            if received is not None:
                self._received += 1
            return received

    def _receive_asides(self) -> None:
        """See ``KeptBlocks``. In the reactor's thread."""
        with self._receiving, contextlib.suppress(OSError, EOFError):  # it has just been closed
            if self._kept is not None and isinstance(self.connection, Connection):
                self._kept.take_control_messages(self.connection.endpoint)

    def wait(self, deadline: float | None) -> Received | None:
        """The next answer; None after ``deadline`` (time.monotonic) and after ``stop_waiting``.

        Raises EOFError if none will come.
        """
        while True:
            received = self.connection.wait(self.take, deadline)
            if received is not None or self._closed or isinstance(self.connection, Connection):
                return received
            if deadline is not None and time.monotonic() >= deadline:  # between threads a wait may end for no reason
                return None

    def stop_waiting(self) -> None:
        """End ``wait``, in any thread. Answers that have come can still be taken."""
        self.connection.stop_waiting()

    def death(self, in_hand: str) -> WorkerDied:
        """The error for the end of the connection. The worker may still be running its exit functions."""
        if not self.process.wait(END_TIMEOUT):
            self.process.kill(signal.SIGKILL)
            self.process.wait(END_TIMEOUT)
        pid, exitcode = self.process.pid, self.process.exitcode
        reason = self.process.reason
        death = death_error(mapid=self.worker_id, pid=pid, exitcode=exitcode, reason=reason, in_hand=in_hand)
        death.args = (f"{_as_torch_says(pid, exitcode)}DataLoader {death}",)
        return death

    def restart(self, indices: Sequence[Any]) -> None:
        """Start a new process in the place of a dead one, to go on where that was.

        Args:
            indices: those of this epoch for which the consumer has not taken an answer, in order.
        """
        self._disconnect()
        worker_config = self._worker_config
        worker_config.begins = worker_config.begins and self.received is worker_config.resume
        worker_config.resume = self.received
        self._flow[CONSUMED] = self._flow[ASLEEP] = self._flow[LIMIT] = self._told = 0
        # The pinning thread may wait for stale answers, too, so the new process gives as many.
        to_consume = self._received - self._consumed
        stale_to_come = max(0, self.stale - to_consume)
        self._sent, self._received, self._consumed = to_consume, to_consume, 0
        self._open()
        if stale_to_come:
            self._sent += stale_to_come
            self.send((-1, [None] * stale_to_come))
        self.unsent = list(indices[max(0, to_consume - self.stale) :])
        self.flush()

    def _disconnect(self) -> None:
        self._closed = True
        self.connection.close()
        if self._kept is not None:
            self._kept.close()

    def close(self) -> None:
        """End the connection, and so the worker. Does not wait for it."""
        if self._closed:
            return
        try:
            while (received := self.take()) is not None:
                codec.discard(*received)
        except (EOFError, OSError):
            pass
        finally:
            self._disconnect()


def _as_torch_says(pid: int | None, exitcode: int | None) -> str:
    """torch's sentence on a dead worker, which programs look for. Source: ``DataLoader.cpp``."""
    if pid is None or exitcode is None:
        return ""
    if exitcode < 0:
        return f"DataLoader worker (pid {pid}) is killed by signal: {signal.strsignal(-exitcode)}. "
    return f"DataLoader worker (pid {pid}) exited unexpectedly with exit code {exitcode}. "
