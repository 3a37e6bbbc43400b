"""Starts the workers of a loader, each with its end of the connection.

multiprocessing *forks* a worker where torch would fork: the worker has the dataset as it is, with open files, locks and
database handles. torchwq's warm fork server starts a worker where torch would spawn: the worker begins clean, and its
configuration is marshalled once for all workers, tensors by reference. A worker may also be a thread, which gets the
dataset as it is.

A worker that is busy when its loader closes finishes its present sample, unless the loader ends it. If the owner has
*died*, a forked worker ends by itself within ``_GRACE_PERIOD`` (``_end_with_owner``), and the fork server kills others.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import select
import threading
import time
from collections.abc import Sequence
from typing import Any, Final

import torch
import torch.multiprocessing

from ..errors import ResourceError
from ..handles.reference import HandleRef, Target, register_handle
from ..marshalling import codec, definitions, exceptions
from ..marshalling.local_message import LocalMessage
from ..memory import limits, tree_table
from ..memory.anonymous import Descriptor, duplicates
from ..transport import descriptors, kinds
from ..transport.capabilities import SAME_MACHINE
from ..transport.connection import Connection
from ..transport.descriptors import close_fds
from ..transport.endpoint import Endpoint
from ..transport.local import LocalEndpoint
from ..workers import child, greenlets, starting
from ..workers.backend import Backend
from ..workers.worker import OnEnd, OnMessage, Worker
from .config import LoaderConfig, WorkerConfig
from .messages import Failure
from .processes import ForkedWorker, Process, StartedWorker
from .worker_handle import Start, connection_of
from .worker_loop import WorkerLoop

#: Seconds for which a worker whose owner has died may go on; and between two looks who its parent is.
_GRACE_PERIOD: Final = 1.5
_PARENT_POLL_INTERVAL: Final = 0.1
#: Descriptors that multiprocessing needs to fork. If there are too few, it leaves some of them open, so they are tried
#: out before.
_FORK_FDS: Final = 4


def starter(context: Any, config: LoaderConfig, backend: Backend) -> Start:
    """A function that starts a worker of ``config``: as torch would on this platform, or as the arguments say.

    Args:
        context: multiprocessing's; None for the platform's default.
        config: what the workers have in common.
        backend: starts them.

    Raises:
        MarshalError: something of the configuration cannot travel to the fork server's processes.
        RuntimeError: this process has green threads.
    """
    greenlets.check("a DataLoader with workers")
    held: list[Any] = []
    if backend.peer.same_process:
        return functools.partial(_serve, backend, LocalMessage(None, [config]), held)
    if "multiprocessing_context" in backend.options:
        context = context or torch.multiprocessing
        if context.get_start_method() == "fork":
            return functools.partial(_fork, context, config)
    options: dict[str, Any] = {"peer": backend.peer, "worker_resources": held, "full_definitions": True}
    payload = codec.encode_one(config, codec.CALL_LIMIT, "the loader", **options)
    return functools.partial(_serve, backend, backend.share(payload), held)


# Forked workers


def _fork(context: Any, config: LoaderConfig, worker_config: WorkerConfig, end: Endpoint) -> Process:
    definitions.give_tokens_to_main()  # the worker may send __main__'s definitions back over a queue
    tree_table.current()  # of a table that it made itself, the worker's blocks would mean nothing here
    handover: list[int] = []
    try:
        for fd in [*end.handover(), *[end.fileno()] * _FORK_FDS]:
            handover.append(descriptors.dup(fd))
        close_fds(handover[-_FORK_FDS:])
        del handover[-_FORK_FDS:]
        process = context.Process(target=_forked_main, args=(config, worker_config, handover, os.getpid()), daemon=True)
        process.start()
    except ResourceError:
        raise
    except OSError as error:
        if error.errno == errno.EAGAIN:
            limit = "a limit on processes (RLIMIT_NPROC or the cgroup's pids.max)"
            message = f"worker {worker_config.worker_id} could not be forked: {limit}"
            raise ResourceError(error.errno, message) from error
        raise descriptors.resource_error(error) from error
    finally:
        close_fds(handover)
    return ForkedWorker(process)


def _forked_main(config: LoaderConfig, worker_config: WorkerConfig, handover: Sequence[int], owner: int) -> None:
    child.set_signal_handlers()
    limits.delay_warnings(child.ORPHAN_TIMEOUT)
    with contextlib.closing(Connection(kinds.adopt(handover))) as connection:
        _end_with_owner(connection, owner)
        WorkerLoop(config, worker_config, connection, SAME_MACHINE, has_main=True).run()


def _end_with_owner(connection: Connection, owner: int) -> None:
    """End this process soon after its parent ``owner`` has died, even if it is busy.

    The end of the connection is the event. It also comes if the loader closes the connection, so a thread polls for the
    parent until the process ends, which is soon.
    """
    poll = select.poll()
    poll.register(connection.fileno(), getattr(select, "POLLRDHUP", 0))

    def watch() -> None:
        poll.poll()
        while os.getppid() == owner:
            time.sleep(_PARENT_POLL_INTERVAL)
        time.sleep(_GRACE_PERIOD)
        os._exit(1)

    threading.Thread(target=watch, name="torchwq-watch", daemon=True).start()


# Workers that a backend starts


class _WorkersEnd(Target):
    """A worker's end of its connection, which arrives as an endpoint."""

    def __init__(self, fds: list[Descriptor]) -> None:
        super().__init__()
        self._fds = fds

    def make_handle(self) -> Endpoint:
        return kinds.adopt([each.detach() for each in self._fds])

    def for_other_process(self) -> Any:
        return _receive, (), self._fds


