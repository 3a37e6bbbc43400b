"""``WorkQueue``: what users hold. It marshals, and leaves the rest to the role that the handle has."""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass
from pickle import dumps, loads
from typing import Any, final

from .. import tracebacks
from ..errors import QueueClosed
from ..handles.readable import EMPTY, STOP, ReadableHandle
from ..handles.reference import HandleRef, Target, register_handle
from ..handles.writing import send_async
from ..marshalling import codec
from ..marshalling.codec import encode, encode_large_pickle
from ..marshalling.copies import COLLECTIONS, SCALARS, only_scalars, try_copy
from ..marshalling.fast_path import decode_plain, encode_plain
from ..marshalling.wire import PICKLES
from ..memory.anonymous import Descriptor
from ..transport import cleanup
from ..transport.endpoint import Received
from ..transport.kinds import handover_size
from ..transport.link import Link
from ..transport.trailer import KIND
from ..workers import shutdown
from . import draining
from .owner import Owner
from .role import Role, open_roles
from .thread import ThreadSide
from .worker import WorkerSide, accept


@dataclass(frozen=True, slots=True)
class QueueStatistics:
    """A snapshot of a handle's traffic.

    Attributes:
        written: objects written through an owner's handle, or through this worker's handle.
        taken: how many of the owner's questions workers have taken; at a worker's handle, as far as it knows.
        unsent: objects that wait in this process because the socket is full.
        handles: workers' handles on the queue that are open now; 0 for a worker's handle.
    """

    written: int
    taken: int
    unsent: int
    handles: int


