"""The mutex as users hold it, and how it travels."""

from __future__ import annotations

import secrets
import time
import weakref
from types import TracebackType
from typing import Any, final

from ..errors import WorkerDied
from ..handles.reference import HandleRef, Target, register_handle
from ..peers.failures import SeenFailures
from ..transport.descriptors import close_fds
from ..workers import threads
from .layout import HOLDER
from .state import MutexState, close_when_unused, find_state


@final
class Mutex:
    """A lock between any number of processes and threads, with a barrier. Made by :func:`torchwq.mutex`.

    ::

        with m:
            parameters.add_(update)

    It reaches workers as an argument of :func:`torchwq.map` or inside a message. It is not reentrant.

    A worker that dies with the lock held does not block the others. The next holder gets a RuntimeWarning, and ``with``
    gives it WorkerDied instead of None, because what the mutex protects may be half done::

        with m as death:
            if death is not None:
                repair(parameters)

    Source: torch-ipc's ``ipc.mutex``; the interface of ``threading.Lock``.
    """

    __slots__ = ("__weakref__", "_seen", "_state")

    def __init__(self, state: MutexState, seen: SeenFailures) -> None:
        self._state = state
        self._seen = seen
        state.handles.add(self)
        weakref.finalize(self, close_when_unused, state).atexit = False
        threads.owned_by_this_worker(self)

    def acquire(self, timeout: float | None = None) -> bool:
        """Wait for the lock, and take it.

        Args:
            timeout: how long to wait at most, in seconds; 0 does not wait; None waits for ever.

        Returns:
            Whether this thread took the lock; False after ``timeout``. :attr:`abandoned` says if the last holder died.

        Raises:
            MutexError: this thread holds the lock already, or the mutex was inherited by a fork.

        Source: torch-ipc's ``m:lock``; ``threading.Lock.acquire``.
        """
        return self._state.acquire(None if timeout is None else time.monotonic() + timeout)

    def release(self) -> None:
        """Release the lock.

        Raises:
            MutexError: this thread does not hold the lock.

        Source: torch-ipc's ``m:unlock``; ``threading.Lock.release``.
        """
        self._state.release()

    @property
    def abandoned(self) -> WorkerDied | None:
        """While the lock is held: how the last holder died, if it died with the lock held; else None."""
        return self._state.lock.abandoned

    def barrier(self, n: int, *, timeout: float | None = None) -> int:
        """Wait until ``n`` threads, in whatever processes, wait here.

        It can be used again at once, also with another ``n``. It has nothing to do with the lock.

        Args:
            n: how many threads, with this one.
            timeout: how long to wait at most, in seconds; None waits for ever.

        Returns:
            A number from 0 to ``n - 1``, different for each: in which place this thread goes on.

        Raises:
            WorkerDied: the barrier may never be completed: a worker that had the mutex died, or ended with an error; or
                all that still have it wait here already. Each handle that waits, or comes later, is told once of each
                death since it was sent. Those who are left can go on with a smaller ``n``.
            TimeoutError: not all came within ``timeout``; this thread does not count as arrived any more.
            ValueError: ``n`` is less than 1, or others wait for another ``n``.
            MutexError: the mutex was inherited by a fork.

        Source: torch-ipc's ``m:barrier``; ``threading.Barrier.wait``.
        """
        if n < 1:
            raise ValueError(f"a barrier needs at least 1 to come, not {n}")
        return self._state.wait_at_barrier(n, timeout, self._seen)

    def __enter__(self) -> WorkerDied | None:
        self._state.acquire(None)
        return self._state.lock.abandoned

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._state.release()

    def close_for_worker(self, worker: threads.ThreadWorker, failed: bool) -> None:
        """See ``threads.OwnedResource``."""
        self._state.handles.discard(self)
        self._state.on_worker_thread_end(failed)

    def __repr__(self) -> str:
        state = self._state
        if state.forked:
            return "<torchwq.Mutex, of another process>"
        status = "closed" if state.closed else "locked" if state.table.words[HOLDER] else "unlocked"
        return f"<torchwq.Mutex, {status}>"

    def __reduce__(self) -> Any:
        raise TypeError("a Mutex can only be sent by torchwq: as an argument of torchwq.map, or inside a message")


def mutex() -> Mutex:
    """Make a mutex.

    Returns:
        A :class:`Mutex`: a lock, usable with ``with``, and a barrier.

    Raises:
        ResourceError: file descriptors have run out.

    Source: torch-ipc's ``ipc.mutex``.
    """
    return Mutex(MutexState(secrets.token_bytes(16)), SeenFailures())


class _Target(Target):
    def __init__(self, state: MutexState, seen: SeenFailures) -> None:
        super().__init__(state.count_pending)
        self._state = state
        self._seen = seen

    def make_handle(self) -> Mutex:
        return Mutex(self._state, self._seen.copy())

    def for_other_process(self) -> Any:
        seen = list(self._seen.deaths), self._seen.thread_failures
        return _receive, (self._state.name, seen), self._state.handle_descriptors()


def _target_of(mutex: Mutex) -> Target:
    return _Target(mutex._state, mutex._state.present_failures())


def _receive(fds: list[int], name: bytes, seen: tuple[list[int], int]) -> HandleRef:
    failures = SeenFailures(set(seen[0]), seen[1])
    with find_state(name) as state:
        if state is None:
            return HandleRef(_Target(MutexState(name, fds), failures))
        ref = HandleRef(_Target(state, failures))
    close_fds(fds)
    state.table.count_handle_received()
    return ref


register_handle(Mutex, _target_of)