def _target_of(end: _WorkersEnd) -> Target:
    return end


def _receive(fds: list[int]) -> HandleRef:
    return HandleRef(_WorkersEnd([Descriptor(fd) for fd in fds]))


register_handle(_WorkersEnd, _target_of)


def _serve(
    backend: Backend, config: codec.Encoded, held: list[Any], worker_config: WorkerConfig, end: Endpoint | LocalEndpoint
) -> Process:
    own: codec.Encoded
    on_message: OnMessage = _discard
    on_end: OnEnd = _ignore
    if backend.peer.same_process:
        own = LocalMessage(None, [(worker_config, end)])
    elif isinstance(end, LocalEndpoint):  # batches go over the worker's own connection
        own = codec.encode((worker_config, None), codec.UNLIMITED, upvalues=True, peer=backend.peer)
        on_message, on_end = functools.partial(_pass_on, end), functools.partial(_end, end)
    else:
        own = codec.encode((worker_config, _WorkersEnd(duplicates(end.handover()))), codec.CALL_LIMIT, upvalues=True)
    (process,) = starting.start(
        f"{__name__}:served_main",
        [[own, config]],
        on_message,
        on_end,
        backend=backend,
        keep_alive=held,
        first_mapid=worker_config.worker_id,
        of=worker_config.num_workers,
    )
    if isinstance(end, LocalEndpoint) and not backend.peer.same_process:
        backend.attach(end, process)
    return StartedWorker(process)


def _discard(process: Worker, data: Any, fds: list[int]) -> None:
    exceptions.discard_answer(data, fds)


def _ignore(process: Worker) -> None:
    pass


def _pass_on(end: LocalEndpoint, process: Worker, data: Any, fds: list[int]) -> None:
    with contextlib.suppress(BrokenPipeError):  # the loader has closed the connection
        end.send(data)


def _end(end: LocalEndpoint, process: Worker) -> None:
    end.close()


def served_main(context: child.Context) -> int:
    """Entry of a worker that a backend has started. Returns its exit code."""
    if not context.peer.same_process:
        torch.set_default_dtype(torch.float32)  # as in torch's workers that begin clean: the batches are the same
    worker_config, end = codec.decode(*context.receive())
    if end is None:
        end = context.end
    with contextlib.closing(connection_of(end)) as connection:
        try:
            config = codec.decode(*context.receive())
        except Exception as error:
            answer: Any = Failure(
                exceptions.pack_for(context.peer, error), "where what the loader has sent cannot be rebuilt"
            )
            if not context.peer.shares_memory:
                answer = (), answer
            connection.send(codec.encode(answer, end.max_payload, upvalues=True, peer=context.peer))
            if isinstance(connection, Connection):
                connection.outbox.wait_empty()
            return 1
        try:
            WorkerLoop(config, worker_config, connection, context.peer).run()
        except SystemExit as stop:
            if not context.peer.same_process:
                raise
            return int(stop.code) if isinstance(stop.code, int) else 1
    return 0