@final
class WorkQueue(ReadableHandle[Any]):
    """A queue between one owner and its workers. Made by :func:`torchwq.workqueue`.

    The owner writes questions and reads answers; workers read questions and write answers. Each question is taken by
    one worker. The role belongs to the handle, which may be used from several threads of its process. An anonymous
    queue reaches workers as an argument of :func:`torchwq.map` or inside a message; whoever receives it gets a worker's
    handle.

    Plain objects travel by value, torch tensors and storages by reference (see :meth:`write`).

    Source: torch-ipc's ``ipc.workqueue``.
    """

    __slots__ = ("__weakref__", "_name", "_role")

    def __init__(self, role: Owner | WorkerSide | ThreadSide, name: str | None) -> None:
        self._role = role
        self._name = name
        if name is not None and isinstance(role, Owner):
            role.members.is_reachable = True
        weakref.finalize(self, _close_later, role).atexit = False

    @property
    def name(self) -> str | None:
        """The name it was opened by; None for an anonymous queue."""
        return self._name

    @property
    def creator(self) -> bool:
        """True if this handle has the owner's role, because it created the queue; False for a worker's handle."""
        return isinstance(self._role, Owner)

    @property
    def capacity(self) -> int | None:
        """How many questions may wait to be taken before the owner's ``write`` blocks; None: any number."""
        return self._role.capacity

    @property
    def closed(self) -> bool:
        """True if this handle cannot be used any more."""
        return bool(self._role.closed)

    def write(self, *objs: Any, timeout: float | None = None) -> None:
        """Write each of ``objs``: questions, if this is the owner's handle, else answers.

        All of them are marshalled before the first is sent, so a failing write leaves the queue as it was. Never blocks
        unless the queue has a ``capacity``. Tensors and storages anywhere in an object travel by reference: they are
        moved to shared memory in place, if they are not there, and reader and writer then look at the same memory.
        Everything else is copied. Functions travel as code; one that would drag data along is refused.

        Args:
            *objs: any objects; each takes one ``read`` at the other side.
            timeout: for questions of a queue with a ``capacity``, how long to wait for room at most, in seconds; None
                waits for ever.

        Raises:
            MarshalError: an object cannot travel; the message names its place, e.g. ``args[0]['model'].hook``.
            ClosureError: a function or class captures data; see :meth:`writeup`.
            QueueClosed: the queue or this handle is closed.
            queue.Full: there was no room within ``timeout``. The objects before the one without room were written.
            WorkerDied: only with ``capacity``: no worker is left that could take a question.
            ResourceError: memory or file descriptors have run out.

        Source: torch-ipc's ``q:write``; ``queue.Queue.put`` for ``queue.Full``.
        """
        role = self._role
        if timeout is not None and isinstance(role, Owner):
            deadline = time.monotonic() + timeout
            for payload in codec.encode_all(objs, role.max_payload, peer=role.peer):
                role.send_within(payload, deadline)
            return
        send = role.send
        if len(objs) == 1:
            obj, tried_plain = objs[0], False
            if encode_plain is not None and role.peer.shares_memory and not role.peer.same_process:
                plain_payload = encode_plain(obj, role.max_payload)
                if plain_payload is not None:
                    send(plain_payload)
                    return
                tried_plain = True
            cls = type(obj)
            try:
                # As encode does, without calling it.
                plain = only_scalars(map(type, obj)) if cls is tuple else cls in SCALARS
            except TypeError:  # the class of some class cannot be hashed
                plain = False
            if plain:
                if not role.peer.same_process:
                    bare, limit = dumps(obj, 5), role.max_payload
                    send(bare if len(bare) <= limit else encode_large_pickle(bare, limit))
                    return
                if cls is tuple:
                    send(obj)
                    return
            elif role.peer.same_process and (copy := try_copy(obj)) is not None:
                send(copy)
                return
            try:
                payload = encode(obj, role.max_payload, peer=role.peer, tried_plain=tried_plain)
            except Exception:
                pass
            else:
                send(payload)
                return
        for payload in codec.encode_all(objs, role.max_payload, peer=role.peer):
            send(payload)

    async def awrite(self, *objs: Any, timeout: float | None = None) -> None:
        """Write on asyncio's event loop: like :meth:`write`, without blocking it while a bounded queue has no room.

        A task that is cancelled while it waits has written the objects before the one without room.

        Raises:
            TimeoutError: there was no room within ``timeout`` seconds.
            MarshalError, ClosureError, QueueClosed, WorkerDied, ResourceError: as for :meth:`write`.
        """
        role = self._role
        if isinstance(role, Owner):
            await send_async(role.send_within, codec.encode_all(objs, role.max_payload, peer=role.peer), timeout)
        else:
            self.write(*objs)  # for answers there is always room

    def writeup(self, *objs: Any) -> None:
        """Like :meth:`write`, but functions may be closures: what they capture travels with them.

        Tensors among it travel by reference, everything else by value, as always.

        Raises:
            MarshalError, QueueClosed, WorkerDied, ResourceError: as for :meth:`write`.

        Source: torch-ipc's ``q:writeup``.
        """
        role = self._role
        send = role.send
        for payload in codec.encode_all(objs, role.max_payload, upvalues=True, peer=role.peer):
            send(payload)

    def read(self, nonblocking: bool = False, *, timeout: float | None = None) -> Any:
        """Read the next object: an answer, if this is the owner's handle, else a question. First in, first out.

        Args:
            nonblocking: return None at once if nothing is there.
            timeout: how long to wait at most, in seconds; None waits for ever.

        Returns:
            The object. None may also be a value that was written: by convention, it tells a worker to finish.

        Raises:
            queue.Empty: nothing came within ``timeout``.
            QueueClosed: the queue is closed and everything in it has been read, or this handle is closed.
            WorkerDied: at the owner: a worker died (once for each), or no worker is left and nothing is there to read.

        A Ctrl-C that ends the wait takes nothing from the queue.

        Source: torch-ipc's ``q:read``; ``queue.Queue.get`` for ``queue.Empty``.
        """
        role = self._role
        received = role.take()
        if received is None:
            received = role.wait(nonblocking, timeout)
            if received is None:
                return None
        data: Any
        data, fds = received
        if decode_plain is not None and (found := decode_plain(data, fds)) is not NotImplemented:
            return found
        if fds:
            return data if type(data) in COLLECTIONS else codec.decode_any(data, fds)
        return loads(data) if data[KIND] in PICKLES else codec.decode_any(data, fds)

    def _tell_no_failures(self) -> None:
        """Do not tell the owner of workers that fail: who has made it for his own use hears of that otherwise."""
        assert isinstance(self._role, Owner)
        self._role.troubles.tells_failures = False

    def drain(self, timeout: float | None = None) -> None:
        """Wait until every question written so far has its answer waiting here.

        Counts one answer for each question. A question whose taker has ended, or has taken another, is not waited for.

        Args:
            timeout: how long to wait at most, in seconds; None waits for ever.

        Raises:
            TimeoutError: not within ``timeout``; ``drain`` can be called again.
            WorkerDied: a worker died (once for each), or no worker is left.
            QueueClosed: the queue is closed.
            TypeError: this is a worker's handle.

        Source: torch-ipc's ``q:drain``.
        """
        if not isinstance(self._role, Owner):
            raise TypeError("only the owner of a workqueue can drain it; this is a worker's handle")
        try:
            draining.drain(self._role, timeout)
        except Exception as error:
            tracebacks.trim(error)
            raise error

    def close(self) -> None:
        """Close this handle; if it is the owner's, the queue. May be called again.

        What was written before the owner closed is still read by workers; then they get QueueClosed. Never blocks.

        Source: torch-ipc's ``q:close``.
        """
        self._role.close()

    def statistics(self) -> QueueStatistics:
        """Count what has passed through this handle."""
        role = self._role
        if isinstance(role, Owner):
            written, untaken, handles = role.counts()
            return QueueStatistics(written, written - untaken, role.unsent, handles)
        return QueueStatistics(role.written, role.last_taken, role.unsent, 0)

    def _read_nowait(self) -> Any:
        received = self._role.take()
        return EMPTY if received is None else codec.decode(*received)

    def _source(self) -> Role:
        return self._role

    def _result_of(self, received: Received) -> Any:
        return codec.decode(*received)

    def _result_at_end(self) -> None:
        """None: a queue tells of its end by QueueClosed."""

    def _iteration_item(self, found: Any) -> Any:
        return STOP if found is None else found

    @property
    def _was_forked(self) -> bool:
        return "fork" in self._role.closed

    def _exit_context(self, failed: bool) -> None:
        if failed and not isinstance(self._role, Owner):
            self._role.close(in_doubt=True)  # the owner is told if that ends the worker
        else:
            self._role.close()

    def __repr__(self) -> str:
        role = "owner" if self.creator else "worker"
        name = "anonymous" if self._name is None else repr(self._name)
        if self.closed:
            return f"<torchwq.WorkQueue {name}, {role}, closed>"
        counts = self.statistics()
        return f"<torchwq.WorkQueue {name}, {role}, written={counts.written}, taken={counts.taken}>"

    def __reduce__(self) -> Any:
        raise TypeError(
            "a WorkQueue can only be sent by torchwq: as an argument of torchwq.map, BackgroundTask or a pool's task, "
            "or inside a message; in a process started otherwise, open it by its name"
        )


