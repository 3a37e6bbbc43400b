"""What multiprocessing knows how to send: by its own reducers, and only to a process that is being started.

Two kinds of objects, and here is what becomes of them:

* Those with a reducer of multiprocessing's (``multiprocessing.reduction.register``): its connections, sockets, and
  whatever a library has registered. The reducer asks for a duplicate of each descriptor that it sends (``DupFd``). It
  gets one that travels with our message. So they may be in any message.
* Those that multiprocessing only lets processes inherit (``context.assert_spawning``): locks, events, queues, shared
  values. They may be in the message that a worker is started with; any other message refuses them.

multiprocessing asks for both what process it is starting: ``Popen``, which each of its start methods has. Here a worker
is started by a message, and :class:`_PopenForMessage` plays that part while the message is encoded.

Invariants:

* A descriptor never travels as its number: a :class:`Descriptor`, which owns a duplicate, travels in its place.
* A semaphore goes by its name, which is gone when its maker lets go of it. So whoever starts the worker holds what
  ``encoder.worker_resources`` collects until the worker has ended.
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing.connection
import socket
from collections.abc import Iterator
from multiprocessing import context
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any, Final

from ..errors import MarshalError
from ..memory.anonymous import Descriptor
from ..transport import descriptors
from . import reducers
from .reducers import Encoder, attached_object, is_local_message, take_inbound_fd

_registered: Final[dict[type, Any]] = getattr(ForkingPickler, "_extra_reducers", {})
#: What pickle itself does at least as well: methods and partials.
_PICKLES_OWN: Final = frozenset(
    cls for cls, reducer in _registered.items() if reducer.__module__ == "multiprocessing.reduction"
) - {socket.socket}


class _DuplicatedFd(int):
    """A duplicate's number here; it arrives as the number that the descriptor has there."""

    owner: Descriptor


class _PopenForMessage:
    """What multiprocessing's reducers get a duplicate of a descriptor from, for the process that is being started."""

    def duplicate_for_child(self, fd: int) -> _DuplicatedFd:
        number = _DuplicatedFd(_duplicate(fd))
        number.owner = Descriptor(int(number))
        return number

    def DupFd(self, number: _DuplicatedFd) -> Descriptor:
        return number.owner


_popen: Final[Any] = _PopenForMessage()


@contextlib.contextmanager
def spawning_context() -> Iterator[None]:
    """Within it, multiprocessing takes this thread for one that starts a process."""
    before = context.get_spawning_popen()
    context.set_spawning_popen(_popen)
    try:
        yield
    finally:
        context.set_spawning_popen(before)


def _duplicate(fd: int) -> int:
    try:
        return descriptors.dup(fd)
    except OSError as error:
        if error.errno == errno.EBADF:
            raise ValueError("it is closed") from error
        raise


def _reduce_descriptor(encoder: Encoder, descriptor: Descriptor) -> Any:
    return Descriptor, (_fd_index(encoder, descriptor),)


def _reduce_number(encoder: Encoder, number: _DuplicatedFd) -> Any:
    return int, (_fd_index(encoder, number.owner),)


class _FdIndex:
    """Is pickled as the number that a descriptor of the message has where it is read."""

    def __init__(self, index: int) -> None:
        self._index = index

    def __reduce__(self) -> Any:
        return _take, (self._index,)


def _fd_index(encoder: Encoder, descriptor: Descriptor) -> _FdIndex:
    if encoder.peer.same_process:
        return _FdIndex(encoder.attach_object(descriptor))
    return _FdIndex(encoder.attach_fd(descriptor.fd, descriptor))


def _take(index: int) -> int:
    return _duplicate(attached_object(index).fd) if is_local_message() else take_inbound_fd(index)


def _reduce_registered(encoder: Encoder, obj: Any) -> Any:
    """As multiprocessing's reducer for its type would have it, in a message of ours."""
    reducer = _registered[type(obj)]
    if reducer is _reduce_ctype:
        if not hasattr(obj, "_wrapper"):
            return NotImplemented  # memory of its own, of a type that somebody has shared, too
        _check_starting(encoder, obj)
    with spawning_context():
        return reducer(obj)


def _reduce_connection(encoder: Encoder, connection: Connection) -> Any:
    """One of a subclass, of which pickle would send the number of its descriptor."""
    with spawning_context():
        _, args = multiprocessing.connection.reduce_connection(connection)  # type: ignore[attr-defined]
    more = {name: value for name, value in vars(connection).items() if name not in _CONNECTIONS_OWN}
    return _rebuild_connection, (type(connection), *args), more or None


_CONNECTIONS_OWN: Final = frozenset({"_handle", "_readable", "_writable"})


def _rebuild_connection(cls: Any, fd: Descriptor, readable: bool, writable: bool) -> Connection:
    connection: Connection = cls.__new__(cls)
    Connection.__init__(connection, fd.detach(), readable, writable)
    return connection


def _check_starting(encoder: Encoder, obj: Any) -> list[Any]:
    if encoder.worker_resources is None:
        kind = type(obj).__name__
        raise RuntimeError(
            f"{kind} objects should only be shared between processes through inheritance: let a worker begin with it, "
            f"as an argument of map or BackgroundTask, of a pool's initializer, or in the dataset of a loader"
        )
    if not encoder.peer.passes_descriptors:
        raise MarshalError(f"a {type(obj).__name__} of multiprocessing is one of this machine, and stays there")
    return encoder.worker_resources


def _reduce_inherited(encoder: Encoder, obj: Any) -> Any:
    _check_starting(encoder, obj)
    return NotImplemented


def _reduce_semaphore(encoder: Encoder, lock: Any) -> Any:
    held = _check_starting(encoder, lock)
    if encoder.peer.same_process:
        return attached_object, (encoder.attach_object(lock),)
    if lock._semlock.name is None:
        kind = type(lock).__name__
        raise RuntimeError(
            f"this {kind} was made for processes that are forked, and has no name by which another one could find it: "
            f"make it with multiprocessing.get_context('spawn').{kind}(), or call set_start_method('spawn') before"
        )
    held.append(lock)
    return NotImplemented


def _reduce_arena(encoder: Encoder, arena: Any) -> Any:
    """The memory of shared values; here once more would hold a descriptor for ever."""
    _check_starting(encoder, arena)
    return (
        (attached_object, (encoder.attach_object(arena),))
        if encoder.peer.same_process
        else _reduce_registered(encoder, arena)
    )


reducers.register(Descriptor, _reduce_descriptor)
reducers.register(_DuplicatedFd, _reduce_number)
reducers.register_family(Connection, _reduce_connection)
reducers.register_fallback(_registered, _PICKLES_OWN, _reduce_registered)
_reduce_ctype: Any = None
try:
    from multiprocessing import heap, queues, sharedctypes, synchronize
except ImportError:  # a system without semaphores, where nobody has such things
    pass
else:
    _reduce_ctype = getattr(sharedctypes, "reduce_ctype", None)
    reducers.register(heap.Arena, _reduce_arena)
    reducers.register_family(synchronize.SemLock, _reduce_semaphore)
    for _cls in (
        synchronize.Condition,
        synchronize.Event,
        synchronize.Barrier,
        queues.Queue,
        queues.SimpleQueue,
        sharedctypes.SynchronizedBase,
    ):
        reducers.register_family(_cls, _reduce_inherited)
