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

import contextlib
import sys
import threading
import time
from _thread import get_ident
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from .. import _native
from . import reactor
from .atomic import serialize
from .endpoint import Endpoint
from .payload import Payload, Promises
from .sockets import NotSent
from .timing import CLAIM_TIMEOUT, POLL_INTERVAL, SUBMIT_PAUSE
from .trailer import PICKLE, trailer

Sent = Callable[[int, bytes], None]

#: A thread that submits a message while so many wait pauses, so that the sending thread keeps up.
_MAX_SUBMITTED: Final = 256
#: The most pending messages that are sent at a time: the reactor has others to serve.
_FLUSH_BATCH: Final = 256
#: The tag of control messages.
_CONTROL: Final = -1


class PythonOutboxFields:
    """The part of an outbox that each message passes through."""

    __slots__ = (
        "endpoint",
        "is_broken",
        "is_closed",
        "needs_flush",
        "number",
        "numbered",
        "on_sent",
        "pending",
        "promises",
        "sending_thread",
        "submitted",
    )

    endpoint: Endpoint
    #: The thread that sends; 0 if none does.
    sending_thread: int
    #: Each with the thread that wrote it; control messages with their tag.
    submitted: deque[tuple[bytes | Payload, int]]
    #: Messages that the socket did not take, each with its tag.
    pending: deque[tuple[bytes | Payload, int]]
    #: Whether messages carry their number, and that of the one that was sent or became pending last.
    numbered: bool
    number: int
    on_sent: Sent | None
    #: Set if one process reads at the other end and keeps descriptors for this sender: see ``memory.promises``.
    promises: Promises | None
    #: Whether the sending thread has to look at ``pending``, and to say if it is empty.
    needs_flush: bool
    #: Whether ``send`` refuses everything, and whether nobody can receive any more.
    is_closed: bool
    is_broken: bool

    def send(self, payload: bytes | Payload) -> None:
        """Send one payload, or keep it until the socket has room.

        Raises ``closed_error()`` (BrokenPipeError by default) if nobody can receive it any more; NotSent if it cannot
        be sent for another reason than a full socket, and then it is as if it had not been written.
        """
        if not isinstance(payload, bytes):
            payload.on_send()
        self.send_counted(payload)

    def send_counted(self, payload: bytes | Payload) -> None:
        raise NotImplementedError


OutboxFields = PythonOutboxFields
if not TYPE_CHECKING and _native.core is not None:
    OutboxFields = _native.core.OutboxFields