def _close_later(role: Role) -> None:
    """The handle is garbage, which is collected at any moment, in any thread, with any lock held."""
    if role in open_roles:
        cleanup.call_soon(role.close)


class _OwnedHere(Target):
    """A queue whose owner is in this process. A handle on one that was closed meanwhile still reads what is left."""

    far_kind = "queue"

    def __init__(self, owner: Owner, name: str | None) -> None:
        super().__init__(owner.count_pending)
        self._owner = owner
        self._name = name

    def shown(self) -> dict[str, Any]:
        return {"name": self._name, "capacity": self._owner.capacity}

    def make_handle(self) -> WorkQueue:
        return WorkQueue(ThreadSide(self._owner), self._name)

    def for_other_process(self) -> Any:
        return _receive, (self._name,), self._owner.handle_descriptors()


class _OwnedElsewhere(Target):
    """A queue whose owner is in another process.

    It has descriptors from when the message was written, so that it holds although the handle may be closed meanwhile.
    They make one handle, or go to one other process. More than that needs an open handle: the one that was sent, or the
    first one made from it.
    """

    def __init__(self, fds: list[Descriptor], role: WorkerSide | None, name: str | None) -> None:
        super().__init__()
        self._fds = fds
        self._role = role
        self._name = name

    def make_handle(self) -> WorkQueue:
        fds = [each.detach() for each in self._take()]
        role = accept(fds[:-1], Link(fds[-1]))
        self._role = self._role or role
        return WorkQueue(role, self._name)

    def for_other_process(self) -> Any:
        return _receive, (self._name,), self._take()

    def _take(self) -> list[Descriptor]:
        fds, self._fds = self._fds, []
        if fds:
            return fds
        if self._role is None or self._role.closed:
            raise QueueClosed("the handle that was sent is closed")
        return self._role.handle_descriptors()


def _target_of(handle: WorkQueue) -> Target:
    """Whoever gets it has a worker's handle."""
    role = handle._role
    if role.closed:
        raise QueueClosed(f"a closed workqueue cannot be sent: {role.closed}")
    if isinstance(role, WorkerSide):
        return _OwnedElsewhere(role.handle_descriptors(), role, handle._name)
    owner = role if isinstance(role, Owner) else role.owner
    owner.members.is_reachable = True
    return _OwnedHere(owner, handle._name)


def _receive(fds: list[int], name: str | None) -> HandleRef:
    assert len(fds) >= handover_size() + 2
    return HandleRef(_OwnedElsewhere([Descriptor(fd) for fd in fds], None, name))


register_handle(WorkQueue, _target_of)


def _close_all() -> None:
    """At exit: owners close, workers' answers and goodbyes leave."""
    roles = list(open_roles)
    for role in roles:
        role.close()
    for role in roles:
        if isinstance(role, WorkerSide):
            role.wait_sent()


shutdown.at_close(_close_all)
