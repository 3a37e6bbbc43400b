"""A worker that is a thread of this process.

It runs the same entry functions as a process does, and what it has opened is closed when it ends, as the end of a
process would close it: so nobody waits for a worker that has left.

Invariants:

* The worker's own thread calls ``on_message`` and ``on_end``. Before its end is told, everything that belongs to it has
  been closed.
* A thread cannot be killed. It ends when its function does; what wakes a function that waits is that the queues and
  channels are closed from which it reads.
* It is interrupted (``force``) in its function only, not while it tells its owner something, or ends: what it does then
  takes locks that others need, and an interruption between taking a lock and noting that would leave it locked.
"""

from __future__ import annotations

import ctypes
import importlib
import queue
import signal
import sys
import threading
import traceback
import weakref
from collections.abc import Callable
from typing import Any, Final, Protocol

from ..errors import Interrupted
from ..transport import local
from ..transport.capabilities import SAME_PROCESS
from ..transport.fork import reset_in_child
from ..transport.local import LocalEndpoint
from . import failures, info
from .backend import Backend, Ends
from .child import Context
from .info import WorkerInfo
from .worker import OnEnd, OnMessage, Worker, register

#: Stands where descriptors would in a message that stays in this process; see ``marshalling.local_message``.
_NO_DESCRIPTORS: Final = [-1]
#: How long, in seconds, one who interrupts a thread waits for it to have told what it is telling.
_INTERRUPT_TIMEOUT: Final = 1.0
#: How long, in seconds, a thread that has ended may take until it is gone.
_JOIN_TIMEOUT: Final = 1.0


def _raise_pending_interrupt() -> None:
    """What is to interrupt this thread does it here: it comes at the latest when a function is called."""


class OwnedResource(Protocol):
    """Something that a worker has opened."""

    def close_for_worker(self, worker: ThreadWorker, failed: bool) -> None:
        """Close it, or let go of it. ``failed``: the worker has ended with an error."""
        ...


class ThreadWorker(Worker):
    """A worker that is a thread. Starts at once. Raises OSError if the system allows no more threads."""

    peer = SAME_PROCESS
    can_be_killed = False

    def __init__(self, info: WorkerInfo, entry: str, on_message: OnMessage, on_end: OnEnd, group: int) -> None:
        super().__init__(info, on_message, on_end, group)
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.owned_resources: weakref.WeakSet[OwnedResource] = weakref.WeakSet()
        self.failures = failures.FailureState()
        #: Whether its function has failed, as far as it has said so.
        self.has_failed = False
        #: Held while the thread must not be interrupted, and by whoever interrupts it.
        self._uninterruptible = threading.Lock()
        self.started_event.set()  # it has no pid
        self._is_ending = False
        self.thread = threading.Thread(
            target=self._run, args=(entry,), name=f"torchwq-worker-{info.mapid}", daemon=True
        )
        #: The functions that have come along with messages, and their globals: see ``marshalling.namespaces``.
        self.thread.torchwq_definitions = {}  # type: ignore[attr-defined]
        register(self)
        try:
            self.thread.start()
        except RuntimeError as error:
            self._unregister()
            raise OSError(11, f"{error}: a limit on threads (RLIMIT_NPROC or the cgroup's pids.max)") from error

    @property
    def identity(self) -> object:
        return self.thread

    def send(self, payload: Any) -> bool:
        if self.ended_event.is_set():
            return False
        self._inbox.put(payload)
        return True  # if it ends without looking there, it ends with this in hand

    def kill(self, number: signal.Signals = signal.SIGTERM) -> None:
        pass

    def wait(self, seconds: float | None) -> bool:
        if self is current():
            return True  # who waits for it is dropped in the worker itself
        if not super().wait(seconds):
            return False
        # It has ended for all but itself. Not for long: what it does last may want a lock that this thread has.
        self.thread.join(_JOIN_TIMEOUT)
        return True

    def terminate(self, number: signal.Signals) -> None:
        """Raise Interrupted, a SystemExit, in it, as soon as it executes Python code again.

        A daemon thread that comes back from torch's C++ code when the interpreter has ended would end the process by
        ``std::terminate``.
        """
        if self.thread.ident is None or not self._uninterruptible.acquire(timeout=_INTERRUPT_TIMEOUT):
            return
        try:
            if not self._is_ending:
                set_exception = ctypes.pythonapi.PyThreadState_SetAsyncExc
                set_exception(ctypes.c_ulong(self.thread.ident), ctypes.py_object(Interrupted))
        finally:
            self._uninterruptible.release()

    def send_to_owner(self, payload: Any) -> None:
        """Tell the owner something. Called by the thread itself."""
        with self._uninterruptible:
            _raise_pending_interrupt()
            self._on_message(self, payload, _NO_DESCRIPTORS)

    def _run(self, entry: str) -> None:
        code = 1
        try:
            _current.worker = self
            info.set_thread_info(self.info)
            module_name, _, function = entry.partition(":")
            run: Callable[[Context], int] = getattr(importlib.import_module(module_name), function)
            code = run(_ThreadContext(self))
        except SystemExit:
            pass  # interrupted
        except BaseException:
            if not sys.is_finalizing():
                traceback.print_exc()
        finally:
            while not self._is_ending:
                try:
                    self._refuse_interrupts()
                except SystemExit:  # it was interrupted while it ended
                    pass
            self._close(failed=bool(code))
            self.exitcode = code
            self._report_end()

    def _refuse_interrupts(self) -> None:
        """From now on it cannot be interrupted. Raises what it was interrupted by before, if that has not come yet."""
        with self._uninterruptible:
            self._is_ending = True
        _raise_pending_interrupt()

    def _close(self, failed: bool) -> None:
        if failed and not self.has_failed:
            self.failures.fail(None, ends=False)
        for each in list(self.owned_resources):
            each.close_for_worker(self, failed)


