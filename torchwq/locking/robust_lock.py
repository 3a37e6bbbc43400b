"""A robust lock: it is released when its holder ends, and the next holder learns of that.

The name is that of pthread_mutexattr_setrobust(3). The lock is a record lock of the kernel, on the table of peers. The
word HOLDER beside it holds the holder's process id: a thread that gets the lock and finds an id there knows that the
last holder ended without having released it.

Invariant: a thread takes ``_thread_lock`` first, because a record lock does not exclude threads of the same process.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Final

from .. import warning
from ..errors import MutexError, WorkerDied
from ..peers.table import PeerTable
from ..workers import worker
from ..workers.thread_exit import ThreadExitHook
from .layout import HOLDER

#: No event tells of a record lock: a thread with a deadline tries again after so many seconds, at first and at most.
_FIRST_SLEEP: Final = 0.0001
_MAX_SLEEP: Final = 0.005


class RobustLock:
    """One process's part of the lock."""

    def __init__(self, table: PeerTable) -> None:
        self._table = table
        self._words = table.words
        self._thread_lock = threading.Lock()
        self._holder = 0
        self._exit_hooks = threading.local()
        #: See ``Mutex.abandoned``.
        self.abandoned: WorkerDied | None = None

    def acquire(self, deadline: float | None) -> bool:
        ident = threading.get_ident()
        if not hasattr(self._exit_hooks, "hook"):
            self._exit_hooks.hook = ThreadExitHook(self, ident)
        if self._holder == ident:
            raise MutexError("this thread holds the mutex already: it would wait for itself")
        if not self._thread_lock.acquire(timeout=-1 if deadline is None else max(0.0, deadline - time.monotonic())):
            return False
        try:
            if not self._acquire_record_lock(deadline):
                self._thread_lock.release()
                return False
        except BaseException:
            self._thread_lock.release()
            raise
        dead_holder = int(self._words[HOLDER])
        try:
            self._words[HOLDER] = os.getpid()
            self._holder = ident
            self.abandoned = None if not dead_holder else self._report_death(dead_holder)
        except BaseException as error:
            # A warning that is raised has reported the death. After Ctrl-C the next holder reports it.
            self._words[HOLDER] = 0 if isinstance(error, Warning) else dead_holder
            self._unlock()
            raise
        return True

    def _acquire_record_lock(self, deadline: float | None) -> bool:
        if deadline is None:
            return self._table.acquire_user_lock(wait=True)
        sleep = _FIRST_SLEEP
        while not self._table.acquire_user_lock(wait=False):
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(sleep, left))
            sleep = min(2 * sleep, _MAX_SLEEP)
        return True

    def _report_death(self, pid: int) -> WorkerDied:
        text = "the last holder of this mutex"
        process = worker.find(pid)
        if pid == os.getpid():
            death = WorkerDied(f"{text}, a thread of this process, ended without having released it", pid=pid)
        elif process is not None and process.ended_event.wait(1.0):
            died = process.death_error()
            death = WorkerDied(
                f"{text} ended without having released it: {died}",
                mapid=died.mapid,
                pid=pid,
                signal=died.signal,
                exitcode=died.exitcode,
            )
        else:
            death = WorkerDied(f"{text}, process {pid}, ended without having released it", pid=pid)
        warning.warn(f"{death}. What the mutex protects may be half done", RuntimeWarning)
        return death

    def release(self) -> None:
        if self._holder != threading.get_ident():
            raise MutexError("this thread does not hold the mutex, and cannot release it")
        self._words[HOLDER] = 0
        self._unlock()

    def _unlock(self) -> None:
        self._holder = 0
        self.abandoned = None
        self._table.release_user_lock()
        self._thread_lock.release()

    def on_thread_exit(self, ident: int) -> None:
        """Unlock if this thread holds the lock. HOLDER stays, so the next holder learns of it."""
        if self._holder == ident and self._table.fd >= 0:
            self._unlock()
