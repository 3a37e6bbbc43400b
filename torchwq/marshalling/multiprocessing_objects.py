"""Objects of multiprocessing, which pickle alone would send wrongly. There are two kinds:

* Objects with a reducer of multiprocessing (``multiprocessing.reduction.register``): connections, sockets, and what
  libraries have registered. They may be in any message. The reducer asks for a duplicate of each descriptor that it
  sends (``DupFd``), and gets one that travels with the message.
* Objects that processes inherit (``context.assert_spawning``): locks, events, queues, shared values. They may be in the
  message with which a worker begins. Any other message refuses them.

For both, multiprocessing asks which process it is starting: an object of the class ``Popen`` of its start method. While
a message is encoded, that is :class:`_PopenForMessage`.

Invariants:

* A descriptor never travels as its number: a :class:`Descriptor`, which owns a duplicate, travels in its place.
* A semaphore travels as its name, which disappears with its maker's object. So the process that starts a worker keeps
  the objects in ``encoder.worker_resources`` until the worker has ended.
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
#: Types with a reducer of multiprocessing that pickle sends as well: methods and partials.
_PICKLES_OWN: Final = frozenset(
    cls for cls, reducer in _registered.items() if reducer.__module__ == "multiprocessing.reduction"
) - {socket.socket}


class _DuplicatedFd(int):
    """The number of a duplicate. It arrives as the number that the descriptor has in the reader's process."""

    owner: Descriptor


class _PopenForMessage:
    """Takes the place of multiprocessing's ``Popen``, which duplicates descriptors for the process that it starts."""

    def duplicate_for_child(self, fd: int) -> _DuplicatedFd:
        number = _DuplicatedFd(_duplicate(fd))
        number.owner = Descriptor(int(number))
        return number

    def DupFd(self, number: _DuplicatedFd) -> Descriptor:
        return number.owner


_popen: Final[Any] = _PopenForMessage()


@contextlib.contextmanager
def spawning_context() -> Iterator[None]:
    """Let multiprocessing take this thread for one that starts a process."""
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
    """Pickles as the number that a descriptor of the message has in the reader's process."""

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
    """Reduce an object with multiprocessing's reducer for its type."""
    reducer = _registered[type(obj)]
    if reducer is _reduce_ctype:
        if not hasattr(obj, "_wrapper"):
            return NotImplemented  # a private object of a type that multiprocessing shares, too
        _check_starting(encoder, obj)
    with spawning_context():
        return reducer(obj)


def _reduce_connection(encoder: Encoder, connection: Connection) -> Any:
    """Reduce a connection of a subclass, of which pickle would send the descriptor's number."""
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
    """Reduce the memory of shared values; within a process a second arena would never close its descriptor."""
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
except ImportError:  # a system without semaphores
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
