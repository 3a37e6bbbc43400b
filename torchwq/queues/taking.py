"""How a worker takes questions, and notes them: see ``worker``, whose invariants hold here.

This is part of the native part, with a twin in Python.
"""

from __future__ import annotations

import threading
from _thread import get_ident
from collections.abc import Callable
from typing import TYPE_CHECKING

from .. import _native
from ..pipe.room import SharedRoom
from ..transport.endpoint import Received
from ..transport.trailer import number_of
from .counters import BUSY, Counters


class PythonTakerFields:
    """See ``WorkerSide``."""

    taking: threading.RLock
    receive: Callable[[], Received | None]
    #: Threads that have taken a question, and those that are at one.
    known: set[int]
    busy: set[int]
    closed: str
    room: SharedRoom | None
    #: What the state word of the slot says, as long as there is one.
    state: int
    #: How many answers have left.
    written: int
    #: Where the words of the slot are in memory: the native part writes there. Not used by the twin.
    address: int
    _counters: Counters
    _number_at: int
    _state_at: int

    def take(self) -> Received | None:
        """The next question, noted; None if there is none."""
        ident = get_ident()
        with self.taking:
            try:
                received = self.receive()
            except EOFError:
                self.owner_gone()
                return None
            if received is None:
                return None
            number = number_of(received[0])
            if ident not in self.known:
                self.meet(ident)
            words = self._counters.words
            if self.closed:
                return received
            if words[self._number_at] < number:
                words[self._number_at] = number
            if ident in self.busy:
                self.state += BUSY
            else:
                self.state += BUSY + 1
                self.busy.add(ident)
            if self._counters.fd < 0:
                return received
            words[self._state_at] = self.state
            if self.room is not None:
                self.room.made()
            return received

    def idle(self, ident: int) -> None:
        """The thread is not busy any more."""
        with self.taking:
            if ident not in self.busy:
                return
            self.state -= 1
            self.busy.remove(ident)
            if not self.closed:
                self._counters.words[self._state_at] = self.state

    def answered(self, ident: int, data: bytes) -> None:
        """An answer of the thread ``ident`` has left."""
        self.written += 1
        self.idle(ident)

    def meet(self, ident: int) -> None:
        raise NotImplementedError

    def owner_gone(self) -> None:
        raise NotImplementedError


TakerFields = PythonTakerFields
if not TYPE_CHECKING and _native.core is not None:
    TakerFields = _native.core.TakerFields
