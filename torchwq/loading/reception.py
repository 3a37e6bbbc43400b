"""Where the answers of a loader's workers come in.

Apart from the iterator, so that a thread that waits here does not keep the iterator alive.
"""

from __future__ import annotations

import select
import time
from typing import Any

from ..marshalling import codec
from ..transport.endpoint import Received
from .crew import Gone, Hand
from .statistics import Meter


class Reception:
    """Receives from ``hands``, which may grow; ``in_order``, from the one that is asked for, or else from any."""

    def __init__(self, hands: list[Hand], in_order: bool, meter: Meter) -> None:
        self._hands = hands
        self._in_order = in_order
        self._meter = meter

    def wait(self, hand: Hand) -> tuple[Hand, Any]:
        """The next answer, unpickled. Raises Gone if a worker has ended, EOFError if it was closed here."""
        found, received = self.receive(hand, None)
        if received is None:
            raise EOFError
        return found, codec.decode(*received)

    def receive(self, hand: Hand, deadline: float | None) -> tuple[Hand, Received | None]:
        """The next answer that is not to be skipped; None after ``deadline`` (time.monotonic)."""
        while True:
            found, received = self._from_one(hand, deadline) if self._in_order else self._from_any(deadline)
            if received is None or not found.to_skip:
                return found, received
            found.to_skip -= 1
            found.consumed()
            codec.discard(*received)

    def _from_one(self, hand: Hand, deadline: float | None) -> tuple[Hand, Received | None]:
        try:
            received = hand.take()
            if received is None:
                hand.flush()  # so nobody waits for an answer to what was not asked
                began = time.perf_counter_ns()
                received = hand.waiter.wait(hand.take, deadline)
                self._meter.waited += time.perf_counter_ns() - began
        except EOFError:
            raise Gone(hand) from None
        return hand, received

    def _from_any(self, deadline: float | None) -> tuple[Hand, Received | None]:
        busy = [hand for hand in self._hands if hand.tasks or hand.to_skip]
        began = 0
        while True:
            for hand in busy:
                try:
                    received = hand.take()
                except EOFError:
                    raise Gone(hand) from None
                if received is not None:
                    if began:
                        self._meter.waited += time.perf_counter_ns() - began
                    return hand, received
            began = began or time.perf_counter_ns()
            poll = select.poll()
            for hand in busy:
                hand.flush()
                poll.register(hand.end.fileno(), select.POLLIN)
            left = 0.5 if deadline is None else min(0.5, deadline - time.monotonic())
            if left <= 0:
                return busy[0], None
            poll.poll(left * 1000)
