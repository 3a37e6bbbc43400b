"""A worker as its owner sees it: what it was told, what it says, and how it ended. What processes and threads share.

Invariants:

* ``on_message`` and ``on_end`` are called in this order: for every message that the worker sent, then for its end,
  exactly once; by the reactor's thread, or by the worker itself if it is a thread. In the place of a message that was
  lost, because its descriptors did not fit into this process, there is the ResourceError.
* A worker counts as living from the order to its end; ``active_workers()`` is what exit has to take care of.
"""

from __future__ import annotations

import abc
import signal
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from ..errors import WorkerDied
from ..memory import recycling
from ..transport.capabilities import Capabilities
from ..transport.fork import reset_in_child
from .info import WorkerInfo

OnMessage = Callable[["Worker", Any, list[int]], None]
OnEnd = Callable[["Worker"], None]

_MEMORY_HINT = (
    "SIGKILL is what the kernel sends when memory runs out: look at its log (dmesg) and at the memory limit of the "
    "machine, container or cgroup"
)


class Worker(abc.ABC):
    """One worker. Made by :func:`start`."""

    #: What a message to it may hold.
    peer: Capabilities
    #: Whether ``kill`` ends it, whatever it is at.
    can_be_killed: bool

    def __init__(self, info: WorkerInfo, on_message: OnMessage, on_end: OnEnd, group: int) -> None:
        self.info = info
        #: Workers that were started together have the same.
        self.group = group
        self.requested_at = time.monotonic()
        self.pid: int | None = None
        self.exitcode: int | None = None
        self.reason = ""
        #: Set when ``pid`` is known, or never will be.
        self.started_event = threading.Event()
        self.ended_event = threading.Event()
        #: What must live as long as the worker does.
        self.keep_alive: object = None
        #: Whether it ended while its owner's process did, and so perhaps because of that.
        self.ended_at_exit = False
        #: Gives the error with which its function has failed, once that is known. Runs users' code.
        self.error: Callable[[], BaseException | None] = _nothing
        #: Whether somebody was told of that error already; whether somebody will be, who waits for its answers.
        self.error_was_retrieved = self.error_will_be_retrieved = False
        self._on_message = on_message
        self._on_end = on_end
        self._end_callbacks: list[Callable[[Worker], None]] = []
        self._lock = threading.RLock()

    @property
    def identity(self) -> object:
        """What tells it from all other workers that live."""
        return self.pid

    @abc.abstractmethod
    def send(self, payload: Any) -> bool:
        """Send a message; never blocks. Returns False if the worker is dead and has not got it: ``on_end`` tells."""

    @abc.abstractmethod
    def kill(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Send it a signal; as soon as it is started, if it is not yet. Nothing happens if it has ended, or is a
        thread."""

    def wait(self, seconds: float | None) -> bool:
        """Wait until it has ended, for so many seconds at most. Returns whether it has."""
        return self.ended_event.wait(seconds)

    def terminate(self, number: signal.Signals) -> None:
        """Have it end, because its process does, or at the user's wish: by a signal; a thread by an exception."""
        self.kill(number)

    def death_error(self, in_hand: str = "") -> WorkerDied:
        """The error that tells how it ended."""
        return death_error(
            mapid=self.info.mapid, pid=self.pid, exitcode=self.exitcode, reason=self.reason, in_hand=in_hand
        )

    def add_end_callback(self, callback: Callable[[Worker], None]) -> None:
        """Call ``callback(self)`` when it has ended; at once if it has."""
        with self._lock:
            if not self.ended_event.is_set():
                self._end_callbacks.append(callback)
                return
        callback(self)

    def _unregister(self) -> None:
        _active.discard(self)

    def _drop_callbacks(self) -> None:
        """Report no more. This object may be kept for a while; what it reported to must not be."""
        self._on_end = self._on_message = _nothing

    def _report_end(self) -> None:
        _active.discard(self)
        self.ended_at_exit = owner_is_exiting
        with _listeners_lock:
            listeners = list(_listeners)  # those that were there while it lived: what comes later is not concerned
        with self._lock:
            self.started_event.set()
            self.ended_event.set()
            self.keep_alive = None
            callbacks, self._end_callbacks = self._end_callbacks, []
        self._on_end(self)
        self._drop_callbacks()
        for callback in callbacks:
            callback(self)
        for listener in listeners:
            listener.on_worker_end(self)


def _nothing(*args: object) -> None:
    return None


class EndListener:
    """Something that wants to know of the end of every worker of this process."""

    def on_worker_end(self, worker: Worker) -> None:
        """Runs in the reactor's thread, or in that of a worker which is a thread; must not block."""


#: Whether this process is ending its workers, because it ends.
owner_is_exiting = False
_active: set[Worker] = set()
_by_pid: weakref.WeakValueDictionary[int, Worker] = weakref.WeakValueDictionary()
#: Keeps workers that have ended findable for those who learn of it a moment later.
_recent: deque[Worker] = deque(maxlen=1024)
_listeners: weakref.WeakSet[EndListener] = weakref.WeakSet()
_listeners_lock = threading.RLock()


@reset_in_child
def _forget() -> None:
    global _active, _by_pid, _listeners, _listeners_lock, owner_is_exiting
    owner_is_exiting = False
    _recent.clear()
    _listeners_lock = threading.RLock()
    _active, _by_pid, _listeners = set(), weakref.WeakValueDictionary(), weakref.WeakSet()


def active_workers() -> list[Worker]:
    return list(_active)


def find(pid: int) -> Worker | None:
    """The worker of this process that has this pid, also if it has ended, as long as someone holds it."""
    return _by_pid.get(pid)


def register(worker: Worker) -> None:
    _active.add(worker)


def register_pid(worker: Worker, pid: int) -> None:
    _by_pid[pid] = worker


def remember_ended(worker: Worker) -> None:
    """One that is a process has ended; keep it findable for a while."""
    _recent.append(worker)
    recycling.note_worker_exit()


def add_end_listener(listener: EndListener) -> None:
    """Tell ``listener`` of each worker's end from now on, for as long as it lives."""
    with _listeners_lock:
        _listeners.add(listener)


def signal_of(exitcode: int | None) -> signal.Signals | None:
    if exitcode is None or exitcode >= 0:
        return None
    try:
        return signal.Signals(-exitcode)
    except ValueError:
        return None


def death_error(
    *,
    mapid: int | None = None,
    pid: int | None = None,
    exitcode: int | None = None,
    reason: str = "",
    in_hand: str = "",
) -> WorkerDied:
    """The error for a worker that ended without having finished."""
    who = f"worker {mapid}" if mapid is not None else "a worker"
    if pid is not None:
        who += f" (pid {pid})"
    number = signal_of(exitcode)
    if reason:
        how = f"died: {reason}"
    elif number is not None:
        how = f"was killed by {number.name}"
    elif exitcode is not None and exitcode < 0:
        how = f"was killed by signal {-exitcode}"
    elif exitcode == 0:
        how = "ended before it had answered, by sys.exit or os._exit, with exit status 0"
    elif exitcode is not None:
        how = f"ended with exit status {exitcode}, by sys.exit or os._exit, before it had finished"
    else:
        how = "died"
    text = f"{who} {how}" + (f", with {in_hand} in hand" if in_hand else "")
    if number is signal.SIGKILL:
        text += f". {_MEMORY_HINT}"
    return WorkerDied(text, mapid=mapid, pid=pid, signal=number, exitcode=exitcode)
