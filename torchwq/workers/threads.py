"""A worker that is a thread of this process.

It runs the same entry functions as a process does. Its end closes all handles that it has opened, as the end of a
process would; so no other thread waits for a worker that has left.

Invariants:

* The worker's own thread calls ``on_message`` and ``on_end``. Before ``on_end``, it closes all that it owns.
* A thread cannot be killed. It ends when its function returns; closing the queues and channels from which the function
  reads wakes it.
* Note [interrupting threads]: ``terminate`` interrupts the thread in its function only, not while it sends to its owner
  or ends. There it takes locks that other threads need, and an exception between taking a lock and noting that would
  leave the lock locked.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import queue
import signal
import sys
import threading
import traceback
import weakref
from collections.abc import Callable
from typing import Any, Final, Protocol

from ..errors import Interrupted, ResourceError
from ..transport import local
from ..transport.capabilities import SAME_PROCESS
from ..transport.fork import reset_in_child
from ..transport.local import LocalEndpoint
from . import failures, info
from .backend import Backend, Ends
from .child import Context
from .info import WorkerInfo
from .worker import OnEnd, OnMessage, Worker, register

#: In the place of the descriptors of a message that stays in this process; see ``marshalling.local_message``.
_NO_DESCRIPTORS: Final = [-1]
#: How many seconds ``terminate`` waits for the thread to finish a message to its owner.
_INTERRUPT_TIMEOUT: Final = 1.0
#: How many seconds ``wait`` waits for the thread to be gone after ``ended_event``.
_JOIN_TIMEOUT: Final = 1.0


def _raise_pending_interrupt() -> None:
    """Python raises a pending asynchronous exception at the latest when a function is called: here."""


class OwnedResource(Protocol):
    """A handle that a worker has opened."""

    def close_for_worker(self, worker: ThreadWorker, failed: bool) -> None:
        """Close the handle. ``failed``: the worker has ended with an error."""
        ...


class ThreadWorker(Worker):
    """A worker that is a thread. Starts at once. Raises ResourceError if the system allows no more threads."""

    peer = SAME_PROCESS
    can_be_killed = False

    def __init__(
        self,
        info: WorkerInfo,
        entry: str,
        on_message: OnMessage,
        on_end: OnEnd,
        group: int,
        kind: str = "a thread",
    ) -> None:
        super().__init__(info, on_message, on_end, group)
        #: What the worker is, in words, with an article.
        self.kind = kind
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.owned_resources: weakref.WeakSet[OwnedResource] = weakref.WeakSet()
        self.failures = failures.FailureState()
        #: Whether ``report_failure`` was called.
        self.has_failed = False
        #: See Note [interrupting threads]: the thread holds it while it cannot be interrupted, ``terminate`` while it
        #: interrupts.
        self._uninterruptible = threading.Lock()
        self.started_event.set()  # a thread has no pid
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
            limit = f"{error}: a limit on threads (RLIMIT_NPROC or the cgroup's pids.max)"
            raise ResourceError(errno.EAGAIN, limit) from error

    @property
    def identity(self) -> object:
        return self.thread

    def send(self, payload: Any) -> bool:
        if self.ended_event.is_set():
            return False
        self._inbox.put(payload)
        return True

    def kill(self, number: signal.Signals = signal.SIGTERM) -> None:
        pass

    def wait(self, timeout: float | None) -> bool:
        if self is current():
            return True  # a finalizer that runs in the worker waits for it
        if not super().wait(timeout):
            return False
        # Not for long: the thread's last statements may need a lock that the calling thread holds.
        self.thread.join(_JOIN_TIMEOUT)
        return True

    def terminate(self, number: signal.Signals) -> None:
        """Raise Interrupted, a SystemExit, in the thread as soon as it executes Python code again.

        A daemon thread that returned from torch's C++ code after the interpreter's end would abort the process by
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
        """Send a message to the owner. The thread itself calls this."""
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
            pass
        except BaseException:
            if not sys.is_finalizing():
                traceback.print_exc()
        finally:
            while not self._is_ending:
                try:
                    self._refuse_interrupts()
                except SystemExit:  # interrupted while it was ending
                    pass
            if code and not self.has_failed:  # Note [failures before closing]
                self.failures.fail(None, ends=False)
            for resource in list(self.owned_resources):
                resource.close_for_worker(self, bool(code))
            self.exitcode = code
            self._report_end()

    def _refuse_interrupts(self) -> None:
        """Allow no interruption from now on. Raises one that is still pending."""
        with self._uninterruptible:
            self._is_ending = True
        _raise_pending_interrupt()


class _ThreadContext(Context):
    """The connection of a thread to its owner, as an entry function uses it."""

    peer = SAME_PROCESS
    max_payload = LocalEndpoint.max_payload

    def __init__(self, worker: ThreadWorker) -> None:
        self._worker = worker
        self._get = worker._inbox.get

    @property
    def _failures(self) -> failures.FailureState:
        return self._worker.failures

    def receive(self) -> Any:
        return self._get(), _NO_DESCRIPTORS

    def send(self, payload: Any) -> None:
        self._worker.send_to_owner(payload)

    def report_failure(self, error: Any) -> None:
        self._worker.has_failed = True
        self._failures.fail(error, ends=False)

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
    """Return the worker that this thread is, or None."""
    worker: ThreadWorker | None = getattr(_current, "worker", None)
    return worker


def current_failures() -> failures.FailureState:
    """Return the failures of the worker that this thread is, or those of this process."""
    worker = current()
    return failures.process_state if worker is None else worker.failures


def user_threads() -> list[threading.Thread]:
    """Return the other threads that may use the handles of this one: the main thread, and those of the user.

    No other thread uses the handles of a worker. Daemons do not count: most belong to some library.
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
    """Close ``resource``, which this thread has opened, when the thread ends, if the thread is a worker."""
    worker = current()
    if worker is not None:
        worker.owned_resources.add(resource)
