"""How a handle travels: a message has a reference in its place, and each reader makes a handle of its own from that.

Queues, channels, mutexes and the loader each have a :class:`Target`, which makes the descriptors for another process
and the handle there. Invariants:

* Within a process, a reference counts as a pending handle until it is accepted or garbage. So no thread is told that
  nobody is left while a handle is on its way.
* A message to another process has descriptors of its own, so the sender may close its handle at once. ``count_sent`` of
  a descriptor is called when the message leaves, and again with -1 if it was not sent after all.
* A message can be decoded more than once (see ``torchwq.marshal``), in this process or another, so a reference can be
  accepted more than once. Each time makes another handle; only the first ends the counting.
* A message to another machine has the reference itself as one of its objects. Who carries the message gives the reader
  an object of the reference's ``far_kind`` in its place, and answers for that object here, as a worker with a handle of
  its own.
* The finalizer only appends to a list, because it runs at any time, in any thread, with any lock held.
"""

from __future__ import annotations

import abc
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ..errors import MarshalError
from ..marshalling import reducers
from ..memory.anonymous import Descriptor
from ..transport import cleanup

H = TypeVar("H")


class Target(abc.ABC):
    """What a reference refers to.

    Args:
        count_pending: called with 1 when a handle becomes pending in this process, and with -1 when it has arrived or
            was dropped. It is kept alive while a handle is pending.
    """

    #: Which kind of object stands for the handle on another machine; "" if it works on this one only.
    far_kind = ""

    def __init__(self, count_pending: Callable[[int], None] | None = None) -> None:
        self.count_pending = count_pending

    def shown(self) -> dict[str, Any]:
        """What the object on another machine shows of the handle."""
        return {}

    @abc.abstractmethod
    def make_handle(self) -> Any:
        """A new handle in this process."""

    @abc.abstractmethod
    def for_other_process(self) -> tuple[Callable[..., HandleRef], tuple[Any, ...], list[Descriptor]]:
        """``(receive, args, fds)``: in another process ``receive(fds, *args)`` takes ``fds`` over, for a reference."""


class HandleRef:
    """Stands for a handle in a message."""

    def __init__(self, target: Target) -> None:
        self.target = target
        count_pending = target.count_pending
        if count_pending is not None:
            count_pending(1)
            self._pending = weakref.finalize(self, _count_dropped_later, count_pending)
            self._pending.atexit = False

    def accept(self) -> Any:
        """Make a handle."""
        handle = self.target.make_handle()
        count_pending = self.target.count_pending
        if count_pending is not None and self._pending.detach() is not None:
            count_pending(-1)
        return handle


def _count_dropped_later(count_pending: Callable[[int], None]) -> None:
    cleanup.call_soon(functools.partial(count_pending, -1))


def register_handle(cls: type[H], target_of: Callable[[H], Target]) -> None:
    """Let objects of exactly ``cls`` travel as references to what ``target_of`` gives, and arrive as handles."""

    def reduce(encoder: reducers.Encoder, handle: H) -> Any:
        target = target_of(handle)
        if encoder.peer.same_process:
            return _accept_local, (encoder.attach_object(HandleRef(target)),)
        if not encoder.peer.passes_descriptors:
            if not target.far_kind:
                raise MarshalError(f"a {cls.__name__.lstrip('_')} works within one machine only")
            return reducers.attached_object, (encoder.attach_object(HandleRef(target)),)
        return _accept_received, _attach_fds(encoder, target)

    reducers.register(cls, reduce)


def _reduce(encoder: reducers.Encoder, ref: HandleRef) -> Any:
    """A reference in a marshalled message that is sent on arrives as a reference."""
    if encoder.peer.same_process:
        return reducers.attached_object, (encoder.attach_object(HandleRef(ref.target)),)
    if not encoder.peer.passes_descriptors and ref.target.far_kind:
        return reducers.attached_object, (encoder.attach_object(HandleRef(ref.target)),)
    return _receive, _attach_fds(encoder, ref.target)


def _attach_fds(encoder: reducers.Encoder, target: Target) -> tuple[Any, ...]:
    receive, args, fds = target.for_other_process()
    return receive, args, [encoder.attach_fd(each.fd, each) for each in fds]


def _receive(receive: Callable[..., HandleRef], args: tuple[Any, ...], indices: Sequence[int]) -> HandleRef:
    return receive([reducers.take_inbound_fd(index) for index in indices], *args)


def _accept_received(receive: Callable[..., HandleRef], args: tuple[Any, ...], indices: Sequence[int]) -> Any:
    return _receive(receive, args, indices).accept()


def _accept_local(index: int) -> Any:
    ref: HandleRef = reducers.attached_object(index)
    return ref.accept()


reducers.register(HandleRef, _reduce)
