"""``torchwq.mutex``: a lock, and a barrier, between processes and threads.

The lock is a record lock of the kernel, on the roster that all processes share which have the mutex: it ends with the
process that holds it, however that ends. A word beside it says who holds it; whoever gets the lock and finds somebody
there knows that he died with it. A barrier is a few words under the roster's lock, and a descriptor that wakes all who
wait.

Invariants:

* Whoever holds the record lock, or has just got it, and nobody else, writes HOLDER. It is 0 whenever the lock was
  released; so one who gets the lock and finds another value succeeds a holder that died, or whose thread ended.
* Among the threads of a process ``_inside`` comes first: a record lock is the process's.
* The words of the barrier are changed under the roster's lock. A round ends when its number changes: because as many
  have arrived as it needs, or, BROKEN, because a death was noticed. It is counted from 0 again then.
* Each handle is told, once, of each death since it was sent: at a barrier where it waits, or before it has arrived at
  the next one.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, final

from .errors import MutexError, WorkerDied
from .marshalling import invitation, reducers
from .memory import anonymous
from .memory.parcel import Ticket
from .memory.roster import FIRST_OF_HEAD, FIRST_OF_SEAT, Roster
from .transport import reactor
from .transport.process import closed_in_child, reset_in_child
from .transport.sockets import close_fds
from .workers import info, shutdown, threads, worker
from .workers.losses import lost
from .workers.presence import Presence

#: Words of the roster's head: who holds the lock; the barrier's round, how many have arrived in it, how many it needs;
#: how many workers that are threads have failed; how many handles were given up. And, for the last round of either
#: parity: its number plus one if it was broken; how many have gone on after it. How many losses there had been when
#: the first one arrived: of these all who wait have been told.
HOLDER, ROUND, ARRIVED, NEEDED, FAILURES, LEFT = range(FIRST_OF_HEAD, FIRST_OF_HEAD + 6)
BROKEN, GONE_ON, LOSSES = FIRST_OF_HEAD + 6, FIRST_OF_HEAD + 8, FIRST_OF_HEAD + 10
#: Words of a seat: handles sent to other processes, and received; how many threads wait at the barrier.
ISSUED, REDEEMED, WAITING = range(FIRST_OF_SEAT, FIRST_OF_SEAT + 3)

#: Whoever waits looks at least so often, in seconds.
_SLICE: Final = 0.25
#: How long one that must not block sleeps between two tries, in seconds: at first, and at most.
_FIRST_SLEEP, _LONGEST_SLEEP = 0.0001, 0.005

_FORKED: Final = "this mutex was made before a fork and belongs to the parent process: pass it to workers of torchwq"


@dataclass(slots=True)
class _News:
    """The deaths that a handle has been told of: dead seats, and how many workers that are threads had failed."""

    seats: set[int] = field(default_factory=set)
    failures: int = 0


class _Core:
    """One process's part of a mutex. Takes over ``fds``: those of ``ticket``, or none to make a new one."""

    def __init__(self, name: bytes, fds: Sequence[int] = ()) -> None:
        self.name = name
        self.roster = Roster(fds[0] if fds else None)
        self._events = list(fds[1:]) if fds else _new_events()
        self._words = self.roster.words
        self._seat = self.roster.index(self.roster.seat)
        self._inside = threading.Lock()
        self._holder = 0
        self._thread = threading.local()
        self.abandoned: WorkerDied | None = None
        self.handles: weakref.WeakSet[Mutex] = weakref.WeakSet()
        #: Threads of this process that have come to the barrier.
        self._users: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
        self.under_way = 0
        self.forked = self.left = False
        if fds:
            self._count(REDEEMED)
        closed_in_child(self)
        _open.add(self)
        _cores[name] = self

    def _count(self, word: int, number: int = 1) -> None:
        with self.roster.locked():
            self._words[self._seat + word] += number

    def check(self) -> None:
        if self.forked:
            raise MutexError(_FORKED)
        if self.left:
            raise MutexError("this process is ending, and has given up its mutexes")

    # The lock

    def acquire(self, deadline: float | None) -> bool:
        self.check()
        me = threading.get_ident()
        if self._holder == me:
            raise MutexError("this thread holds the mutex already: it would wait for itself")
        if not self._inside.acquire(timeout=-1 if deadline is None else max(0.0, deadline - time.monotonic())):
            return False
        try:
            if not self._lock(deadline):
                self._inside.release()
                return False
        except BaseException:
            self._inside.release()
            raise
        before = int(self._words[HOLDER])
        try:
            self._words[HOLDER] = os.getpid()
            self._holder = me
            if not hasattr(self._thread, "presence"):
                self._thread.presence = Presence(self, me)
            self.abandoned = None if not before else self._successor_of(before)
        except BaseException as error:
            # A warning that is an error has told; after Ctrl-C the next one is told.
            self._words[HOLDER] = 0 if isinstance(error, Warning) else before
            self._let_go()
            raise
        return True

    def _lock(self, deadline: float | None) -> bool:
        if deadline is None:
            return self.roster.lock_extra(wait=True)
        sleep = _FIRST_SLEEP
        while not self.roster.lock_extra(wait=False):
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(sleep, left))
            sleep = min(2 * sleep, _LONGEST_SLEEP)
        return True

    def _successor_of(self, pid: int) -> WorkerDied:
        text = "the last holder of this mutex"
        process = worker.find(pid)
        if pid == os.getpid():
            death = WorkerDied(f"{text}, a thread of this process, ended without having released it", pid=pid)
        elif process is not None and process.ended_event.wait(1.0):
            died = process.died()
            death = WorkerDied(
                f"{text} ended without having released it: {died}",
                mapid=died.mapid,
                pid=pid,
                signal=died.signal,
                exitcode=died.exitcode,
            )
        else:
            death = WorkerDied(f"{text}, process {pid}, ended without having released it", pid=pid)
        warnings.warn(f"{death}. What the mutex protects may be half done", RuntimeWarning, stacklevel=4)
        return death

    def release(self) -> None:
        self.check()
        if self._holder != threading.get_ident():
            raise MutexError("this thread does not hold the mutex, and cannot release it")
        self._words[HOLDER] = 0
        self._let_go()

    def _let_go(self) -> None:
        self._holder = 0
        self.abandoned = None
        self.roster.unlock_extra()
        self._inside.release()

    def thread_ended(self, ident: int) -> None:
        """If it has the lock, the next one gets it, and is told: HOLDER stays."""
        if self._holder == ident and not self.left and not self.forked:
            self._let_go()

    # The barrier

    def news(self) -> _News:
        """All that there is to tell now."""
        self.check()
        seats = {seat for seat, lives in self.roster.others() if not lives}
        return _News(seats, int(self._words[FAILURES]))

    def barrier(self, n: int, timeout: float | None, told: _News) -> int:
        self.check()
        self._users.add(threading.current_thread())
        deadline = None if timeout is None else time.monotonic() + timeout
        words = self._words
        with self.roster.locked():
            if self._has_news(told):
                if words[ARRIVED] and self._losses() > words[LOSSES]:
                    self._break_round()  # who waits has not been told yet
                self._raise_news(told)
            number = int(words[ROUND])
            if not words[ARRIVED]:
                words[NEEDED], words[LOSSES] = n, self._losses()
            elif words[NEEDED] != n:
                raise ValueError(f"a barrier of {int(words[NEEDED])} is waited for already, and this one is of {n}")
            if words[ARRIVED] + 1 == n:
                self._end_round()
                return self._go_on(number)
            words[ARRIVED] += 1
            words[self._seat + WAITING] += 1
        timed_out = None
        try:
            self._wait_for_end_of(number, deadline, told)
        except TimeoutError as error:
            timed_out = error
        finally:
            with self.roster.locked():
                if not self.left:
                    words[self._seat + WAITING] -= 1
                    if words[ROUND] == number:
                        words[ARRIVED] -= 1
                        if timed_out is not None:
                            raise timed_out
        if words[BROKEN + number % 2] == number + 1:
            self._raise_news(told)
            raise WorkerDied(
                "the barrier cannot be completed: others that had this mutex have gone, and all that have it wait here"
            )
        with self.roster.locked():
            return self._go_on(number)

    def _go_on(self, number: int) -> int:
        """In which place this thread goes on after a round."""
        position = int(self._words[GONE_ON + number % 2])
        self._words[GONE_ON + number % 2] = position + 1
        return position

    def _end_round(self) -> None:
        number = int(self._words[ROUND])
        self._words[ARRIVED] = 0
        self._words[GONE_ON + number % 2] = 0
        self._words[ROUND] = number + 1
        if self._events:
            os.write(self._events[number % 2], (1).to_bytes(8, "little"))
            with contextlib.suppress(BlockingIOError):
                os.read(self._events[1 - number % 2], 8)

    def _break_round(self) -> None:
        number = int(self._words[ROUND])
        self._words[BROKEN + number % 2] = number + 1
        self._end_round()

    def _wait_for_end_of(self, number: int, deadline: float | None, told: _News) -> None:
        words = self._words
        poll = select.poll()
        if self._events:
            poll.register(self._events[number % 2], select.POLLIN)
        longest = _SLICE if self._events else _FIRST_SLEEP * 10
        while words[ROUND] == number:
            left = longest if deadline is None else min(longest, deadline - time.monotonic())
            if left <= 0:
                raise TimeoutError("not all have come to the barrier in time")
            poll.poll(left * 1000)
            self.check()
            if words[ROUND] == number:
                with self.roster.locked():
                    if words[ROUND] == number and (self._has_news(told) or self._nobody_comes()):
                        self._break_round()

    def _losses(self) -> int:
        return sum(not lives for _, lives in self.roster.others()) + int(self._words[FAILURES])

    def _has_news(self, told: _News) -> bool:
        if self._words[FAILURES] > told.failures:
            return True
        return any(not lives and seat not in told.seats for seat, lives in self.roster.others())

    def _raise_news(self, told: _News) -> None:
        for seat, lives in self.roster.others():
            if not lives and seat not in told.seats:
                told.seats.add(seat)
                death = lost(self.roster, seat, "this mutex")
                death.args = (f"the barrier cannot be completed: {death}",)
                raise death
        if self._words[FAILURES] > told.failures:
            told.failures = int(self._words[FAILURES])
            raise WorkerDied(
                "the barrier cannot be completed: a worker that had this mutex, a thread, ended with an error: join() "
                "of its map raises it"
            )

    def _nobody_comes(self) -> bool:
        """Whether some that had the mutex have given it up, and all that have it wait here already.

        Daemon threads of this process that have never come to the barrier are not known.
        """
        seats = [seat for seat, lives in self.roster.others() if lives]
        if self.under_way or any(not self._words[self.roster.index(seat) + WAITING] for seat in seats):
            return False
        waiting = int(self._words[self._seat + WAITING])
        if len(self.handles) > waiting:
            return False
        issued, redeemed = self.roster.sum(ISSUED), self.roster.sum(REDEEMED)
        if issued > redeemed and (worker.living() or info.worker_info() is not None):
            return False
        known = {thread for thread in list(self._users) if thread.is_alive()}.union(threads.of_user())
        return bool(self._words[LEFT]) and len(known) <= max(1, waiting)

    # Coming and going

    def ticket(self) -> list[anonymous.Descriptor]:
        self.check()
        try:
            first = Ticket(os.dup(self.roster.fd), self._count_issued)
            return [first, *(anonymous.Descriptor(os.dup(fd)) for fd in self._events)]
        except OSError as error:
            raise anonymous.exhausted(error) from error

    def _count_issued(self, number: int) -> None:
        if not self.left and not self.forked:
            self._count(ISSUED, number)

    def invite(self, number: int) -> None:
        """So many more handles are under way within this process."""
        with _guard:
            self.under_way += number
        if number < 0:
            _leave_later(self)

    def received_again(self) -> None:
        self._count(REDEEMED)

    def thread_ended_with_handle(self, failed: bool) -> None:
        if not self.left and not self.forked:
            with self.roster.locked():
                self._words[LEFT] += 1
                self._words[FAILURES] += int(failed)

    def leave(self, failed: bool = False) -> None:
        """Give up this process's part, and with it the lock. ``failed``: see ``Roster.leave``."""
        if self.left or self.forked:
            return
        with self.roster.locked():
            self.left = True
            self._words[LEFT] += 1
        close_fds(self._events)
        self.roster.leave(failed=failed)
        _open.discard(self)

    def abandon(self) -> None:
        self.forked = True
        close_fds(self._events)
        self._events = []


