"""Keeps, in order, the messages that a full socket does not take, so that a write never blocks.

A write may come from a finalizer or a signal handler, in the middle of another write of the same thread, or of any
other code of this library. So no thread waits for a lock here, see Note [Statements that nothing interrupts]. One
thread at a time *sends*. A ``send`` that comes meanwhile, from another thread or from further down the same thread's
stack, *submits* its message, and the sending thread sends it.

Note [One sending thread]. The invariants of this file:

* ``sending_thread`` is the thread that sends, 0 if none does. A thread claims it by a test and an assignment that
  nothing interrupts. Only the sending thread changes ``pending``, calls ``on_sent`` or touches the endpoint.
* A thread that submits a message looks at ``sending_thread`` afterwards; the sending thread looks at ``submitted``
  after it has set ``sending_thread`` to 0. So one of the two sends the message.
* Messages leave in the order of ``send``: while a submitted message waits, every later one is submitted, too.
* While a message is pending, the reactor watches the socket and sends on; nobody has to call anything for that.
* ``on_send`` of a payload is called before the peer can receive it, ``on_send_failed`` if it was not sent after all.
  ``promises`` choose its descriptors as it enters the socket, and so in the order of the messages.
* A pending message keeps alive the owners of its descriptors, and no longer than until it is sent.
* ``on_sent(tag, data)`` is called exactly once for each message that the socket took, in order. It is not called for
  control messages.
* When the peer is gone, all pending messages are dropped, and every later ``send`` is refused.
"""

from __future__ import annotations

import sys
import threading
import time
from _thread import get_ident
from collections import deque
from collections.abc import Callable
from typing import Final

from . import reactor
from .atomic import HAS_GIL, serialized
from .endpoint import Endpoint
from .payload import Payload, Promises
from .sockets import NotSent
from .timing import CLAIM_TIMEOUT, POLL_INTERVAL, SUBMIT_PAUSE
from .trailer import PICKLE, trailer

Sent = Callable[[int, bytes], None]

#: A thread that submits a message while so many wait pauses, so that the sending thread keeps up.
_MAX_SUBMITTED: Final = 256
#: So many messages that waited are sent at a time.
_FLUSH_BATCH: Final = 256
#: The tag of what concerns the connection only.
_CONTROL: Final = -1


