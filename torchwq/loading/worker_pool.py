"""Workers of a loader: how they are started, talked to, watched and ended.

Two ways to start a process. *Forked*, by multiprocessing, where torch would fork: the worker has the dataset as it is,
with open files, locks and database handles. *Served*, by torchwq's warm fork server, where torch would spawn: the
worker begins clean, and what it needs is marshalled once for all of them, tensors by reference. Either way one
connection leads to it, and its other end is in no other process: so the connection ends with the worker. A worker that
is a thread has a connection of the same kind within this process, and the dataset and its batches pass as they are.

Invariants:

* The descriptors of a worker's end are closed here as soon as the worker has them, before the next one is started.
* ``end`` never leaves a process behind, and waits for one at most ``END_TIMEOUT`` seconds before it uses force.
* A worker that still works when its loader lets go finishes what it is at: only this side ends it. A forked one whose
  owner has *died* ends by itself, within ``_GRACE`` (``_end_with_owner``); a served one is killed by the fork server.
* One thread gives a worker its indices. Either that thread receives its answers, or another one, which pins them. The
  one that receives sees to it that the worker knows of what it waits for. So both send indices: what has not been sent
  is taken, counted and sent in one piece, under the worker's lock, or the worker would get indices out of order.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import pickle
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch.multiprocessing

from ..errors import ResourceError, WorkerDied
from ..marshalling import codec, definitions, exceptions, reducers
from ..marshalling.letter import Letter
from ..marshalling.wire import References
from ..memory import limits, recycling
from ..memory.anonymous import Descriptor, exhausted
from ..memory.promises import KeptBlocks
from ..transport import descriptors, kinds
from ..transport.connection import Connection
from ..transport.descriptors import close_fds
from ..transport.endpoint import Endpoint, Received
from ..transport.local import LocalEndpoint
from ..workers import child, deaths, greenlets, starting
from ..workers.backend import Backend
from ..workers.worker import Worker
from .counters import ASLEEP, CONSUMED, GENERATION, LIMIT
from .messages import Failure
from .processes import Forked, Process, Served
from .worker_loop import LoaderConfig, WorkerConfig, WorkerLoop, describe_index

#: Seconds that a worker may take to end by itself, as with torch's DataLoader (``MP_STATUS_CHECK_INTERVAL``): to
#: finish the sample that it is at, what its generators do finally, and its exit functions.
END_TIMEOUT: Final = 5.0
#: Seconds for which a worker whose owner has died may go on with what it is at; how often it asks who its parent is.
_GRACE: Final = 1.5
_PARENT_POLL_INTERVAL: Final = 0.1
#: Descriptors that multiprocessing needs to fork. It leaves some of them open if there are not enough, so that is seen
#: before.
_PIPES: Final = 4
#: Wakes a worker that is far enough ahead: it says nothing.
_WAKE: Final = pickle.dumps(None)


class _EndpointHandover:
    """A worker's end on its way to the worker. Whoever unpickles it gets the endpoint."""

    def __init__(self, end: Endpoint) -> None:
        self.fds = [Descriptor(descriptors.dup(fd)) for fd in end.handover()]


def _reduce_handover(encoder: reducers.Encoder, ticket: _EndpointHandover) -> Any:
    return _accept, ([encoder.attach(each.fd, each) for each in ticket.fds],)


def _accept(indices: Sequence[int]) -> Endpoint:
    return kinds.adopt([reducers.take_inbound_fd(index) for index in indices])


reducers.register(_EndpointHandover, _reduce_handover)


def _connection(end: Endpoint | LocalEndpoint) -> Connection | LocalEndpoint:
    """What the loader, and a worker, make of an end. One within this process has all that they need."""
    return end if isinstance(end, LocalEndpoint) else Connection(end)


Start = Callable[[WorkerConfig, Any], Process]


def starter(context: Any, config: LoaderConfig, backend: Backend) -> Start:
    """How the workers of ``config`` are started: as torch would on this platform, or as ``context`` or ``backend`` say.

    Raises MarshalError if they are to be served and something of the config cannot travel; its message names the place;
    RuntimeError if threads are green ones here.
    """
    greenlets.check("a DataLoader with workers")
    held: list[Any] = []
    if backend.peer.same_process:
        return functools.partial(_serve, backend, Letter(None, [config]), held)
    if "multiprocessing_context" in backend.options:
        context = context or torch.multiprocessing
        if context.get_start_method() == "fork":
            return functools.partial(_fork, context, config)
    (payload,) = codec.encode_all([config], codec.CALL_LIMIT, upvalues=True, root="the loader's", starting=held)
    return functools.partial(_serve, backend, payload, held)


