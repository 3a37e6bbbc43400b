"""A worker that is a process.

The owner receives its messages over the control connection, and the news of its end from the fork server.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
import warnings
from typing import Any

import torch
import torch.multiprocessing

from ..errors import ResourceError, WorkerStartError
from ..memory import anonymous
from ..memory.message import Message
from ..transport import descriptors, endpoint, kinds, namespace
from ..transport.capabilities import SAME_MACHINE
from ..transport.connection import Connection
from . import client, multiprocessing_state, privileges
from .backend import Backend, Ends
from .info import WorkerInfo
from .streams import is_stream
from .worker import OnEnd, OnMessage, Worker, register, register_pid, remember_ended


class ProcessWorker(Worker):
    """A worker that is a process."""

    peer = SAME_MACHINE
    can_be_killed = True

    def __init__(self, info: WorkerInfo, entry: str, on_message: OnMessage, on_end: OnEnd, group: int) -> None:
        super().__init__(info, on_message, on_end, group)
        self._kill_at_start: signal.Signals | None = None
        #: The connection that requested the worker.
        self._server: client.ServerConnection | None = None
        ours, theirs = kinds.pair()
        self._connection = Connection(ours, waitable=False)
        try:
            setup = _setup(info, entry, ours.max_payload)
            self._connection.watch(self._ready)
            self._request(theirs)
            self.send(setup)
        except BaseException:
            self._abandon()
            raise
        finally:
            theirs.close()

    def _request(self, theirs: endpoint.Endpoint) -> None:
        register(self)
        null = descriptors.open_file(os.devnull, os.O_RDWR)
        try:
            streams_of_owner = [fd if is_stream(name, fd) else null for name, fd in (("stdout", 1), ("stderr", 2))]
            fds = [*theirs.handover(), *streams_of_owner]
            self._server = client.connect()
            try:
                self._server.request(self, fds)
            except BrokenPipeError:
                self._server = client.connect()  # the server had died unnoticed
                self._server.request(self, fds)
        except BaseException:
            self._server = None
            raise
        finally:
            os.close(null)

    def _abandon(self) -> None:
        """Drop the worker: the request or the setup message has failed."""
        self._drop_callbacks()
        if self._server is not None:
            self.kill(signal.SIGKILL)
            return
        self._unregister()
        self._connection.close()

    def send(self, payload: bytes | Message) -> bool:
        try:
            self._connection.send(payload)
        except BrokenPipeError:
            return False
        return True

    def kill(self, number: signal.Signals = signal.SIGTERM) -> None:
        with self._lock:
            if self.pid is None:
                self._kill_at_start = number
                return
        if self._server is not None and not self.ended_event.is_set():
            self._server.kill(self.pid, number)

    def on_started(self, pid: int) -> None:
        with self._lock:
            self.pid = pid
        self.started_event.set()
        register_pid(self, pid)
        if self._kill_at_start is not None:
            self.kill(self._kill_at_start)

    def on_ended(self, status: int | None, reason: str) -> None:
        self._ready()  # the messages that it sent before its end
        self.exitcode = None if status is None else os.waitstatus_to_exitcode(status)
        self.reason = reason
        remember_ended(self)
        self._connection.close()
        self._report_end()

    def _ready(self) -> None:
        while not self.ended_event.is_set():
            received: tuple[Any, list[int]] | None
            try:
                received = self._connection.take()
            except EOFError:
                self._connection.watch(None)
                return
            except ResourceError as error:  # the message is lost; ``on_message`` gets this in its place
                received = error, []
            if received is None:
                return
            self._on_message(self, *received)


class Processes(Backend):
    """Workers that are processes of this machine, forked by the fork server."""

    name = "process"
    peer = ProcessWorker.peer
    can_be_killed = ProcessWorker.can_be_killed
    options = frozenset({"multiprocessing_context"})

    def start(self, info: WorkerInfo, entry: str, on_message: OnMessage, on_end: OnEnd, group: int) -> ProcessWorker:
        return ProcessWorker(info, entry, on_message, on_end, group)

    def connect(self) -> Ends:
        return kinds.pair()

    def warm_up(self, wait: bool) -> None:
        multiprocessing_state.start_tracker()
        connection = client.connect()
        connection.request_preload()
        if wait:
            connection.warm.wait()
            if connection.failure:
                raise WorkerStartError(connection.failure)


def _setup(info: WorkerInfo, entry: str, limit: int) -> Message:
    """Return the first message to a worker, of at most ``limit`` bytes; ``child`` decodes it. Raises ResourceError."""
    environment = pickle.dumps(_environment(info, entry))
    tracker = multiprocessing_state.tracker_descriptor()
    keep = [] if tracker is None else [tracker]
    if len(environment) > limit:
        keep.append(anonymous.Descriptor(anonymous.fill([environment])))
        environment = b""
    return Message(environment, [each.fd for each in keep], keep)


def _environment(info: WorkerInfo, entry: str) -> dict[str, Any]:
    """Return the owner's present state, which the worker takes over."""
    try:
        directory = os.getcwd()
    except FileNotFoundError:
        directory = "/"
    return {
        "info": info,
        "entry": entry,
        "directory": directory,
        "environment": dict(os.environ),
        "namespace": namespace.current().path,
        "path": list(sys.path),
        "argv": list(getattr(sys, "argv", [])),
        "started_ns": time.monotonic_ns(),
        "key": multiprocessing_state.authkey(),
        "settings": privileges.inheritable_settings(),
        "filters": warning_filters(),
        "dtype": torch.get_default_dtype(),
        "strategy": torch.multiprocessing.get_sharing_strategy(),
    }


def warning_filters() -> list[tuple[Any, ...]]:
    """Return the warning filters, with categories by name: no worker imports a module only to ignore its warnings."""
    filters = []
    for action, message_, category, module, line in warnings.filters:
        if not isinstance(category, type):
            continue
        texts = [getattr(text, "pattern", text) or "" for text in (message_, module)]
        filters.append((str(action), str(texts[0]), category.__module__, category.__qualname__, str(texts[1]), line))
    return filters