def _new_events() -> list[int]:
    """What wakes those who wait at a barrier: readable from the end of a round of its parity to the end of the next."""
    if not hasattr(os, "eventfd"):
        return []
    try:
        return [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2)]
    except OSError as error:
        raise anonymous.exhausted(error) from error


#: What is open in this process. A part outlives its handles, until the reactor comes by.
_open: set[_Core] = set()
_cores: weakref.WeakValueDictionary[bytes, _Core] = weakref.WeakValueDictionary()
_guard = threading.RLock()


@reset_in_child
def _forget() -> None:
    global _cores, _guard
    _cores, _guard = weakref.WeakValueDictionary(), threading.RLock()
    _open.clear()


@final
class Mutex:
    """A lock between any number of processes and threads, with a barrier. Made by :func:`torchwq.mutex`.

    ::

        with m:
            parameters.add_(update)

    It reaches workers as an argument of :func:`torchwq.map` or inside a message. It is not reentrant.

    A worker that dies with the lock held does not block the others: the next one gets the lock and is told, by a
    RuntimeWarning, and by what ``with`` gives: WorkerDied instead of None. What the mutex protects may be half done
    then::

        with m as death:
            if death is not None:
                repair(parameters)

    Source: torch-ipc's ``ipc.mutex``; the interface of ``threading.Lock``.
    """

    __slots__ = ("__weakref__", "_core", "_told")

    def __init__(self, core: _Core, told: _News) -> None:
        self._core = core
        self._told = told
        core.handles.add(self)
        threads.belongs_here(self)

    def acquire(self, timeout: float | None = None) -> bool:
        """Wait for the lock, and take it.

        Args:
            timeout: how long to wait at most, in seconds; 0 does not wait; None waits for ever.

        Returns:
            Whether the lock was taken; False after ``timeout``. :attr:`abandoned` tells whether the last holder died.

        Raises:
            MutexError: this thread holds the lock already, or the mutex was inherited by a fork.

        Source: torch-ipc's ``m:lock``; ``threading.Lock.acquire``.
        """
        return self._core.acquire(None if timeout is None else time.monotonic() + timeout)

    def release(self) -> None:
        """Give the lock to the next one.

        Raises:
            MutexError: this thread does not hold the lock.

        Source: torch-ipc's ``m:unlock``; ``threading.Lock.release``.
        """
        self._core.release()

    @property
    def abandoned(self) -> WorkerDied | None:
        """While the lock is held: how the last holder died, if it died with the lock held; else None."""
        return self._core.abandoned

    def barrier(self, n: int, *, timeout: float | None = None) -> int:
        """Wait until ``n`` threads, in whatever processes, wait here.

        It can be used again at once, also with another ``n``. It has nothing to do with the lock.

        Args:
            n: how many, with this one.
            timeout: how long to wait at most, in seconds; None waits for ever.

        Returns:
            A number from 0 to ``n - 1``, different for each: in which place this thread goes on.

        Raises:
            WorkerDied: the barrier may never be completed: a worker that had the mutex died, or ended with an error; or
                all that still have it wait here already. Everybody who waits is told, and whoever comes later, once for
                each death since they were sent the mutex. Those who are left can go on with a smaller ``n``.
            TimeoutError: not within ``timeout``; this thread does not count as arrived any more.
            ValueError: ``n`` is less than 1, or others wait for another ``n``.
            MutexError: the mutex was inherited by a fork.

        Source: torch-ipc's ``m:barrier``; ``threading.Barrier.wait``.
        """
        if n < 1:
            raise ValueError(f"a barrier needs at least 1 to come, not {n}")
        return self._core.barrier(n, timeout, self._told)

    def __enter__(self) -> WorkerDied | None:
        self._core.acquire(None)
        return self._core.abandoned

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._core.release()

    def let_go(self, worker: threads.ThreadWorker, failed: bool) -> None:
        """See ``threads.Belonging``."""
        self._core.handles.discard(self)
        self._core.thread_ended_with_handle(failed)

    def __del__(self) -> None:
        core = getattr(self, "_core", None)
        if core is not None:
            core.handles.discard(self)  # by itself it goes only when this is over, which the reactor does not wait for
            _leave_later(core)

    def __repr__(self) -> str:
        core = self._core
        if core.forked:
            return "<torchwq.Mutex, of another process>"
        state = "closed" if core.left else "locked" if core.roster.words[HOLDER] else "unlocked"
        return f"<torchwq.Mutex, {state}>"

    def __reduce__(self) -> Any:
        raise TypeError("a Mutex can only be sent by torchwq: as an argument of torchwq.map, or inside a message")