class _ThreadContext(Context):
    """What a worker's entry function has of its owner, for a thread."""

    peer = SAME_PROCESS
    max_payload = LocalEndpoint.max_payload

    def __init__(self, worker: ThreadWorker) -> None:
        self._worker = worker
        self._get = worker._inbox.get
        self.send = worker.send_to_owner  # type: ignore[method-assign]

    def receive(self) -> Any:
        return self._get(), _NO_DESCRIPTORS

    def report_failure(self, error: Any) -> None:
        self._worker.has_failed = True
        self._worker.failures.fail(error, ends=False)

    def report_task_failure(self, error: Any) -> None:
        self._worker.failures.fail(error, ends=False)

    def report_success(self) -> None:
        self._worker.failures.succeed()

    def finish(self) -> None:
        pass


class Threads(Backend):
    """Workers that are threads of this process."""

    name = "thread"
    peer = ThreadWorker.peer
    can_be_killed = ThreadWorker.can_be_killed

    def start(self, info: WorkerInfo, entry: str, on_message: OnMessage, on_end: OnEnd, group: int) -> ThreadWorker:
        return ThreadWorker(info, entry, on_message, on_end, group)

    def connect(self) -> Ends:
        return local.pair()

    def warm_up(self, wait: bool) -> None:
        pass  # a thread starts at once


_current = threading.local()


@reset_in_child
def _forget() -> None:
    global _current
    _current = threading.local()


def current() -> ThreadWorker | None:
    """The worker that this thread is; None if it is none."""
    worker: ThreadWorker | None = getattr(_current, "worker", None)
    return worker


def current_failures() -> failures.FailureState:
    """Of the worker that this thread is; else of this process."""
    worker = current()
    return failures.process_state if worker is None else worker.failures


def user_threads() -> list[threading.Thread]:
    """The threads beside this one that could do with its things what it does: the main one, and those of the user.

    None for a worker, which has things of its own. Daemons are not counted: mostly they are some library's.
    """
    if current() is not None:
        return []
    me = threading.current_thread()
    return [
        thread
        for thread in threading.enumerate()
        if thread is not me and not thread.daemon and not thread.name.startswith("torchwq-")
    ]


def owned_by_this_worker(resource: OwnedResource) -> None:
    """What was opened in this thread is closed when the thread ends, if it is a worker."""
    worker = current()
    if worker is not None:
        worker.owned_resources.add(resource)
