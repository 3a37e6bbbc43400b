"""Copies batches into pinned memory ahead of the consumer, in a thread, as torch's loader does.

A batch is unpickled and pinned by the thread; the consumer finds it ready. The thread takes answers in the order in
which the consumer will want them.

Invariant: for each ``expect`` the thread receives one answer. Those that nobody wants any more are received too, and
dropped by ``get``: which these are is known by counting, because each worker answers in order.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from ..marshalling import exceptions
from . import internals
from .crew import Gone, Hand
from .messages import Batch, End, Failure


class Pinner:
    """The thread. ``receive(hand)`` takes the next answer; it raises what the consumer is to see."""

    def __init__(self, receive: Callable[[Hand], tuple[Hand, Any]], device: Any) -> None:
        self._receive = receive
        self._device = device
        self._expected: queue.SimpleQueue[Hand | None] = queue.SimpleQueue()
        #: Which generation each worker's next answers belong to.
        self._generations: dict[Hand, deque[int]] = {}
        self._generation = 0
        self._ready: queue.SimpleQueue[tuple[Hand | None, Any]] = queue.SimpleQueue()
        self._mended: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._stopped = False
        self._device_index = torch.accelerator.current_device_index() if torch.accelerator.is_available() else None
        self._thread = threading.Thread(target=self._run, name="torchwq-pin", daemon=True)
        self._thread.start()

    def expect(self, hand: Hand) -> None:
        """One more answer of this worker will come."""
        self._generations.setdefault(hand, deque()).append(self._generation)
        self._expected.put(hand)

    def abandon(self) -> None:
        """Nobody wants what was expected until now."""
        self._generation += 1

    def mended(self) -> None:
        """A worker that was gone has been replaced: what it was to answer will come."""
        self._mended.put(True)

    def get(self, deadline: float | None) -> tuple[Hand, Any]:
        """The next answer, pinned. Raises TimeoutError after ``deadline`` (time.monotonic), or what has gone wrong."""
        while True:
            try:
                hand, answer = self._ready.get(
                    timeout=None if deadline is None else max(0.0, deadline - time.monotonic())
                )
            except queue.Empty:
                raise TimeoutError from None
            if hand is None:
                raise answer
            if self._generations[hand].popleft() == self._generation:
                return hand, answer
            hand.consumed()

    def _run(self) -> None:
        torch.set_num_threads(1)
        if self._device_index is not None:
            torch.accelerator.set_device_index(self._device_index)
        while True:
            expected = self._expected.get()
            if expected is None:
                return
            while True:
                try:
                    hand, answer = self._receive(expected)
                    break
                except Gone as gone:
                    self._ready.put((None, gone))
                    if not self._mended.get():
                        return
                except Exception as error:
                    if not self._stopped:
                        self._ready.put((None, error))
                    return
            self._ready.put((hand, self._pin(answer)))

    def _pin(self, answer: Any) -> Any:
        try:
            if type(answer) is Batch:
                answer.data = internals.pin_memory(answer.data, self._device)
            elif type(answer) not in (End, Failure):
                answer = internals.pin_memory(answer, self._device)
        except Exception as error:
            return Failure(exceptions.pack(error), f"in the thread that pins memory for device {self._device}")
        return answer

    def stop(self) -> None:
        """End the thread as soon as what it waits for is closed."""
        self._stopped = True
        self._expected.put(None)
        self._mended.put(False)

    def join(self) -> None:
        if self._thread is not threading.current_thread():
            self._thread.join()