def _leave_later(core: _Core) -> None:
    if not core.left and not core.forked and not sys.is_finalizing():
        reactor.get().call_later(0, lambda: _leave_if_unused(core))


def _leave_if_unused(core: _Core) -> None:
    with _guard:
        if not len(core.handles) and not core.under_way:
            core.leave(shutdown.failed)


def mutex() -> Mutex:
    """Make a mutex.

    Returns:
        A :class:`Mutex`: a lock, usable with ``with``, and a barrier.

    Raises:
        ResourceError: file descriptors have run out.

    Source: torch-ipc's ``ipc.mutex``.
    """
    return Mutex(_Core(secrets.token_bytes(16)), _News())


class _Invitation(invitation.Invitation):
    """A handle under way within this process."""

    def __init__(self, core: _Core, told: _News | None = None) -> None:
        self.core = core
        self.told = told or core.news()
        super().__init__(core.invite)

    def accept(self) -> Mutex:
        handle = Mutex(self.core, _News(set(self.told.seats), self.told.failures))
        self.settle()
        return handle


def _reduce(encoder: reducers.Encoder, handle: Mutex) -> Any:
    return _accept, (_Invitation(handle._core),)


def _accept(invitation: _Invitation) -> Mutex:
    return invitation.accept()


def _reduce_invitation(encoder: reducers.Encoder, invitation: _Invitation) -> Any:
    core = invitation.core
    core.check()
    if encoder.here:
        return reducers.enclosed, (encoder.enclose(_Invitation(core, invitation.told)),)
    told = list(invitation.told.seats), invitation.told.failures
    return _rebuild, (core.name, told, [encoder.attach(ticket.fd, ticket) for ticket in core.ticket()])


def _rebuild(name: bytes, told: tuple[list[int], int], indices: Sequence[int]) -> _Invitation:
    news = _News(set(told[0]), told[1])
    fds = [reducers.take_inbound_fd(index) for index in indices]
    with _guard:
        core = _cores.get(name)
        if core is None or core.left:
            return _Invitation(_Core(name, fds), news)
        invitation = _Invitation(core, news)
    close_fds(fds)
    core.received_again()
    return invitation


reducers.register(Mutex, _reduce)
reducers.register(_Invitation, _reduce_invitation)


def _leave_all() -> None:
    for core in list(_open):
        core.leave(shutdown.failed)


shutdown.at_close(_leave_all)