def _fork(context: Any, config: LoaderConfig, own_config: WorkerConfig, end: Endpoint) -> Process:
    definitions.give_tokens_to_main()  # what comes back by another way than the batches is known here, too
    ticket: list[int] = []
    try:
        for fd in [*end.handover(), *[end.fileno()] * _PIPES]:
            ticket.append(descriptors.dup(fd))
        close_fds(ticket[-_PIPES:])
        del ticket[-_PIPES:]
        process = context.Process(target=_forked_main, args=(config, own_config, ticket, os.getpid()), daemon=True)
        process.start()
    except ResourceError:
        raise
    except OSError as error:
        if error.errno == errno.EAGAIN:
            limit = "a limit on processes (RLIMIT_NPROC or the cgroup's pids.max)"
            raise ResourceError(error.errno, f"worker {own_config.worker_id} could not be forked: {limit}") from error
        raise exhausted(error) from error
    finally:
        close_fds(ticket)
    return Forked(process)


def _forked_main(config: LoaderConfig, own_config: WorkerConfig, ticket: Sequence[int], owner: int) -> None:
    child.set_signal_handlers()
    limits.hold_back_warnings(child.OUTLIVES_OWNER)
    with contextlib.closing(Connection(kinds.adopt(ticket))) as connection:
        _end_with_owner(connection, owner)
        WorkerLoop(config, own_config).run(connection, has_main=True)


def _end_with_owner(connection: Connection, owner: int) -> None:
    """End this process soon after its parent ``owner`` has died, even if it is busy then.

    The event is the end of the connection, which comes also if the loader lets go: after that, this looks who is the
    parent until the process ends, which it does soon.
    """
    poll = select.poll()
    poll.register(connection.fileno(), getattr(select, "POLLRDHUP", 0))

    def watch() -> None:
        poll.poll()
        while os.getppid() == owner:
            time.sleep(_PARENT_POLL_INTERVAL)
        time.sleep(_GRACE)
        os._exit(1)

    threading.Thread(target=watch, name="torchwq-watch", daemon=True).start()


def _serve(
    backend: Backend, config: codec.Encoded, held: list[Any], own_config: WorkerConfig, end: Endpoint | LocalEndpoint
) -> Process:
    own: codec.Encoded
    if isinstance(end, LocalEndpoint):
        own = Letter(None, [(own_config, end)])
    else:
        own = codec.encode((own_config, _EndpointHandover(end)), codec.CALL_LIMIT, upvalues=True)
    (process,) = starting.start(
        1,
        f"{__name__}:served_main",
        _close_message,
        _nothing,
        backend=backend,
        first_mapid=own_config.worker_id,
        of=own_config.num_workers,
    )
    process.holds = held
    try:
        process.send(own)
        process.send(config)
    except BaseException:  # it would wait for what it does not get
        process.kill(signal.SIGKILL)
        raise
    return Served(process)


def _close_message(process: Worker, data: Any, fds: list[int]) -> None:
    exceptions.discard_answer(data, fds)


def _nothing(process: Worker) -> None:
    pass


def served_main(context: child.Context) -> int:
    """Entry of a worker that a backend has started."""
    own_config, end = codec.decode(*context.receive())
    with contextlib.closing(_connection(end)) as connection:
        try:
            config = codec.decode(*context.receive())
        except Exception as error:
            failure = Failure(exceptions.pack(error), "where what the loader has sent cannot be rebuilt")
            connection.send(codec.encode(failure, end.max_payload, upvalues=True))
            if isinstance(connection, Connection):
                connection.outbox.wait_empty()
            return 1
        loop = WorkerLoop(config, own_config)
        if isinstance(connection, Connection):
            loop.run(connection)
            return 0
        try:
            loop.run_in_thread(connection)
        except SystemExit as stop:
            return int(stop.code) if isinstance(stop.code, int) else 1
    return 0


