"""The actor that is a worker: it runs on some node of the cluster.

The worker's function runs in a thread. The calls of the actor only pass messages on: see ``worker`` for how, and for
the invariants. The process was started by Ray and serves nobody else, so its state is the worker's: random generators,
warning filters, ``worker_info``.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import threading
import traceback
import warnings
from collections import deque
from typing import Any, Final

import torch

from ..marshalling import codec
from ..transport import local, namespace
from ..transport.capabilities import OTHER_MACHINE
from ..transport.endpoint import Received
from ..transport.local import LocalEndpoint
from ..transport.mailbox import Mailbox
from ..workers import child, info, shutdown
from . import cluster
from .far_handles import HandleLink
from .transit import CLOSE, END, FAILED, HELLO, MAX_WAITING, MESSAGE, REPLY, pack, unpack

#: So many calls may be in the actor at once; more than ``MAX_WAITING``, so that one more always gets in.
THREADS: Final = 4 * MAX_WAITING
#: A call takes further messages along, as long as they are so small all together.
_MAX_TOGETHER: Final = 64 * 1024


class Actor:
    """Made by ``worker.RayWorker``, with the worker's setup."""

    def __init__(self, setup: dict[str, Any]) -> None:
        #: Guards the next five.
        self._lock = threading.Lock()
        #: The calls that have come early, by their number; the number of the next to come, and of the next to return.
        self._early: dict[int, Any] = {}
        self._next_call = self._next_return = 0
        self._outgoing: deque[Any] = deque()
        self._ended = False
        #: Of each call that waits: released when it may return. Only the first is woken.
        self._turns: dict[int, threading.Lock] = {}
        self._handles = HandleLink(lambda *signal: self._put(signal))
        self._ours, theirs = _WorkersEnd(self), LocalEndpoint(Mailbox())
        local.connect(self._ours, theirs)
        self._incoming = theirs
        self._setup = setup
        threading.Thread(target=self._run, name=f"torchwq-worker-{setup['info'].mapid}", daemon=True).start()

    def __repr__(self) -> str:
        """Ray puts it before the lines that the worker prints."""
        return f"torchwq-worker-{self._setup['info'].mapid}"

    def exchange(self, number: int, head: Any, message: Any) -> list[Any]:
        """Call ``number``: take a signal in, wait until it is this call's turn to return, and return signals."""
        turn = threading.Lock()
        turn.acquire()
        payload = None if message is None else unpack(message, self._handles.far_handle)
        self._handles.tell_of_dropped()
        with self._lock:
            self._early[number] = head, payload
            head = message = payload = None  # the call may wait for long
            while self._next_call in self._early:
                self._next_call += 1
                self._take_in(*self._early.pop(self._next_call - 1))
            self._turns[number] = turn
            self._wake_first()
        turn.acquire()
        with self._lock:
            del self._turns[number]
            self._next_return += 1
            signals = self._next_signals()
            self._wake_first()
        return signals

    def _wake_first(self) -> None:
        """Let the first call return, if there is a reason. Call it with the lock."""
        turn = self._turns.get(self._next_return)
        crowded = self._next_call - self._next_return > MAX_WAITING
        if turn is not None and turn.locked() and (self._outgoing or self._ended or crowded):
            turn.release()

    def _take_in(self, head: Any, payload: Any) -> None:
        kind = None if head is None else head[0]
        if kind == MESSAGE:
            with contextlib.suppress(BrokenPipeError):  # the worker reads no more
                self._incoming.send(payload)
        elif kind == CLOSE:
            self._incoming.close()
        elif kind == REPLY:
            _, request, good = head
            self._handles.replied(request, good, payload)

    def _next_signals(self) -> list[Any]:
        signals: list[Any] = []
        size = 0
        while self._outgoing and (not signals or size + _size(self._outgoing[0]) <= _MAX_TOGETHER):
            size += _size(self._outgoing[0])
            signals.append(self._outgoing.popleft())
        return signals

    def put(self, *signal: Any) -> None:
        """Send a signal to the owner."""
        self._handles.tell_of_dropped()
        self._put(signal)

    def _put(self, signal: Any) -> None:
        with self._lock:
            self._outgoing.append(signal)
            self._wake_first()

    def send(self, payload: codec.Encoded) -> None:
        """Send a message to the owner."""
        self.put(MESSAGE, pack(payload, self._handles.number_of))

    def _run(self) -> None:
        code = 1
        try:
            context = RayContext(self, self._ours)
            code = _set_up(self, self._setup)(context)
        except SystemExit as stop:
            code = child.exit_status(stop)
        except BaseException:
            traceback.print_exc()
        finally:
            try:
                shutdown.failed = bool(code)
                shutdown.run()
                for stream in (sys.stdout, sys.stderr):
                    stream.flush()
            finally:
                self._ended = True
                self.put(END, code)


def _size(signal: Any) -> int:
    """About how many bytes a signal has."""
    message = signal[-1]
    if isinstance(message, bytes):
        return len(message)
    if isinstance(message, tuple):
        pickled, _, parts, _ = message
        return len(pickled) + sum(int(part.nbytes) for part in parts)
    return 0


def _set_up(actor: Actor, setup: dict[str, Any]) -> Any:
    """Make this process the worker, and return the entry function."""
    ray: Any = cluster.ray()
    actor.put(HELLO, os.getpid(), ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address())
    os.environ.pop(namespace.VARIABLE, None)  # of an owner on this machine, if Ray has passed it on
    vars(sys.modules["__main__"])["__torchwq_worker__"] = True  # see ``marshalling.namespaces``
    sys.path += [path for path in setup["path"] if path not in sys.path]
    importlib.invalidate_caches()
    warnings.resetwarnings()
    child.set_filters(setup["filters"])
    info.set_process_info(setup["info"])
    child.set_seeds(setup["info"].seed)
    torch.set_num_threads(1)
    torch.set_default_dtype(setup["dtype"])
    module_name, _, function = setup["entry"].partition(":")
    return getattr(importlib.import_module(module_name), function)


class _WorkersEnd(LocalEndpoint):
    """The worker's end of its connection: what it sends is sent by the actor."""

    def __init__(self, actor: Actor) -> None:
        super().__init__(Mailbox())
        self._actor = actor

    def send(self, message: Any) -> None:
        if self._closed or self.peer.closed:
            raise BrokenPipeError("the owner has closed the connection")
        self._actor.send(message)

    def take(self) -> tuple[Any, list[int]] | None:
        found = super().take()
        return None if found is None else (found[0], [])


class RayContext(child.Context):
    """The connection of the worker to its owner, as an entry function uses it."""

    peer = OTHER_MACHINE
    max_payload = codec.UNLIMITED

    def __init__(self, actor: Actor, end: LocalEndpoint) -> None:
        self._actor = actor
        self.end = end

    def receive(self) -> Received:
        received: Received | None = None
        while received is None:
            received = self.end.take() or self.end.wait(self.end.take, None)
        return received

    def send(self, payload: codec.Encoded) -> None:
        self._actor.send(payload)

    def report_failure(self, error: Any) -> None:
        super().report_failure(error)
        self._tell(error)

    def report_task_failure(self, error: Any) -> None:
        super().report_task_failure(error)
        self._tell(error)

    def _tell(self, error: Any) -> None:
        message = codec.encode(error, codec.UNLIMITED, upvalues=True, peer=OTHER_MACHINE)
        self._actor.put(FAILED, pack(message, self._actor._handles.number_of))

    def finish(self) -> None:
        pass  # the signal of the end comes after all others

    def close(self) -> None:
        self.end.close()
