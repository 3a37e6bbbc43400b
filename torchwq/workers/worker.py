"""A worker process as its owner sees it: what it was told, what it says, and how it ended.

Two sources tell about a worker: its control connection brings its messages, the fork server its end. Invariants:

* ``on_message`` and ``on_end`` run in the reactor's thread, in this order: every message that the worker sent, then its
  end, exactly once.
* A worker counts as living from the order to its end; ``living()`` is what exit has to take care of.
"""

from __future__ import annotations

import itertools
import os
import pickle
import signal
import sys
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from ..memory import anonymous
from ..memory.parcel import Parcel
from ..transport import endpoint, namespace, reactor
from ..transport.outbox import Outbox
from ..transport.process import reset_in_child
from . import client, deaths
from .info import WorkerInfo

OnMessage = Callable[["Worker", bytes, list[int]], None]
OnEnd = Callable[["Worker"], None]


class Worker:
    """One worker process. Made by :func:`start`."""

    def __init__(self, info: WorkerInfo, entry: str, on_message: OnMessage, on_end: OnEnd, group: int) -> None:
        self.info = info
        #: Workers that were started together have the same.
        self.group = group
        self.ordered_at = time.monotonic()
        self.pid: int | None = None
        self.exitcode: int | None = None
        self.reason = ""
        self._kill_at_start: signal.Signals | None = None
        self.ended_event = threading.Event()
        self._on_message = on_message
        self._on_end = on_end
        self._after: list[Callable[[Worker], None]] = []
        self._lock = threading.Lock()
        self._endpoint, theirs = endpoint.pair()
        self._outbox = Outbox(self._endpoint)
        reactor.get().set_reader(self._endpoint.fileno(), self._ready)
        self._order(theirs)
        self._send_setup(entry)

    def _order(self, theirs: endpoint.Endpoint) -> None:
        _living.add(self)
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            fds = [*theirs.handover(), *(fd if _is_open(fd) else null for fd in (1, 2))]
            try:
                client.connect().order(self, fds)
            except BrokenPipeError:
                client.connect().order(self, fds)  # the server had died unnoticed; this is another one
        except BaseException:
            _living.discard(self)
            raise
        finally:
            os.close(null)
            theirs.close()

    def _send_setup(self, entry: str) -> None:
        setup = pickle.dumps(_environment(self.info, entry))
        if len(setup) <= self._endpoint.max_message:
            self._outbox.send(setup)
        else:
            fd = anonymous.fill([setup])
            self._outbox.send(Parcel(b"", [fd], [anonymous.Descriptor(fd)]))

    def send(self, payload: bytes | Parcel) -> bool:
        """Send a message; never blocks. Returns False if the worker is dead and has not got it: ``on_end`` tells."""
        try:
            self._outbox.send(payload)
        except BrokenPipeError:
            return False
        return True

    def kill(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Send it a signal; as soon as it is started, if it is not yet. Nothing happens if it has ended."""
        with self._lock:
            if self.pid is None:
                self._kill_at_start = number
                return
        if not self.ended_event.is_set():
            client.connect().kill(self.pid, number)

    def died(self, in_hand: str = "") -> Exception:
        """The error that tells how it ended."""
        return deaths.died(
            mapid=self.info.mapid, pid=self.pid, exitcode=self.exitcode, reason=self.reason, in_hand=in_hand
        )

    def when_ended(self, callback: Callable[[Worker], None]) -> None:
        """Call ``callback(self)`` when it has ended; at once if it has."""
        with self._lock:
            if not self.ended_event.is_set():
                self._after.append(callback)
                return
        callback(self)

    def started(self, pid: int) -> None:
        with self._lock:
            self.pid = pid
        _by_pid[pid] = self
        if self._kill_at_start is not None:
            self.kill(self._kill_at_start)

    def ended(self, status: int | None, reason: str) -> None:
        self._ready()  # what it said before it ended
        self.exitcode = None if status is None else os.waitstatus_to_exitcode(status)
        self.reason = reason
        _living.discard(self)
        _recent.append(self)
        reactor.get().remove(self._endpoint.fileno())
        self._outbox.close_when_sent(lambda: None)
        self._endpoint.close()
        with _listeners_lock:
            listeners = list(_listeners)  # those that were there while it lived: what comes later is not concerned
        with self._lock:
            self.ended_event.set()
            after, self._after = self._after, []
        self._on_end(self)
        # This object may be kept for a while; what it reported to must not be.
        self._on_end = self._on_message = _nothing
        for callback in after:
            callback(self)
        for listener in listeners:
            listener.worker_ended(self)

    def _ready(self) -> None:
        while not self.ended_event.is_set():
            try:
                received = self._endpoint.try_receive()
            except EOFError:
                if self._endpoint.fileno() >= 0:
                    reactor.get().remove(self._endpoint.fileno())
                return
            if received is None:
                return
            self._on_message(self, *received)


def _nothing(*args: object) -> None:
    pass


class EndListener:
    """Something that wants to know of the end of every worker of this process."""

    def worker_ended(self, worker: Worker) -> None:
        """Runs in the reactor's thread; must not block."""


_living: set[Worker] = set()
_by_pid: weakref.WeakValueDictionary[int, Worker] = weakref.WeakValueDictionary()
#: Keeps workers that have ended findable for those who learn of it a moment later.
_recent: deque[Worker] = deque(maxlen=1024)
_listeners: weakref.WeakSet[EndListener] = weakref.WeakSet()
_listeners_lock = threading.Lock()
_started = itertools.count()


@reset_in_child
def _forget() -> None:
    global _living, _by_pid, _listeners, _listeners_lock
    _recent.clear()
    _listeners_lock = threading.Lock()
    _living, _by_pid, _listeners = set(), weakref.WeakValueDictionary(), weakref.WeakSet()


def start(
    n: int, entry: str, on_message: OnMessage, on_end: OnEnd, *, first_mapid: int = 0, of: int | None = None
) -> list[Worker]:
    """Start ``n`` workers that run ``entry`` (``module:function``), numbered from ``first_mapid``, of ``of`` in all.

    Raises ResourceError if descriptors have run out.
    """
    group = next(_started)
    seed = _base_seed(group)
    workers = []
    try:
        for mapid in range(first_mapid, first_mapid + n):
            workers.append(Worker(WorkerInfo(mapid, of or n, (seed + mapid) % 2**63), entry, on_message, on_end, group))
    except OSError as error:
        for worker in workers:
            worker.kill(signal.SIGKILL)
        raise anonymous.exhausted(error) from error
    return workers


def living() -> list[Worker]:
    return list(_living)


def find(pid: int) -> Worker | None:
    """The worker of this process that has this pid, also if it has ended, as long as someone holds it."""
    return _by_pid.get(pid)


def listen(listener: EndListener) -> None:
    """Tell ``listener`` of each worker's end from now on, for as long as it lives."""
    with _listeners_lock:
        _listeners.add(listener)


def _base_seed(group: int) -> int:
    """Different for each start, and reproducible if the owner has seeded torch. Leaves torch's generator alone."""
    return (torch.initial_seed() * 6364136223846793005 + (group + 1) * 1442695040888963407) % 2**62


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _environment(info: WorkerInfo, entry: str) -> dict[str, Any]:
    """What a worker takes over from its owner as it is now."""
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
        "filters": _warning_filters(),
    }


def _warning_filters() -> list[tuple[Any, ...]]:
    """The warning filters, their categories by name: no worker has to import a module only to ignore its warnings."""
    filters = []
    for action, message_, category, module, line in warnings.filters:
        if not isinstance(category, type):
            continue
        texts = [getattr(text, "pattern", text) or "" for text in (message_, module)]
        filters.append((str(action), str(texts[0]), category.__module__, category.__qualname__, str(texts[1]), line))
    return filters