class Gone(Exception):
    """The connection to a worker has ended."""

    def __init__(self, worker: WorkerHandle) -> None:
        super().__init__(worker.worker_id)
        self.worker = worker


class WorkerHandle:
    """One worker as its loader sees it."""

    def __init__(self, start: Start, own_config: WorkerConfig, flow: memoryview, backend: Backend) -> None:
        self.worker_id = own_config.worker_id
        self._backend = backend
        #: Whether what is sent to it stays in this process.
        self._stays = backend.peer.same_process
        self._start = start
        self._own_config = own_config
        self._flow = flow
        self._lock = threading.RLock()
        self._unsent: list[Any] = []
        self._generation = 0
        #: Indices that it has not answered, in order. What was sent before the last new epoch is only to be skipped.
        self.tasks: deque[Any] = deque()
        self.to_skip = 0
        #: False if its own_config of an iterable dataset has come to its end in this epoch.
        self.active = True
        #: From where it would go on after the last answer that was handed out, and that was received.
        self.snapshot = self.received = own_config.resume
        self._open(own_config)

    def _open(self, own_config: WorkerConfig) -> None:
        # All of it before the worker starts, which has to be ended otherwise; it has its end then.
        with contextlib.ExitStack() as opened, contextlib.ExitStack() as passed_on:
            try:
                ours, theirs = self._backend.connect()
                if not self._stays:
                    passed_on.callback(theirs.close)
                self.connection = _connection(ours)
                opened.callback(self.connection.close)
                self._closed = False
                opened.callback(setattr, self, "_closed", True)
                self._kept: KeptBlocks | None = None
                if not self._stays:
                    self._kept = KeptBlocks(References)
                    opened.callback(self._kept.close)
                    _, own_config.room = self._kept.admit()
                self.process: Process = self._start(own_config, theirs)
                self.max_payload = ours.max_payload
            except ResourceError:
                raise
            except OSError as error:
                raise exhausted(error) from error
            opened.pop_all()
        self._take = self.connection.take
        self._consumed = 0
        self._sent = self._received = 0

    def assign(self, index: Any) -> None:
        """Let it make a batch for this index. It does not know of it before ``flush``."""
        self.tasks.append(index)
        if self._stays and type(index) is list:
            index = index.copy()  # the worker would see what the sampler makes of its list
        with self._lock:
            self._unsent.append(index)

    def flush(self, at_least: int = 1) -> None:
        """Send it the indices that it does not know of, if they are so many."""
        if len(self._unsent) < at_least:
            return
        with self._lock:
            unsent, self._unsent = self._unsent, []
            if unsent:
                self._sent += len(unsent)
                self.send((self._generation, unsent))

    def consumed(self) -> None:
        """One more of its answers was taken: it may make one more batch."""
        with self._lock:
            self._consumed += 1
            self._flow[CONSUMED] = self._consumed
        if self._flow[ASLEEP]:
            self.send(None)

    def abandon_tasks(self, skip: bool, prefetch: int) -> None:
        """Nobody wants what it was asked for until now. Its answers will come; ``skip``: they are to be skipped.

        The first ``prefetch`` of them are made all the same, as torch's loader makes them, so that the dataset's random
        numbers afterwards do not depend on how far the worker had come.
        """
        with self._lock:
            if skip:
                self.to_skip += len(self.tasks) - len(self._unsent)
            self._flow[LIMIT] = self._consumed + prefetch
            self.tasks.clear()
            self._unsent.clear()
            self._generation += 1
            self._flow[GENERATION] = self._generation

    def send(self, message: Any) -> None:
        """Send a message; None only wakes it.

        One that is dead does not get it: that shows when its answer is waited for.
        """
        with contextlib.suppress(BrokenPipeError):
            if isinstance(self.connection, LocalEndpoint):
                self.connection.send(Letter(None, [message]))
                return
            payload = _WAKE if message is None else codec.encode_one(message, self.max_payload, "the sampler's index")
            self.connection.send(payload)

    @property
    def has_answered(self) -> bool:
        """Whether anything has come from it."""
        return self._received > 0

    @property
    def unreceived(self) -> int:
        """How many answers will still come."""
        return self._sent - self._received

    def take(self) -> Received | None:
        """The next answer, if it is here. Raises EOFError if none will come."""
        while True:
            received = self._take()
            if received is not None and self._kept is not None:
                received = self._kept.look(received)
                if received is None:
                    continue
            if received is not None:
                self._received += 1
            return received

    def wait(self, deadline: float | None) -> Received | None:
        """The next answer; None after ``deadline`` (time.monotonic), and if there is none after ``stop_waiting``.

        Raises EOFError if none will come.
        """
        while True:
            received = self.connection.wait(self.take, deadline)
            if received is not None or isinstance(self.connection, Connection) or self._closed:
                return received
            if deadline is not None and time.monotonic() >= deadline:
                return None

    def stop_waiting(self) -> None:
        """End ``wait``, in any thread. What has come can still be taken."""
        self.connection.stop_waiting()

    def died(self) -> WorkerDied:
        """Why no answer will come. A worker whose connection has ended may still run its exit functions."""
        if not self.process.wait(END_TIMEOUT):
            self.process.kill(signal.SIGKILL)
            self.process.wait(END_TIMEOUT)
        in_hand = describe_index(self.tasks[0]) if self.tasks else ""
        pid, exitcode = self.process.pid, self.process.exitcode
        death = deaths.died(mapid=self.worker_id, pid=pid, exitcode=exitcode, in_hand=in_hand)
        death.args = (f"{_as_torch_says(pid, exitcode)}DataLoader {death}",)
        return death

    def restart(self, shared_seed: int | None) -> None:
        """Put a new process in the place of a dead one, which goes on where that one was."""
        self._disconnect()
        self._own_config.resume, self._own_config.shared_seed = self.received, shared_seed
        self._flow[CONSUMED] = self._flow[ASLEEP] = self._flow[LIMIT] = 0
        missing = self.unreceived
        wanted = list(self.tasks)[max(0, len(self.tasks) - len(self._unsent) - missing) :]
        # What nobody wants any more, and a thread still counts on, is answered too.
        stale = 0 if self.to_skip else missing - (len(wanted) - len(self._unsent))
        self.to_skip = 0
        self._open(self._own_config)
        if stale:
            self._sent += stale
            self.send((-1, [None] * stale))
        self._unsent = wanted
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


