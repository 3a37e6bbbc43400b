"""One worker as its loader sees it: what it was asked for, what it has answered, and the connection to it.

One connection leads to each worker, and its other end is in no other process: so the connection ends with the worker. A
worker that is a thread has a connection of the same kind within this process, and the dataset and its batches pass as
they are.

Invariants:

* A worker answers in the order in which it was asked. So counting tells which answers are *stale*: the first ``stale``
  of those that the consumer has not taken are answers that nobody wants any more.
* One thread gives a worker its indices and takes its answers off the count (``consumed``): the consumer's. Either that
  thread receives the answers, too, or another one, which pins them.
* ``received`` is the snapshot after the last answer of this epoch that the consumer's thread has received, so also
  after the last one before a death, which it hears of when everything before that has been received. Before the first
  one it says only what the random numbers are after the last answer, stale or not, of the epoch before.
* Whoever starts a worker closes its descriptors of the worker's end as soon as the worker has them.
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
from .config import WorkerConfig
from .counters import ASLEEP, CONSUMED, GENERATION, LIMIT, LOST
from .messages import Answer, NewEpoch, Snapshot
from .processes import END_TIMEOUT, Process

Start = Callable[[WorkerConfig, Any], Process]
"""Starts a worker with this configuration, which gets this end of the connection."""


def connection_of(end: Endpoint | LocalEndpoint) -> Connection | LocalEndpoint:
    """What the loader, and a worker, make of an end. One within this process has all that they need."""
    return end if isinstance(end, LocalEndpoint) else Connection(end)


#: Wakes a worker that is far enough ahead: it says nothing.
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
        worker_config: what it gets for itself.
        flow: the words that govern the flow of its batches, see ``messages``.
        backend: connects it.
    """

    def __init__(self, start: Start, worker_config: WorkerConfig, flow: memoryview, backend: Backend) -> None:
        self.worker_id = worker_config.worker_id
        self._connect = backend.connect
        #: Whether what is sent to it stays in this process.
        self._same_process = backend.peer.same_process
        self._start = start
        self._worker_config = worker_config
        self._flow = flow
        self._fence = threading.RLock()
        #: Held by who takes from the connection: mostly the thread that receives, now and then the reactor's.
        self._receiving = threading.RLock()
        #: Indices that the worker does not know of before ``flush``.
        self.unsent: list[Any] = []
        self._generation = 0
        # Indices that it knows of; answers of these that were received; and that the consumer has taken.
        self._sent = self._received = self._consumed = 0
        self.stale = 0
        #: False if its part of an iterable dataset has come to its end in this epoch.
        self.active = True
        #: From where it would go on after the last answer that was handed out, and that was received.
        self.snapshot = self.received = worker_config.resume
        self._open()

    def _open(self) -> None:
        """Start the worker. If that fails, nothing is left open."""
        # All of it before the worker starts, which has to be ended otherwise; it has its end then.
        with contextlib.ExitStack() as opened, contextlib.ExitStack() as passed_on:
            try:
                ours, theirs = self._connect()
                if not self._same_process:
                    passed_on.callback(theirs.close)
                self.connection = connection_of(ours)
                opened.callback(self.connection.close)
                self._closed = False
                opened.callback(setattr, self, "_closed", True)
                self._kept: KeptBlocks | None = None
                if not self._same_process:
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
        """Send it the indices that it does not know of."""
        if self.unsent:
            unsent, self.unsent = self.unsent, []
            self._sent += len(unsent)
            if self._same_process:  # it would see what the sampler makes of its list
                unsent = [index.copy() if type(index) is list else index for index in unsent]
            self.send((self._generation, unsent))

    def consumed(self) -> None:
        """One more of its answers was taken: it may make one more batch."""
        self._consumed += 1
        with self._fence:
            self._flow[CONSUMED] = self._consumed
        if self._flow[ASLEEP]:
            self.send(None)

    def drop_stale(self, answer: Any) -> None:
        """The answer that was taken is one that nobody wants, but for the random numbers after it."""
        self.stale -= 1
        if isinstance(answer, Answer) and answer.after is not None:
            self.received = Snapshot(rng=answer.after.rng)
        self.consumed()

    def abandon_tasks(self, prefetch: int) -> None:
        """Nobody wants what it was asked for until now. Its answers will come, and are stale.

        It makes the first ``prefetch`` of them all the same, as torch's loader has them made, so that the dataset's
        random numbers afterwards do not depend on how far the worker had come.
        """
        self.stale = self._sent - self._consumed
        self._flow[LIMIT] = self._consumed + prefetch
        self.unsent.clear()
        self._generation += 1
        self._flow[GENERATION] = self._generation

    def begin_epoch(self, shared_seed: int | None) -> None:
        """Let it iterate anew. ``shared_seed`` is the one that all workers of a datapipe have in common."""
        self.snapshot = self.received = Snapshot(rng=self.received.rng)
        self._worker_config.shared_seed = shared_seed
        self.send(NewEpoch(shared_seed))

    def send(self, message: Any) -> None:
        """Send a message; None only wakes it.

        One that is dead does not get it: that shows when its answer is waited for.
        """
        try:
            if isinstance(self.connection, LocalEndpoint):
                self.connection.send(LocalMessage(None, [message]))
            else:
                wakes = message is None
                self.connection.send(
                    _WAKE if wakes else codec.encode_one(message, self._max_payload, "the sampler's index")
                )
        except BrokenPipeError:
            pass

    @property
    def has_answered(self) -> bool:
        """Whether anything has come from it."""
        return self._received > 0

    @property
    def unreceived(self) -> int:
        """How many answers will still come."""
        return self._sent - self._received

    @property
    def unanswered(self) -> int:
        """For how many indices of this epoch the consumer has not taken an answer."""
        return self._sent - self._consumed - self.stale + len(self.unsent)

    def take(self) -> Received | None:
        """The next answer, if it is here. Raises EOFError if none will come."""
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
        """The next answer; None after ``deadline`` (time.monotonic), and if there is none after ``stop_waiting``.

        Raises EOFError if none will come.
        """
        while True:
            received = self.connection.wait(self.take, deadline)
            if received is not None or self._closed or not self._same_process:
                return received
            if deadline is not None and time.monotonic() >= deadline:  # between threads a wait may end for no reason
                return None

    def stop_waiting(self) -> None:
        """End ``wait``, in any thread. What has come can still be taken."""
        self.connection.stop_waiting()

    def death(self, in_hand: str) -> WorkerDied:
        """Why no answer will come. A worker whose connection has ended may still run its exit functions."""
        if not self.process.wait(END_TIMEOUT):
            self.process.kill(signal.SIGKILL)
            self.process.wait(END_TIMEOUT)
        pid, exitcode = self.process.pid, self.process.exitcode
        death = death_error(mapid=self.worker_id, pid=pid, exitcode=exitcode, in_hand=in_hand)
        death.args = (f"{_as_torch_says(pid, exitcode)}DataLoader {death}",)
        return death

    def restart(self, indices: Sequence[Any]) -> None:
        """Put a new process in the place of a dead one, which goes on where that one was.

        Args:
            indices: those of this epoch for which the consumer has not taken an answer, in order.
        """
        self._disconnect()
        worker_config = self._worker_config
        worker_config.begins = worker_config.begins and self.received is worker_config.resume
        worker_config.resume = self.received
        self._flow[CONSUMED] = self._flow[ASLEEP] = self._flow[LIMIT] = 0
        # What nobody wants any more is answered, too: whoever receives counts on it.
        here = self._received - self._consumed
        stale_to_come = max(0, self.stale - here)
        self._sent, self._received, self._consumed = here, here, 0
        self._open()
        if stale_to_come:
            self._sent += stale_to_come
            self.send((-1, [None] * stale_to_come))
        self.unsent = list(indices[max(0, here - self.stale) :])
        self.flush()

    def _disconnect(self) -> None:
        self._closed = True
        self.connection.close()
        if self._kept is not None:
            self._kept.close()

    def close(self) -> None:
        """End the connection, and so the worker; does not wait for it."""
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
    """The sentence of torch's loader about a dead worker, which programs look for. Source: ``DataLoader.cpp``."""
    if pid is None or exitcode is None:
        return ""
    if exitcode < 0:
        return f"DataLoader worker (pid {pid}) is killed by signal: {signal.strsignal(-exitcode)}. "
    return f"DataLoader worker (pid {pid}) exited unexpectedly with exit code {exitcode}. "
