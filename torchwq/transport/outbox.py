"""Keeps, in order, the messages that a full socket does not take, so that a write never blocks.

A write may come from a finalizer or a signal handler, in the middle of another write of the same thread, or of anything
else that this library does. So nobody waits for a lock here, see Note [Statements that nothing interrupts]. One thread
at a time *sends*; whoever comes meanwhile, be it the same thread further down its stack, hands its message in, and the
one that sends sees to it.

Invariants:

* ``sender`` says which thread sends, 0 if none does. It is claimed by a test and an assignment that nothing interrupts.
  Only who has claimed it changes what waits, calls ``sent`` or touches the endpoint.
* Whoever hands something in looks at ``sender`` afterwards; whoever gives ``sender`` up looks at what was handed in
  afterwards. So one of them sees to it.
* Messages leave in the order of ``send``: as long as something was handed in, everything is.
* While something waits, the reactor watches the socket and sends on; nobody has to call anything for that.
* A payload is told before it can be received (``on_send``), and if it was not sent after all (``on_send_failed``). What
  goes along with it is chosen in the moment in which it is sent, and so in the order of the messages (``promises``).
* A waiting message keeps alive whatever its descriptors belong to, and no longer than until it is sent.
* ``sent(tag, data)`` is called exactly once per message that the socket took, in order, but for those sent aside.
* When the other side is gone, all that waits is dropped, and every later ``send`` is refused.
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
from .trailer import PICKLE, trailer

Sent = Callable[[int, bytes], None]

#: Threads that hand in more than the one that sends can keep up with pause so long, in seconds, from so many messages
#: on.
_PAUSE: Final = 0.001
_MANY: Final = 256
#: So many messages that waited are sent at a time.
_AT_ONCE: Final = 256
#: The tag of what concerns the connection only.
_ASIDE: Final = -1
#: How long, in seconds, who closes waits for the one that sends.
_LAST_PATIENCE: Final = 2.0


class Outbox:
    """Sends over one endpoint without ever blocking. Safe to use from several threads, finalizers and signal handlers.

    Args:
        endpoint: where to.
        numbered: whether messages carry their number, from 1, in the order in which they leave.
        sent: called by the one that sends, in order, for each message that the socket took, with its tag and its bytes.
            The tag of a numbered message is its number, that of any other the thread that wrote it.
        refusal: makes the error that ``send`` raises when nobody can receive any more.
        keeping: called by the one that sends, with True before the first message waits here, which it does not if the
            answer is False: it is refused then; with False when nothing waits any more.
        emptied: called after that, when nobody sends.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        numbered: bool = False,
        sent: Sent | None = None,
        refusal: Callable[[], Exception] = BrokenPipeError,
        keeping: Callable[[bool], bool] | None = None,
        emptied: Callable[[], None] | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._try_send = endpoint.try_send
        self._numbered = numbered
        self._sent = sent
        self._refusal = refusal
        self._keeping = keeping
        self._emptied = emptied
        #: The thread that sends now; 0 if none does.
        self.sender = 0
        #: What was handed in, with the thread that wrote it.
        self.handed_in: deque[tuple[bytes | Payload, int]] = deque()
        #: What waits here. Changed by this object only.
        self.pending: deque[tuple[bytes | Payload, int]] = deque()
        #: Whether the reactor watches the socket.
        self._is_watching = False
        #: Whether something other than a message has to be seen to: the socket may have room, or there is to be closed.
        self._has_to_look = False
        #: Whether nothing new is taken, and whether nobody can receive any more.
        self._refuses = self._is_broken = False
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
            for name in ("send", "_see_to_it"):
                setattr(self, name, serialized(guard, getattr(self, name)))

    def __len__(self) -> int:
        return len(self.pending) + len(self.handed_in)

    @property
    def is_idle(self) -> bool:
        """Whether what is sent past it now comes after everything that was sent through it."""
        return not self.sender and not self.handed_in and not self.pending

    def send(self, payload: bytes | Payload) -> None:
        """Send, or keep for later, one payload. It stays alive until it is sent.

        Raises the ``refusal`` (BrokenPipeError, if none was given) if nobody can receive it any more; NotSent, and it
        is as if it had not been written, if it cannot be sent for another reason than want of room.
        """
        parcel = None if isinstance(payload, bytes) else payload
        if parcel is not None:
            parcel.on_send()
        me = get_ident()
        if self.sender or self.handed_in:
            self._hand_in(payload, parcel, me)
            return
        self.sender = me
        try:
            # What is refused by now came later than the end.
            if self._refuses or not self._send(payload, me):
                if parcel is not None:
                    parcel.on_send_failed()
                raise self._refusal()
        except NotSent:
            if parcel is not None:
                parcel.on_send_failed()
            raise
        finally:
            self.sender = 0
            if self.handed_in or self._has_to_look:
                self._see_to_it()

    def send_aside(self, payload: Payload) -> None:
        """Send a message that concerns the connection, and nobody else: it is not counted. Never raises."""
        if not self._refuses:
            self.handed_in.append((payload, _ASIDE))
            self._see_to_it()

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
                if self._sent is not None and tag != _ASIDE:
                    self._sent(tag, data)
                return True
            if self._keeping is not None and not self._keeping(True):
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

    def _hand_in(self, payload: bytes | Payload, parcel: Payload | None, ident: int) -> None:
        """Another thread sends, or this one does, further down its stack: let it send this, too."""
        if self._refuses:
            if parcel is not None:
                parcel.on_send_failed()
            raise self._refusal()
        self.handed_in.append((payload, ident))
        self._see_to_it()
        if len(self.handed_in) > _MANY and self.sender != ident:
            time.sleep(_PAUSE)

    def _see_to_it(self) -> None:
        """Do what there is to do, unless somebody is at it, who will."""
        me = get_ident()
        while (self.handed_in or self._has_to_look) and not self.sender:
            self.sender = me
            was_emptied = False
            try:
                if self.handed_in:
                    payload, ident = self.handed_in.popleft()
                    parcel = None if isinstance(payload, bytes) else payload
                    # One that is refused now was accepted all the same, as what is in a socket that its reader closes.
                    try:
                        is_on_its_way = self._send(payload, ident)
                    except NotSent as error:
                        is_on_its_way = False
                        _tell(error)
                    if not is_on_its_way and parcel is not None:
                        parcel.on_send_failed()
                else:
                    self._has_to_look = False
                    was_emptied = self._flush()
            finally:
                self.sender = 0
            if not self.pending and not self.handed_in:
                self._tell_that_nothing_waits()
            if was_emptied and self._emptied is not None:
                self._emptied()

    def _tell_that_nothing_waits(self) -> None:
        for _ in range(len(self._latches)):
            self._latches.popleft().release()
        then, self._then = self._then, None
        if then is not None:
            then()

    def _drop(self) -> None:
        """Nobody can receive any more."""
        self._refuses = self._is_broken = self._has_to_look = True
        for payload, _ in self.pending:
            if not isinstance(payload, bytes):
                payload.on_send_failed()
        self.pending.clear()
        self._stop_watching()

    def _stop_watching(self) -> None:
        self._is_watching = False
        if self._endpoint.fileno() >= 0:
            reactor.get().set_writer(self._endpoint.fileno(), None)
        if self._keeping is not None:
            self._keeping(False)

    def flush(self) -> None:
        """Send what the socket takes of what waits. Never blocks, never raises for a closed queue."""
        self._has_to_look = True
        self._see_to_it()

    def _flush(self) -> bool:
        """Returns whether nothing waits any more of what did.

        It sends some at a time: the reactor, which has others to see to, calls again as long as there is room.
        """
        if not self.pending:
            return False
        try:
            for _ in range(_AT_ONCE):
                if not self.pending:
                    break
                payload, tag = self.pending[0]
                try:
                    data = self._transmit(payload, tag)
                except NotSent as error:
                    self.pending.popleft()
                    if not isinstance(payload, bytes):
                        payload.on_send_failed()
                    _tell(error)
                    continue
                if not self.pending:  # a signal handler has closed it in the middle of this
                    return False
                if data is None:
                    break
                self.pending.popleft()
                if self._sent is not None and tag != _ASIDE:
                    self._sent(tag, data)
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
        until = time.monotonic() + _LAST_PATIENCE
        while self.sender and self.sender != me and time.monotonic() < until:
            time.sleep(_PAUSE)
        self.sender = me

    def withdraw(self) -> list[tuple[bytes, Payload | None]]:
        """What waits here, in order; it is the caller's now, who sends it in another way. Nothing more is taken."""
        self._refuses = True
        self._claim()
        try:
            while self.handed_in:  # what is there is not to be sent by now, and waits behind the rest
                self.pending.append(self.handed_in.popleft())
            waiting = [_apart(payload) for payload, _ in self.pending]
            self.pending.clear()
            self._is_watching = False
            if waiting and self._endpoint.fileno() >= 0:
                reactor.get().set_writer(self._endpoint.fileno(), None)
        finally:
            self.sender = 0
        self._tell_that_nothing_waits()
        return waiting

    def end(self) -> None:
        """Take nothing more, give back what waits, and return when nobody sends: the endpoint may be closed then."""
        self._refuses = True
        self._claim()
        try:
            while self.handed_in:
                payload, _ = self.handed_in.popleft()
                if not isinstance(payload, bytes):
                    payload.on_send_failed()
            if self.pending:
                self._drop()
            self._is_broken = True
        finally:
            self.sender = 0
        self._tell_that_nothing_waits()

    def wait_empty(self, timeout: float | None = None) -> bool:
        """Wait until nothing waits here any more, because it was sent or because the other side is gone."""
        deadline = None if timeout is None else time.monotonic() + timeout
        me = get_ident()
        while len(self) or self.sender not in (0, me):
            latch = threading.Lock()
            latch.acquire()
            self._latches.append(latch)
            self._has_to_look = True  # whoever sends now tells, too, when it has sent
            self._see_to_it()
            latch.acquire(timeout=-1 if deadline is None else max(0.0, deadline - time.monotonic()))
            if deadline is not None and time.monotonic() >= deadline:
                return not len(self)
        return True

    def close_when_sent(self, then: Callable[[], None]) -> None:
        """Take nothing more, and call ``then`` as soon as nothing waits. Returns at once."""
        if self._is_closing:
            return
        self._is_closing = self._refuses = True
        self._then = then
        self._has_to_look = True
        self._see_to_it()

    def abandon(self) -> None:
        """In the child of a fork: what waits is the parent's."""
        self.pending.clear()
        self.handed_in.clear()
        self._refuses = self._is_broken = True
        self.sender = 0


def _apart(payload: bytes | Payload) -> tuple[bytes, Payload | None]:
    """The bytes of a message without a number, and what has its descriptors."""
    return (payload, None) if isinstance(payload, bytes) else (payload.data + trailer(0, payload.kind), payload)


def _tell(error: NotSent) -> None:
    """Of a message whose writer believes it sent."""
    sys.excepthook(type(error), error, error.__traceback__)