class Outbox(OutboxFields):
    """Sends over one endpoint without ever blocking. Safe to use from several threads, finalizers and signal handlers.

    Args:
        endpoint: where messages go to.
        numbered: whether messages carry their number, from 1, in the order in which they leave.
        on_sent: called by the sending thread for each message that the socket took, in order, with its tag and its
            bytes. The tag of a numbered message is its number, that of any other the thread that wrote it.
        closed_error: makes the error that ``send`` raises when nobody can receive any more.
        on_backlog: called by the sending thread: with True before the first message becomes pending, which False
            refuses; with False when none is pending any more.
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
        self.endpoint = endpoint
        self._try_send = endpoint.try_send
        self.numbered = numbered
        self.on_sent = on_sent
        self._closed_error = closed_error
        self._on_backlog = on_backlog
        self._on_emptied = on_emptied
        self.sending_thread = 0
        self.submitted = deque()
        self.pending = deque()
        #: Whether the reactor watches the socket.
        self._is_watching = False
        #: Whether ``close_when_sent`` was called, and what it calls.
        self._is_closing = False
        self._then: Callable[[], None] | None = None
        self.needs_flush = self.is_closed = self.is_broken = False
        #: Of the threads in ``wait_empty``.
        self._latches: deque[threading.Lock] = deque()
        self.number = 0
        self.promises = None
        serialize(self, "send", "process")

    def __len__(self) -> int:
        return len(self.pending) + len(self.submitted)

    @property
    def is_idle(self) -> bool:
        """Whether a message that goes straight into the socket now comes after all that were sent here."""
        return not self.sending_thread and not self.submitted and not self.pending

    def send_counted(self, payload: bytes | Payload) -> None:
        """``send`` a payload whose ``on_send`` was called."""
        me = get_ident()
        if self.sending_thread or self.submitted:
            self._submit(payload, me)
            return
        self.sending_thread = me
        try:
            if self.is_closed or not self._send(payload, me):
                _give_back(payload)
                raise self._closed_error()
        except NotSent:
            _give_back(payload)
            raise
        finally:
            self.sending_thread = 0
            if self.submitted or self.needs_flush:
                self.process()

    def send_control(self, payload: Payload) -> None:
        """Send a control message: one between the two ends, which no user waits for or counts. Never raises."""
        if not self.is_closed:
            self.submitted.append((payload, _CONTROL))
            self.process()

    def _send(self, payload: bytes | Payload, tag: int) -> bool:
        """Send one message, or make it pending; False if nobody can receive it. By the sending thread."""
        if self.numbered:
            self.number = tag = self.number + 1
        if not self.pending:
            if self.is_broken:
                return False
            try:
                data = self._transmit(payload, tag)
            except BrokenPipeError:  # any other error may be a signal handler's, after the message has left
                self._drop()
                return False
            except NotSent:
                if self.numbered:
                    self.number = tag - 1
                raise
            if data is not None:
                if self.on_sent is not None and tag != _CONTROL:
                    self.on_sent(tag, data)
                return True
            if self._on_backlog is not None and not self._on_backlog(True):
                return False
        self.pending.append((payload, tag))
        try:
            self._watch()
        except Exception:  # no thread can be started; a KeyboardInterrupt leaves the message pending
            self.pending.pop()
            if not self.pending:
                self._stop_watching()
            if self.numbered:
                self.number = tag - 1
            _give_back(payload)
            raise
        return True

    def _watch(self) -> None:
        """Have the reactor send on as soon as there is room. If this is interrupted, the next message does it again."""
        if not self._is_watching:
            reactor.get().set_writer(self.endpoint.fileno(), self.flush)
            self._is_watching = True

    def _transmit(self, payload: bytes | Payload, tag: int) -> bytes | None:
        """Put one message into the socket. Returns the message's bytes; None if the socket has no room."""
        if isinstance(payload, bytes):
            data = payload + trailer(tag, PICKLE) if self.numbered else payload
            return data if self._try_send(data) else None
        promises = self.promises
        if promises is None:
            data = payload.data + trailer(tag if self.numbered else 0, payload.kind)
            return data if self._try_send(data, payload.fds) else None
        fds, number = promises.choose(payload)
        data = payload.data + trailer(number, payload.kind)
        if not self._try_send(data, fds):
            return None
        if number:
            promises.note_promise(payload)
        return data

    def _submit(self, payload: bytes | Payload, ident: int) -> None:
        """Leave one payload to the sending thread."""
        if self.is_closed:
            _give_back(payload)
            raise self._closed_error()
        self.submitted.append((payload, ident))
        self.process()
        if len(self.submitted) > _MAX_SUBMITTED and self.sending_thread != ident:
            time.sleep(SUBMIT_PAUSE)

    def process(self) -> None:
        """Send what was submitted and is pending, unless another thread sends, which does it then."""
        me = get_ident()  # before the test: nothing may interrupt between it and the assignment
        while (self.submitted or self.needs_flush) and not self.sending_thread:
            self.sending_thread = me
            was_emptied = False
            try:
                if self.submitted:
                    payload, ident = self.submitted.popleft()
                    # Its ``send`` has returned: a payload refused now is lost, as in a socket that its reader closes.
                    try:
                        if not self._send(payload, ident):
                            _give_back(payload)
                    except NotSent as error:
                        _give_back(payload, error)
                else:
                    self.needs_flush = False
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
        self.is_closed = self.is_broken = self.needs_flush = True
        for payload, _ in self.pending:
            _give_back(payload)
        self.pending.clear()
        self._stop_watching()

    def _stop_watching(self) -> None:
        self._is_watching = False
        if self.endpoint.fileno() >= 0:
            reactor.get().set_writer(self.endpoint.fileno(), None)
        if self._on_backlog is not None:
            self._on_backlog(False)

    def flush(self) -> None:
        """Send those pending messages for which the socket has room. Never blocks, nor raises if nobody can receive."""
        self.needs_flush = True
        self.process()

    def _flush(self) -> bool:
        """Returns whether messages were pending and none is any more."""
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
                    _give_back(payload, error)
                    continue
                if not self.pending:  # a signal handler has closed the outbox in the middle of this
                    return False
                if data is None:
                    break
                self.pending.popleft()
                if self.on_sent is not None and tag != _CONTROL:
                    self.on_sent(tag, data)
        except BrokenPipeError:
            self._drop()
            return True
        if self.pending:
            self._watch()
            return False
        self._stop_watching()
        return True

    @contextlib.contextmanager
    def _closing(self) -> Iterator[None]:
        """Refuse every later ``send``, and be the sending thread: after CLAIM_TIMEOUT although another one is."""
        self.is_closed = True
        me = get_ident()
        until = time.monotonic() + CLAIM_TIMEOUT
        while self.sending_thread and self.sending_thread != me and time.monotonic() < until:
            time.sleep(POLL_INTERVAL)
        self.sending_thread = me
        try:
            yield
        finally:
            self.sending_thread = 0
        self._notify_empty()

    def withdraw(self) -> list[tuple[bytes, Payload | None]]:
        """Close, and return the messages that wait, in order: the caller sends them in another way."""
        with self._closing():
            while self.submitted:
                self.pending.append(self.submitted.popleft())
            waiting = [_with_trailer(payload) for payload, _ in self.pending]
            self.pending.clear()
            self._is_watching = False
            if waiting and self.endpoint.fileno() >= 0:
                reactor.get().set_writer(self.endpoint.fileno(), None)
        return waiting

    def close(self) -> None:
        """Refuse every later ``send``, give back what waits, and return when no thread sends."""
        with self._closing():
            while self.submitted:
                _give_back(self.submitted.popleft()[0])
            if self.pending:
                self._drop()
            self.is_broken = True

    def settle(self) -> None:
        """Return when what was submitted before has been sent, or is pending: both show outside of this process."""
        me = get_ident()
        until = time.monotonic() + CLAIM_TIMEOUT
        while self.sending_thread != me and time.monotonic() < until:
            self.process()
            if not self.submitted and not self.sending_thread:
                return
            time.sleep(POLL_INTERVAL)  # another thread sends, and takes no lock that this one could wait for

    def wait_empty(self) -> None:
        """Return when no message waits here, because all were sent or because the peer is gone."""
        me = get_ident()
        while len(self) or self.sending_thread not in (0, me):
            latch = threading.Lock()
            latch.acquire()
            self._latches.append(latch)
            self.flush()  # a thread that sends now releases the latch afterwards
            latch.acquire()

    def close_when_sent(self, then: Callable[[], None]) -> None:
        """Refuse every later ``send``, and call ``then`` as soon as no message waits. Returns at once."""
        if not self._is_closing:
            self._is_closing = self.is_closed = True
            self._then = then
            self.flush()

    def abandon(self) -> None:
        """In the child of a fork: the messages that wait are the parent's."""
        self.pending.clear()
        self.submitted.clear()
        self.is_closed = self.is_broken = True
        self.sending_thread = 0


def _give_back(payload: bytes | Payload, error: NotSent | None = None) -> None:
    """The payload was not sent. Print ``error``, which nobody can raise: its ``send`` has returned."""
    if not isinstance(payload, bytes):
        payload.on_send_failed()
    if error is not None:
        sys.excepthook(type(error), error, error.__traceback__)


def _with_trailer(payload: bytes | Payload) -> tuple[bytes, Payload | None]:
    """The bytes of a message without a number, and the owner of its descriptors."""
    return (payload, None) if isinstance(payload, bytes) else (payload.data + trailer(0, payload.kind), payload)
