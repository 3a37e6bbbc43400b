"""Keeps, in order, the messages that a full socket does not take, so that a write never blocks.

Invariants:

* Messages leave in the order of ``send``, whichever threads call it: one lock covers "is anything waiting?" and
  the send itself.
* While something waits, the reactor watches the socket and sends on; nobody has to call anything for that.
* A payload is told before it can be received (``depart``), and if it was not sent after all (``come_back``). It is
  asked which descriptors must go along (``descriptors``) in the moment in which it is sent.
* A waiting message keeps alive whatever its descriptors belong to, and no longer than until it is sent.
* ``sent(tag)`` is called exactly once per message that the socket took, under the lock, in order.
* When the other side is gone, all that waits is dropped, and every later ``send`` is refused.
"""

from __future__ import annotations

import struct
import threading
from _thread import get_ident
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from . import reactor
from .endpoint import Endpoint
from .process import closed_in_child

Sent = Callable[[int, bytes], None]

#: What :mod:`torchwq.memory.parcel` lays down for a pickle without a number.
_PLAIN: Final = 0
_TRAILER: Final = struct.Struct("<QB").pack


class Payload(Protocol):
    """A payload that is more than bytes: see :class:`torchwq.memory.parcel.Parcel`."""

    @property
    def data(self) -> bytes: ...
    @property
    def kind(self) -> int: ...
    def depart(self) -> None: ...
    def descriptors(self, reader: int) -> Sequence[int]: ...
    def come_back(self) -> None: ...


class Outbox:
    """Sends over one endpoint without ever blocking. Safe to use from several threads.

    Args:
        endpoint: where to.
        numbered: whether messages carry their number, from 1, in the order in which they leave.
        sent: called under ``lock``, in order, for each message that the socket took, with its tag and its bytes. The
            tag of a numbered message is its number, that of any other the thread that sent it.
        lock: the outbox's lock, where its user needs it for more.
        refusal: makes the error that ``send`` raises when nobody can receive any more.
        keeping: called under ``lock``, with True before the first message waits here, which it does not if the answer
            is False: it is refused then; with False when nothing waits any more.
        emptied: called after that, without the lock.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        numbered: bool = False,
        sent: Sent | None = None,
        lock: threading.Lock | None = None,
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
        self._lock = lock or threading.Lock()
        self._changed = threading.Condition(self._lock)
        #: What waits here. Changed by this object only.
        self.pending: deque[tuple[bytes, Payload | None, int]] = deque()
        self._stopped = False
        self._closing = False
        self._then: Callable[[], None]
        #: Number of the message sent last.
        self.number = 0
        #: Which process reads at the other end, as ``Payload.descriptors`` takes it; -1 if that is not known.
        self.reader = -1
        closed_in_child(self)

    def __len__(self) -> int:
        return len(self.pending)

    def send(self, payload: bytes | Payload) -> None:
        """Send, or keep for later, one payload. It stays alive until it is sent.

        Raises the ``refusal`` (BrokenPipeError, if none was given) if nobody can receive it any more.
        """
        parcel = None if isinstance(payload, bytes) else payload
        if parcel is not None:
            parcel.depart()  # takes a lock under which finalizers may run, and they may write
        with self._lock:
            if self._stopped:
                if parcel is not None:
                    parcel.come_back()
                raise self._refusal()
            if parcel is None:
                assert isinstance(payload, bytes)
                if self._numbered:
                    self.number = tag = self.number + 1
                    data = payload + _TRAILER(tag, _PLAIN)
                else:
                    data = payload
                    tag = get_ident()
            else:
                if self._numbered:
                    self.number = tag = self.number + 1
                    data = parcel.data + _TRAILER(tag, parcel.kind)
                else:
                    data = parcel.data + _TRAILER(0, parcel.kind)
                    tag = get_ident()
            if not self.pending:
                try:
                    is_sent = self._try_send(data, () if parcel is None else parcel.descriptors(self.reader))
                except BrokenPipeError:  # any other error may be a signal handler's, after the message has left
                    if parcel is not None:
                        parcel.come_back()
                    self._drop()
                    raise self._refusal() from None
                if is_sent:
                    if self._sent is not None:
                        self._sent(tag, data)
                    return
                if self._keeping is not None and not self._keeping(True):
                    if parcel is not None:
                        parcel.come_back()
                    raise self._refusal()
                reactor.get().set_writer(self._endpoint.fileno(), self.flush)
            self.pending.append((data, parcel, tag))

    def _drop(self) -> None:
        self._stopped = True
        for _, parcel, _ in self.pending:
            if parcel is not None:
                parcel.come_back()
        self.pending.clear()
        self._stop_watching()

    def _stop_watching(self) -> None:
        if self._endpoint.fileno() >= 0:
            reactor.get().set_writer(self._endpoint.fileno(), None)
        if self._keeping is not None:
            self._keeping(False)
        self._changed.notify_all()
        if self._closing:
            self._then()

    def flush(self) -> None:
        """Send what the socket takes of what waits. Never blocks, never raises for a closed queue."""
        with self._lock:
            if not self.pending:
                return
            try:
                while self.pending:
                    data, parcel, tag = self.pending[0]
                    if not self._try_send(data, () if parcel is None else parcel.descriptors(self.reader)):
                        return
                    self.pending.popleft()
                    if self._sent is not None:
                        self._sent(tag, data)
            except BrokenPipeError:
                self._drop()
            else:
                self._stop_watching()
        if self._emptied is not None:
            self._emptied()

    def withdraw(self) -> list[tuple[bytes, Payload | None]]:
        """What waits here, in order; it is the caller's now, who sends it in another way. Nothing more is taken."""
        with self._lock:
            self._stopped = True
            waiting = [(data, parcel) for data, parcel, _ in self.pending]
            self.pending.clear()
            if waiting and self._endpoint.fileno() >= 0:
                reactor.get().set_writer(self._endpoint.fileno(), None)
            self._changed.notify_all()
        return waiting

    def wait_empty(self, timeout: float | None = None) -> bool:
        """Wait until nothing waits here any more, because it was sent or because the other side is gone."""
        with self._changed:
            return self._changed.wait_for(lambda: not self.pending, timeout)

    def close_when_sent(self, then: Callable[[], None]) -> None:
        """Take nothing more, and call ``then`` as soon as nothing waits. Returns at once."""
        with self._lock:
            if self._closing:
                return
            self._closing = self._stopped = True
            self._then = then
            if not self.pending:
                then()

    def abandon(self) -> None:
        self.pending.clear()
        self._stopped = True