def end(workers: Sequence[WorkerHandle], in_all: float | None = None) -> None:
    """End workers: by closing their connections, and, if that does not do in time, by force, which threads escape.

    Args:
        in_all: seconds that all of them together may take to end by themselves; None: ``END_TIMEOUT`` for each process,
            one after the other, as torch's loader waits for them.
    """
    with contextlib.ExitStack() as stack:  # another Ctrl-C in the middle of it does not keep it from doing the rest
        stack.callback(recycling.give_up_orphans)  # their blocks would be kept for a while: no process uses them again
        stack.callback(_wait_for, workers, in_all)
        for worker in workers:
            stack.callback(worker.close)


def end_in_background(workers: Sequence[WorkerHandle], seconds: float) -> None:
    """The same for somebody who has no time: after ``seconds`` a thread goes on with it."""
    try:
        for worker in workers:
            worker.close()
        left = _wait(workers, seconds)
    except BaseException:
        left = list(workers)
        raise
    finally:
        recycling.suspect_orphans()  # takes no lock: this may be a finalizer
        if left:
            threading.Thread(target=end, args=(left,), name="torchwq-close", daemon=True).start()


def _wait_for(workers: Sequence[WorkerHandle], in_all: float | None) -> None:
    left = [worker for worker in _wait(workers, in_all) if worker.process.can_be_killed]
    for number in (signal.SIGTERM, signal.SIGKILL):
        for worker in left:
            worker.process.kill(number)
        left = _wait(left, 1.0) if left else left


def _wait(workers: Sequence[WorkerHandle], in_all: float | None) -> list[WorkerHandle]:
    """Wait for workers to end, and return those that have not."""
    until = time.monotonic() + (END_TIMEOUT if in_all is None else in_all)
    for worker in workers:
        worker.process.wait(max(0.0, until - time.monotonic()))
        if in_all is None and worker.process.can_be_killed:
            until = time.monotonic() + END_TIMEOUT
    return [worker for worker in workers if not worker.process.wait(0.0)]
