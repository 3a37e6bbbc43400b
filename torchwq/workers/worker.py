"""A worker as its owner sees it: the part that processes and threads share.

Invariants:

* A worker's callbacks run in this order: ``on_message`` for every message that the worker sent, then ``on_end`` exactly
  once. The reactor's thread calls them, or the worker itself if it is a thread. If this process has no room for a
  message's descriptors, the message is lost and ``on_message`` gets the ResourceError in its place.
* A worker is active from the request to its end. At exit, ``shutdown`` ends all ``active_workers()``.
"""

from __future__ import annotations

import abc
import contextlib
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
    """One worker. :func:`.starting.start` makes it."""

    #: What a message to it may hold.
    peer: Capabilities
    #: Whether ``kill`` ends the worker, whatever it does.
    can_be_killed: bool

    def __init__(self, info: WorkerInfo, on_message: OnMessage, on_end: OnEnd, group: int) -> None:
        self.info = info
        #: The same for all workers that were started together.
        self.group = group
        self.requested_at = time.monotonic()
        self.pid: int | None = None
        self.exitcode: int | None = None
        self.reason = ""
        #: Set when ``pid`` is known, or when the worker has ended without one.
        self.started_event = threading.Event()
        self.ended_event = threading.Event()
        #: Objects that must live as long as the worker.
        self.keep_alive: object = None
        #: Whether the user has ended it.
        self.was_terminated = False
        #: Whether it ended while its owner was exiting, and so perhaps because of that.
        self.ended_at_exit = False
        #: Returns the error of the worker's function, after the worker's end. Runs users' code.
        self.error: Callable[[], BaseException | None] = _nothing
        #: Whether a reader of a queue has got that error as a cause; whether a reader that waits will get it.
        self.error_was_retrieved = self.error_will_be_retrieved = False
        self._on_message = on_message
        self._on_end = on_end
        self._end_callbacks: list[Callable[[Worker], None]] = []
        self._lock = threading.RLock()

    @property
    def identity(self) -> object:
        """Distinguishes the worker from all active ones."""
        return self.pid

    @abc.abstractmethod
    def send(self, payload: Any) -> bool:
        """Send a message; never blocks. Returns False if the worker is dead and will not get it: ``on_end`` follows."""

    @abc.abstractmethod
    def kill(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Send the worker a signal, if necessary as soon as it has started. Ended workers and threads ignore it."""

    def wait(self, timeout: float | None) -> bool:
        """Wait at most ``timeout`` seconds for the worker's end. Returns whether it has ended."""
        return self.ended_event.wait(timeout)

    def terminate(self, number: signal.Signals) -> None:
        """End the worker at exit or at the user's wish: a process by the signal, a thread by an exception."""
        self.kill(number)

    def death_error(self, in_hand: str = "") -> WorkerDied:
        """Return the error that says how the worker ended."""
        return death_error(
            mapid=self.info.mapid, pid=self.pid, exitcode=self.exitcode, reason=self.reason, in_hand=in_hand
        )

    def add_end_callback(self, callback: Callable[[Worker], None]) -> None:
        """Call ``callback(self)`` when the worker has ended; now if it has ended already."""
        with self._lock:
            if not self.ended_event.is_set():
                self._end_callbacks.append(callback)
                return
        callback(self)

    def _unregister(self) -> None:
        _active.discard(self)

    def _drop_callbacks(self) -> None:
        """Drop the callbacks, and with them what they refer to: this object may live on for a while."""
        self._on_end = self._on_message = _nothing

    def _report_end(self) -> None:
        self._unregister()
        self.ended_at_exit = owner_is_exiting
        with _listeners_lock:
            listeners = list(_listeners)  # later ones were not there while the worker lived
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
    """Learns of the end of every worker of this process; see ``add_end_listener``."""

    def on_worker_end(self, worker: Worker) -> None:
        """Runs in the reactor's thread, or in the worker's own if that is a thread. Must not block."""


#: Whether this process is exiting, and therefore ends its workers.
owner_is_exiting = False
_active: set[Worker] = set()
_by_pid: weakref.WeakValueDictionary[int, Worker] = weakref.WeakValueDictionary()
#: Workers that have ended: ``find`` returns them to callers that learn of the end a moment later.
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
    """Return the worker of this process that has or had this pid, as long as a reference to it exists."""
    return _by_pid.get(pid)


def register(worker: Worker) -> None:
    _active.add(worker)


def register_pid(worker: Worker, pid: int) -> None:
    _by_pid[pid] = worker


def remember_ended(worker: Worker) -> None:
    """Keep a worker process that has ended, so that ``find`` returns it for a while."""
    _recent.append(worker)
    recycling.note_worker_exit()


def add_end_listener(listener: EndListener) -> None:
    """Tell ``listener`` of each worker's end from now on. Keeps a weak reference to it."""
    with _listeners_lock:
        _listeners.add(listener)


def death_error(
    *,
    mapid: int | None = None,
    pid: int | None = None,
    exitcode: int | None = None,
    reason: str = "",
    in_hand: str = "",
) -> WorkerDied:
    """Return the error for a worker that ended before it had finished."""
    who = f"worker {mapid}" if mapid is not None else "a worker"
    if pid is not None:
        who += f" (pid {pid})"
    number = None
    if exitcode is not None and exitcode < 0:
        with contextlib.suppress(ValueError):  # a signal without a name
            number = signal.Signals(-exitcode)
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
