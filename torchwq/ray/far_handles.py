"""Handles on queues and channels whose owner is on another machine.

Each call on one is a request to the owner's process, which has a handle of the worker's role for it and does the same
there (``serving``); so the rules of queues and channels stand in one place. A call takes as long as a call of an actor
does, about a millisecond: on another machine, put much into one message.

A thread whose request waits at the owner sleeps here until the reply. If the owner dies, Ray ends this process.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Final, TypeVar

from ..channels.state import ChannelState
from ..errors import MarshalError, QueueClosed, TorchwqError
from ..marshalling import codec, exceptions, reducers
from ..transport.capabilities import OTHER_MACHINE
from .transit import CLOSED, REQUEST, Handle, pack

Put = Callable[..., None]
H = TypeVar("H", bound="FarHandle")


class HandleLink:
    """The far handles of one worker, and their requests. ``put`` sends a signal to the owner."""

    def __init__(self, put: Put) -> None:
        self._put = put
        self._numbers = itertools.count()
        self._replies: dict[int, _Reply] = {}
        #: The numbers of handles that are garbage. Finalizers only append: they run with any lock held.
        self._dropped: deque[int] = deque()

    def far_handle(self, description: Handle) -> FarHandle:
        """A handle in the place of one in a message."""
        number, kind, shown = description
        return KINDS[kind](self, number, shown)

    @staticmethod
    def number_of(handle: FarHandle) -> int:
        return handle.number

    def tell_of_dropped(self) -> None:
        """Tell the owner which handles are garbage: with the next message of either side."""
        while self._dropped:
            self._put(CLOSED, self._dropped.popleft())

    def ask(self, handle: int, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], upvalues: bool) -> Any:
        """Let the owner call a method of its handle, and return what it returns, or raise what it raises."""
        payload = codec.encode_all([(args, kwargs)], codec.UNLIMITED, upvalues=upvalues, peer=OTHER_MACHINE)[0]
        request = next(self._numbers)
        self._replies[request] = reply = _Reply()
        self.tell_of_dropped()
        message = pack(payload, self.number_of)
        self._put(REQUEST, request, threading.get_ident(), handle, method, message)
        try:
            reply.arrived.wait()
        finally:
            self._replies.pop(request, None)
        value = codec.decode(reply.payload, [])
        if reply.good:
            return value
        error = exceptions.unpack(value)
        if isinstance(error, (TorchwqError, LookupError)) or type(error).__module__ == "_queue":
            error.__cause__ = None  # the owner's frames say nothing
        raise error

    def replied(self, request: int, good: bool, payload: Any) -> None:
        """A reply has come."""
        reply = self._replies.get(request)
        if reply is not None:
            reply.good, reply.payload = good, payload
            reply.arrived.set()


class _Reply:
    def __init__(self) -> None:
        self.arrived = threading.Event()
        self.good = False
        self.payload: Any = None


class FarHandle:
    """A handle of the worker's role, whose owner is on another machine."""

    def __init__(self, link: HandleLink, number: int, shown: dict[str, Any]) -> None:
        self.number = number
        self._link = link
        self._shown = shown
        weakref.finalize(self, link._dropped.append, number).atexit = False

    @property
    def capacity(self) -> int | None:
        """As it was made with."""
        capacity: int | None = self._shown["capacity"]
        return capacity

    def close(self) -> None:
        """Close this handle of a queue; or the channel, for everybody. May be called again."""
        self._ask("close")

    def __enter__(self: H) -> H:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, method: str, *args: Any, upvalues: bool = False, **kwargs: Any) -> Any:
        return self._link.ask(self.number, method, args, kwargs, upvalues)

    def __reduce__(self) -> Any:
        raise TypeError("this handle can only be sent by torchwq, back to the machine of its owner")


class FarQueue(FarHandle):
    """A worker's handle on a :class:`~torchwq.WorkQueue` of another machine: objects and tensors travel by value.

    Its methods do, and raise, what those of a worker's handle do. ``fileno`` and ``aread`` are for one machine only.
    """

    creator = False

    @property
    def name(self) -> str | None:
        """The name it was opened by; None for an anonymous queue."""
        name: str | None = self._shown["name"]
        return name

    @property
    def closed(self) -> bool:
        """True if this handle cannot be used any more."""
        return bool(self._ask("closed"))

    def read(self, nonblocking: bool = False, *, timeout: float | None = None) -> Any:
        """Read the next question; see :meth:`torchwq.WorkQueue.read`."""
        return self._ask("read", nonblocking, timeout=timeout)

    def write(self, *objs: Any) -> None:
        """Write each of ``objs``: answers; see :meth:`torchwq.WorkQueue.write`."""
        self._ask("write", *objs)

    def writeup(self, *objs: Any) -> None:
        """Like :meth:`write`, and closures travel with what they capture."""
        self._ask("writeup", *objs, upvalues=True)

    def __iter__(self) -> Iterator[Any]:
        """Read questions until None, or until the queue is closed."""
        while True:
            try:
                question = self.read()
            except QueueClosed:
                return
            if question is None:
                return
            yield question

    def __repr__(self) -> str:
        name = "anonymous" if self.name is None else repr(self.name)
        return f"<torchwq.WorkQueue {name}, worker, its owner is on another machine>"


class FarChannel(FarHandle):
    """A :class:`~torchwq.Channel` of another machine: objects and tensors travel by value.

    Its methods do, and raise, what those of a channel do. ``fileno`` and ``aread`` are for one machine only.
    """

    def read(self, nonblocking: bool = False, *, timeout: float | None = None) -> tuple[ChannelState, Any]:
        """Read the next item; see :meth:`torchwq.Channel.read`."""
        state, item = self._ask("read", nonblocking, timeout=timeout)
        return state, item

    def write(self, *objs: Any) -> ChannelState:
        """Write each of ``objs``; see :meth:`torchwq.Channel.write`."""
        state: ChannelState = self._ask("write", *objs)
        return state

    def writeup(self, *objs: Any) -> ChannelState:
        """Like :meth:`write`, and closures travel with what they capture."""
        state: ChannelState = self._ask("writeup", *objs, upvalues=True)
        return state

    def closed(self) -> bool:
        """Whether the channel is closed, drained or not."""
        return bool(self._ask("closed"))

    def drained(self) -> bool:
        """Whether the channel is closed, and everything in it has been read."""
        return bool(self._ask("drained"))

    def num_items(self) -> int:
        """How many items have been written and not read: an estimate while others write or read."""
        return int(self._ask("num_items"))

    def __iter__(self) -> Iterator[Any]:
        """Read until the channel is drained."""
        while True:
            state, item = self.read()
            if state is ChannelState.DRAINED:
                return
            yield item

    def __repr__(self) -> str:
        return "<torchwq.Channel, on another machine>"


#: By ``Target.far_kind``.
KINDS: Final[dict[str, Callable[[HandleLink, int, dict[str, Any]], FarHandle]]] = {
    "queue": FarQueue,
    "channel": FarChannel,
}


def _reduce(encoder: reducers.Encoder, handle: FarHandle) -> Any:
    if encoder.peer.passes_descriptors and not encoder.peer.same_process:
        raise MarshalError(
            "a handle whose owner is on another machine cannot be sent to a process of this one: pass on what you read"
        )
    return reducers.attached_object, (encoder.attach_object(handle),)


for _cls in (FarQueue, FarChannel):
    reducers.register(_cls, _reduce)