class Outbox:
    """Sends over one endpoint without ever blocking. Safe to use from several threads, finalizers and signal handlers.

    Args:
        endpoint: where to.
        numbered: whether messages carry their number, from 1, in the order in which they leave.
        on_sent: called by the sending thread for each message that the socket took, in order, with its tag and its
            bytes. The tag of a numbered message is its number, that of any other the thread that wrote it.
        closed_error: makes the error that ``send`` raises when nobody can receive any more.
        on_backlog: called by the sending thread, with True before the first message becomes pending (if it returns
            False, the message is refused), with False when none is pending any more.
        on_emptied: called after that, when nobody sends.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        numbered: bool = False,
        on_sent: Sent | None = None,
        closed_error: Callable[[], Exception] = BrokenPipeError,
        on_backlog: Callable[[bool], bool] | None = None,
        on_emptied: Callable[[], None] | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._try_send = endpoint.try_send
        self._numbered = numbered
        self._on_sent = on_sent
        self._closed_error = closed_error
        self._on_backlog = on_backlog
        self._on_emptied = on_emptied
        #: The thread that sends now; 0 if none does.
        self.sending_thread = 0
        #: What was handed in, with the thread that wrote it.
        self.submitted: deque[tuple[bytes | Payload, int]] = deque()
        #: What waits here. Changed by this object only.
        self.pending: deque[tuple[bytes | Payload, int]] = deque()
        #: Whether the reactor watches the socket.
        self._is_watching = False
        #: Whether something other than a message has to be seen to: the socket may have room, or there is to be closed.
        self._needs_flush = False
        #: Whether nothing new is taken, and whether nobody can receive any more.
        self._is_closed = self._is_broken = False
        self._is_closing = False
        self._then: Callable[[], None] | None = None
        #: Of those who wait until nothing waits here.
        self._latches: deque[threading.Lock] = deque()
        #: Number of the message sent last.
        self.number = 0
        #: Where one process reads at the other end, and keeps descriptors for this sender.
        self.promises: Promises | None = None
        if not HAS_GIL:
            guard = threading.RLock()
            for name in ("send", "_process"):
                setattr(self, name, serialized(guard, getattr(self, name)))

    def __len__(self) -> int:
        return len(self.pending) + len(self.submitted)

    @property
    def is_idle(self) -> bool:
        """Whether what is sent past it now comes after everything that was sent through it."""
        return not self.sending_thread and not self.submitted and not self.pending

    def send(self, payload: bytes | Payload) -> None:
        """Send, or keep for later, one payload. It stays alive until it is sent.

        Raises ``closed_error()`` (BrokenPipeError by default) if nobody can receive it any more; NotSent if it cannot
        be sent for another reason than a full socket, and then it is as if it had not been written.
        """
        parcel = None if isinstance(payload, bytes) else payload
        if parcel is not None:
            parcel.on_send()
        me = get_ident()
        if self.sending_thread or self.submitted:
            self._submit(payload, parcel, me)
            return
        self.sending_thread = me
        try:
            # What is refused by now came later than the end.
            if self._is_closed or not self._send(payload, me):
                if parcel is not None:
                    parcel.on_send_failed()
                raise self._closed_error()
        except NotSent:
            if parcel is not None:
                parcel.on_send_failed()
            raise
        finally:
            self.sending_thread = 0
            if self.submitted or self._needs_flush:
                self._process()

    def send_control(self, payload: Payload) -> None:
        """Send a message that concerns the connection, and nobody else: it is not counted. Never raises."""
        if not self._is_closed:
            self.submitted.append((payload, _CONTROL))
            self._process()

    def _send(self, payload: bytes | Payload, tag: int) -> bool:
        """Send one message, or let it wait; False if nobody can receive it."""
        if self._numbered:
            self.number = tag = self.number + 1
        if not self.pending:
            if self._is_broken:
                return False
            try:
                data = self._transmit(payload, tag)
            except BrokenPipeError:  # any other error may be a signal handler's, after the message has left
                self._drop()
                return False
            except NotSent:
                if self._numbered:
                    self.number = tag - 1
                raise
            if data is not None:
                if self._on_sent is not None and tag != _CONTROL:
                    self._on_sent(tag, data)
                return True
            if self._on_backlog is not None and not self._on_backlog(True):
                return False
        self.pending.append((payload, tag))
        if not self._is_watching:
            try:
                self._watch()
            except Exception:  # there are too many threads; after a Ctrl-C, the message waits
                self.pending.pop()
                if not self.pending:
                    self._stop_watching()
                if self._numbered:
                    self.number = tag - 1
                if not isinstance(payload, bytes):
                    payload.on_send_failed()
                raise
        return True

    def _watch(self) -> None:
        """Have the reactor send on as soon as there is room. Where this was interrupted, it is done again."""
        reactor.get().set_writer(self._endpoint.fileno(), self.flush)
        self._is_watching = True

    def _transmit(self, payload: bytes | Payload, tag: int) -> bytes | None:
        """Put one message into the socket; None if it has no room. Returns the message's bytes."""
        if isinstance(payload, bytes):
            data = payload + trailer(tag, PICKLE) if self._numbered else payload
            return data if self._try_send(data) else None
        promises = self.promises
        if promises is None:
            data = payload.data + trailer(tag if self._numbered else 0, payload.kind)
            return data if self._try_send(data, payload.fds) else None
        fds, number = promises.choose(payload)
        data = payload.data + trailer(number, payload.kind)
        if not self._try_send(data, fds):
            return None
        if number:
            promises.note_promise(payload)
        return data

    def _submit(self, payload: bytes | Payload, parcel: Payload | None, ident: int) -> None:
        """Another thread sends, or this one does, further down its stack: let it send this, too."""
        if self._is_closed:
            if parcel is not None:
                parcel.on_send_failed()
            raise self._closed_error()
        self.submitted.append((payload, ident))
        self._process()
        if len(self.submitted) > _MAX_SUBMITTED and self.sending_thread != ident:
            time.sleep(SUBMIT_PAUSE)

    def _process(self) -> None:
        """Do what there is to do, unless somebody is at it, who will."""
        me = get_ident()
        while (self.submitted or self._needs_flush) and not self.sending_thread:
            self.sending_thread = me
            was_emptied = False
            try:
                if self.submitted:
                    payload, ident = self.submitted.popleft()
                    parcel = None if isinstance(payload, bytes) else payload
                    # One that is refused now was accepted all the same, as what is in a socket that its reader closes.
                    try:
                        is_accepted = self._send(payload, ident)
                    except NotSent as error:
                        is_accepted = False
                        _report(error)
                    if not is_accepted and parcel is not None:
                        parcel.on_send_failed()
                else:
                    self._needs_flush = False
                    was_emptied = self._flush()
            finally:
                self.sending_thread = 0
            if not self.pending and not self.submitted:
                self._notify_empty()
            if was_emptied and self._on_emptied is not None:
                self._on_emptied()

    def _notify_empty(self) -> None:
        for _ in range(len(self._latches)):
            self._latches.popleft().release()
        then, self._then = self._then, None
        if then is not None:
            then()

    def _drop(self) -> None:
        """Nobody can receive any more."""
        self._is_closed = self._is_broken = self._needs_flush = True
        for payload, _ in self.pending:
            if not isinstance(payload, bytes):
                payload.on_send_failed()
        self.pending.clear()
        self._stop_watching()

    def _stop_watching(self) -> None:
        self._is_watching = False
        if self._endpoint.fileno() >= 0:
            reactor.get().set_writer(self._endpoint.fileno(), None)
        if self._on_backlog is not None:
            self._on_backlog(False)

    def flush(self) -> None:
        """Send what the socket takes of what waits. Never blocks, never raises for a closed queue."""
        self._needs_flush = True
        self._process()

    def _flush(self) -> bool:
        """Returns whether nothing waits any more of what did.

        It sends some at a time: the reactor, which has others to see to, calls again as long as there is room.
        """
        if not self.pending:
            return False
        try:
            for _ in range(_FLUSH_BATCH):
                if not self.pending:
                    break
                payload, tag = self.pending[0]
                try:
                    data = self._transmit(payload, tag)
                except NotSent as error:
                    self.pending.popleft()
                    if not isinstance(payload, bytes):
                        payload.on_send_failed()
                    _report(error)
                    continue
                if not self.pending:  # a signal handler has closed it in the middle of this
                    return False
                if data is None:
                    break
                self.pending.popleft()
                if self._on_sent is not None and tag != _CONTROL:
                    self._on_sent(tag, data)
        except BrokenPipeError:
            self._drop()
        else:
            if self.pending:
                if not self._is_watching:
                    self._watch()
                return False
            self._stop_watching()
        return True

    def _claim(self) -> None:
        """Become the one that sends; also who is it further down its stack. Sending takes no time: who is at it for
        long is stuck, perhaps in a finalizer of the user's that waits for this."""
        me = get_ident()
        until = time.monotonic() + CLAIM_TIMEOUT
        while self.sending_thread and self.sending_thread != me and time.monotonic() < until:
            time.sleep(POLL_INTERVAL)
        self.sending_thread = me

    def withdraw(self) -> list[tuple[bytes, Payload | None]]:
        """What waits here, in order; it is the caller's now, who sends it in another way. Nothing more is taken."""
        self._is_closed = True
        self._claim()
        try:
            while self.submitted:  # what is there is not to be sent by now, and waits behind the rest
                self.pending.append(self.submitted.popleft())
            waiting = [_with_trailer(payload) for payload, _ in self.pending]
            self.pending.clear()
            self._is_watching = False
            if waiting and self._endpoint.fileno() >= 0:
                reactor.get().set_writer(self._endpoint.fileno(), None)
        finally:
            self.sending_thread = 0
        self._notify_empty()
        return waiting

    def close(self) -> None:
        """Take nothing more, give back what waits, and return when nobody sends: the endpoint may be closed then."""
        self._is_closed = True
        self._claim()
        try:
            while self.submitted:
                payload, _ = self.submitted.popleft()
                if not isinstance(payload, bytes):
                    payload.on_send_failed()
            if self.pending:
                self._drop()
            self._is_broken = True
        finally:
            self.sending_thread = 0
        self._notify_empty()

    def wait_empty(self, timeout: float | None = None) -> bool:
        """Wait until nothing waits here any more, because it was sent or because the other side is gone."""
        deadline = None if timeout is None else time.monotonic() + timeout
        me = get_ident()
        while len(self) or self.sending_thread not in (0, me):
            latch = threading.Lock()
            latch.acquire()
            self._latches.append(latch)
            self._needs_flush = True  # whoever sends now tells, too, when it has sent
            self._process()
            latch.acquire(timeout=-1 if deadline is None else max(0.0, deadline - time.monotonic()))
            if deadline is not None and time.monotonic() >= deadline:
                return not len(self)
        return True

    def close_when_sent(self, then: Callable[[], None]) -> None:
        """Take nothing more, and call ``then`` as soon as nothing waits. Returns at once."""
        if self._is_closing:
            return
        self._is_closing = self._is_closed = True
        self._then = then
        self._needs_flush = True
        self._process()

    def abandon(self) -> None:
        """In the child of a fork: what waits is the parent's."""
        self.pending.clear()
        self.submitted.clear()
        self._is_closed = self._is_broken = True
        self.sending_thread = 0


def _with_trailer(payload: bytes | Payload) -> tuple[bytes, Payload | None]:
    """The bytes of a message without a number, and what has its descriptors."""
    return (payload, None) if isinstance(payload, bytes) else (payload.data + trailer(0, payload.kind), payload)


def _report(error: NotSent) -> None:
    """Of a message whose writer believes it sent."""
    sys.excepthook(type(error), error, error.__traceback__)
