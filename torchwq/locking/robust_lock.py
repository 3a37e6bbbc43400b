"""A lock that ends with the process that holds it, however that ends.

It is a record lock of the kernel, on the table. A word beside it says who holds it; whoever gets the lock and finds
somebody there knows that he died with it.

Invariant: among the threads of a process ``_thread_lock`` comes first, because a record lock is the process's.
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
from .layout import HOLDER

#: How long one that must not block sleeps between two tries, in seconds: at first, and at most.
_FIRST_SLEEP: Final = 0.0001
_MAX_SLEEP: Final = 0.005


class RobustLock:
    """One process's part of it."""

    def __init__(self, table: PeerTable) -> None:
        self._table = table
        self._words = table.words
        self._thread_lock = threading.Lock()
        self._holder = 0
        #: See ``Mutex.abandoned``.
        self.abandoned: WorkerDied | None = None

    @property
    def is_locked(self) -> bool:
        """Whether anybody holds it, in any process."""
        return bool(self._words[HOLDER])

    def acquire(self, deadline: float | None) -> bool:
        me = threading.get_ident()
        if self._holder == me:
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
        before = int(self._words[HOLDER])
        try:
            self._words[HOLDER] = os.getpid()
            self._holder = me
            self.abandoned = None if not before else self._report_dead_holder(before)
        except BaseException as error:
            # A warning that is an error has told; after Ctrl-C the next one is told.
            self._words[HOLDER] = 0 if isinstance(error, Warning) else before
            self._let_go()
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

    def _report_dead_holder(self, pid: int) -> WorkerDied:
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
        self._let_go()

    def _let_go(self) -> None:
        self._holder = 0
        self.abandoned = None
        self._table.release_user_lock()
        self._thread_lock.release()

    def on_thread_exit(self, ident: int) -> None:
        """If it has the lock, the next one gets it, and is told: HOLDER stays."""
        if self._holder == ident:
            self._let_go()
