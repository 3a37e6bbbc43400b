"""Opens queues by name: in this process, in another one of the tree, or newly.

Invariants:

* A name is created under the namespace's lock, after making sure, under it, that no living process owns it.
* ``_owned`` holds this process's named queues, each with the thread that created it. That thread gets its own handle
  again (a notebook cell can be run twice); every other thread gets a worker's handle, as every other process does.
* A closed queue's name is remembered while workers are alive that were started before the closing: by the directory
  towards processes, and in ``_closed`` towards threads of this process.
"""

from __future__ import annotations

import threading
import time
import weakref
from dataclasses import dataclass
from typing import NoReturn

from ..errors import QueueClosed
from ..transport import cleanup, directory
from ..transport.fork import reset_in_child
from ..workers import threads, worker
from .handle import WorkQueue
from .owner import Owner
from .thread import ThreadSide
from .worker import WorkerSide, seated


@dataclass(slots=True)
class _Owned:
    owner: Owner
    thread: weakref.ref[threading.Thread]
    handle: weakref.ref[WorkQueue]


_owned: dict[str, _Owned] = {}
#: Queues of this process that were closed, and when, for threads that were workers then and may not have come yet.
_closed: dict[str, tuple[float, Owner]] = {}
_leftovers: list[Owner] = []
#: Over these; held for moments only: whoever closes takes it.
_guard = threading.RLock()
#: Held by who opens or creates a name, which may have to wait for another process.
_opening = threading.RLock()


@reset_in_child
def _forget() -> None:
    global _owned, _guard, _opening
    _owned, _guard, _opening = {}, threading.RLock(), threading.RLock()
    _leftovers.clear()
    _closed.clear()


def workqueue(name: str | None = None, *misplaced: NoReturn, capacity: int | None = None) -> WorkQueue:
    """Open a workqueue, or create it.

    Whoever creates a queue gets its owner's handle, and gets it again by opening the name again in the same thread.
    Every other thread, and every process below the owner, that opens the same name gets a worker's handle;
    ``WorkQueue.creator`` tells which. A name is visible in the process tree of its owner only. A name whose owner has
    closed it or has died can be created again.

    Args:
        name: the queue's name; None makes an anonymous queue, which reaches workers as an argument of
            :func:`torchwq.map` or inside a message.
        capacity: how many questions may wait to be taken before the owner's ``write`` blocks; None: any number.

    Returns:
        A :class:`WorkQueue`, usable as a context manager that closes it.

    Raises:
        ValueError: ``capacity`` is less than 1, or differs from that of the existing queue; or the name is empty.
        TypeError: ``name`` is not a string.
        NamespaceError: the name can be neither opened nor created.

    Source: torch-ipc's ``ipc.workqueue``.
    """
    if misplaced:
        raise TypeError(f"workqueue takes nothing but a name by position; say what it is: capacity={misplaced[0]!r}")
    if not isinstance(capacity, (int, type(None))):
        raise TypeError(f"capacity must be a number, or None for any number, not {type(capacity).__name__}")
    if capacity is not None and capacity < 1:
        raise ValueError(f"capacity must be at least 1, or None for any number, not {capacity}")
    if name is None:
        return WorkQueue(Owner(capacity, Owner.release), None)
    if not isinstance(name, str):
        raise TypeError(f"a queue's name must be a string, not {type(name).__name__}")
    if not name:
        raise ValueError("a queue's name must not be empty; leave it out for an anonymous queue")
    with _opening:
        handle = _open_here(name) or _open_elsewhere(name) or _create(name, capacity)
    if capacity is not None and handle.capacity != capacity:
        existing = handle.capacity
        if not handle.creator:
            handle.close()
        raise ValueError(f"the queue {name!r} exists with capacity {existing}, not {capacity}")
    return handle


def labelled(label: str) -> WorkQueue:
    """An anonymous queue, which ``python -m torchwq top`` shows with a label."""
    return WorkQueue(Owner(None, Owner.release, label), None)


def _open_here(name: str) -> WorkQueue | None:
    owned = _owned.get(name)
    if owned is None:
        return _open_closed(name)
    handle = owned.handle()
    if handle is None:
        owned.owner.close()  # garbage already, but not closed yet
        return None
    if owned.thread() is threading.current_thread():
        return handle
    return WorkQueue(ThreadSide(owned.owner), name)


def _open_closed(name: str) -> WorkQueue | None:
    """What a thread that is a worker, and late, can still have of a queue that was closed after it was started."""
    process = threads.current()
    if process is None or name not in _closed or process.requested_at > _closed[name][0]:
        return None
    owner = _closed[name][1]
    if owner.questions.is_over():
        raise QueueClosed(f"the queue {name!r} was closed before this worker came to open it")
    return WorkQueue(ThreadSide(owner), name)


def _open_elsewhere(name: str) -> WorkQueue | None:
    answer = directory.ask(name)
    if answer is None:
        return None
    connection, (reply, fds) = answer
    if reply == b"C":
        connection.close()
        raise QueueClosed(f"the queue {name!r} was closed before this worker came to open it")
    side: WorkerSide = seated(fds, connection, reply)
    return WorkQueue(side, name)


def _create(name: str, capacity: int | None) -> WorkQueue:
    here = directory.get()
    with here.space.locked():
        handle = _open_elsewhere(name)  # someone may have been faster
        if handle is not None:
            return handle
        owner = Owner(capacity, lambda owner: _withdraw(name, owner), name)
        handle = WorkQueue(owner, name)
        with _guard:
            _owned[name] = _Owned(owner, weakref.ref(threading.current_thread()), weakref.ref(handle))
            closed = _closed.pop(name, None)
        if closed is not None:
            closed[1].count_pending(-1)
        here.publish(name, owner.open_by_name)
    return handle


def _withdraw(name: str, owner: Owner) -> None:
    """The owner closes: give up the name, but not towards workers that are on their way to it."""
    with _guard:
        if name in _owned and _owned[name].owner is owner:
            del _owned[name]
        if any(each.peer.same_process for each in worker.active_workers()) and name not in _closed:
            _closed[name] = time.monotonic(), owner
            owner.count_pending(1)  # until none of them can come any more
    here = directory.existing()
    if here is None:
        owner.release()
        return
    remember = bool(worker.active_workers())
    leftovers = remember and owner.has_leftovers()
    here.withdraw(name, owner.open_by_name, remember=remember, leftovers=owner.open_by_name if leftovers else None)
    if leftovers:
        _leftovers.append(owner)
    else:
        owner.release()


class _Janitor(worker.EndListener):
    """Forgets closed names once the last worker has ended that could still have asked for them."""

    def on_worker_end(self, process: worker.Worker) -> None:
        if not worker.active_workers() or process.peer.same_process:
            # What is closed after this is for workers that are started after this, whoever lives now.
            now = time.monotonic_ns()
            cleanup.call_soon(lambda: self._forget_closed(now))  # which waits for the lock of the names

    def _forget_closed(self, now: int) -> None:
        if not any(each.peer.same_process for each in worker.active_workers()):
            with _guard:
                closed = {name: (at, owner) for name, (at, owner) in _closed.items() if at < now / 1e9}
                for name in closed:
                    del _closed[name]
            for _, owner in closed.values():
                owner.count_pending(-1)
        here = directory.existing()
        if here is None or worker.active_workers():
            return
        here.forget_closed(now)
        for leftover in list(_leftovers):
            if leftover.closed_ns < now:
                _leftovers.remove(leftover)
                leftover.release()


_janitor = _Janitor()
worker.add_end_listener(_janitor)


@reset_in_child
def _listen_again() -> None:
    worker.add_end_listener(_janitor)
