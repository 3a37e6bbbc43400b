"""Copies batches into pinned memory ahead of the consumer, in a thread, as torch's loader does.

A batch is unpickled and pinned by the thread; the consumer finds it ready. The thread takes answers in the order in
which the consumer will want them.

Invariants:

* For each ``expect`` the thread receives one answer. Those that nobody wants any more are received too, and dropped by
  ``get``: which these are is known by counting, because each worker answers in order.
* While the thread runs, nobody else receives: whoever did would take an answer that the thread then waits for in vain.
  So it is stopped, and does not wait any more, before the workers are closed.
* The last that ``get`` gives is an error: what has ended the thread, or that it was stopped.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from typing import Any

import torch

from ..marshalling import exceptions
from . import internals
from .messages import Batch, End, Failure
from .result_receiver import ResultReceiver
from .worker_pool import Gone, WorkerHandle


class Pinner:
    """The thread that takes what comes in at ``result_receiver``."""

    def __init__(self, receiver: ResultReceiver, device: Any) -> None:
        self._receiver = receiver
        self._device = device
        self._expected: queue.SimpleQueue[WorkerHandle | None] = queue.SimpleQueue()
        #: Which generation each worker's next answers belong to.
        self._generations: dict[WorkerHandle, deque[int]] = {}
        self._generation = 0
        self._ready: queue.SimpleQueue[tuple[WorkerHandle | None, Any]] = queue.SimpleQueue()
        #: What was found in ``_ready`` among answers that nobody wants.
        self._found: deque[tuple[WorkerHandle, Any]] = deque()
        self._restarted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        receiver.leave_to_thread()
        self._device_index = torch.accelerator.current_device_index() if torch.accelerator.is_available() else None
        self._thread = threading.Thread(target=self._run, name="torchwq-pin", daemon=True)
        self._thread.start()

    def expect(self, worker: WorkerHandle) -> None:
        """One more answer of this worker will come."""
        self._generations.setdefault(worker, deque()).append(self._generation)
        self._expected.put(worker)
        self._receiver.look_again()

    def abandon(self) -> None:
        """Nobody wants what was expected until now."""
        self._generation += 1
        while self._found:
            self._found.popleft()[0].consumed()

    def restarted(self) -> None:
        """A worker that was gone has been replaced: what it was to answer will come."""
        self._restarted.put(True)

    def get(self, deadline: float | None) -> tuple[WorkerHandle, Any]:
        """The next answer, pinned.

        Raises TimeoutError after ``deadline`` (time.monotonic), Gone, after which the thread waits for ``restarted``,
        or what has ended the thread.
        """
        if self._found:
            return self._found.popleft()
        while True:
            worker, answer, generation = self._next(deadline)
            if generation == self._generation:
                return worker, answer
            worker.consumed()

    def receive_stale(self, deadline: float | None) -> None:
        """Drop what nobody wants any more, and wait for what of it is still to come. Raises as ``get`` does."""
        while any(expected and expected[0] != self._generation for expected in self._generations.values()):
            worker, answer, generation = self._next(deadline)
            if generation == self._generation:
                self._found.append((worker, answer))
            else:
                worker.consumed()

    def _next(self, deadline: float | None) -> tuple[WorkerHandle, Any, int]:
        try:
            worker, answer = self._ready.get(
                timeout=None if deadline is None else max(0.0, deadline - time.monotonic())
            )
        except queue.Empty:
            raise TimeoutError from None
        if worker is None:
            try:
                raise answer
            finally:
                del answer  # or the error would keep this frame, and that the error
        return worker, answer, self._generations[worker].popleft()

    def _run(self) -> None:
        try:
            self._receive_and_pin()
        except BaseException as error:
            if not self._receiver.stopped:
                self._ready.put((None, error))

    def _receive_and_pin(self) -> None:
        torch.set_num_threads(1)
        if self._device_index is not None:
            torch.accelerator.set_device_index(self._device_index)
        while True:
            expected = self._expected.get()
            if expected is None or self._receiver.stopped:
                return
            while True:
                try:
                    worker, answer = self._receiver.wait(expected)
                    break
                except Gone as gone:
                    self._ready.put((None, gone))
                    if not self._restarted.get():
                        return
            self._ready.put((worker, self._pin(answer)))

    def _pin(self, answer: Any) -> Any:
        try:
            if type(answer) is Batch:
                answer.data = internals.pin_memory(answer.data, self._device)
            elif type(answer) not in (End, Failure):
                answer = internals.pin_memory(answer, self._device)
        except BaseException as error:
            return Failure(exceptions.pack(error), f"in the thread that pins memory for device {self._device}")
        return answer

    def stop(self, timeout: float) -> None:
        """End the thread, and wait for that, ``timeout`` seconds at most: it may be in a user's ``pin_memory``."""
        self._receiver.stop()
        self._expected.put(None)
        self._restarted.put(False)
        self._ready.put((None, RuntimeError("the DataLoader's iterator was closed while a batch was waited for")))
        self._thread.join(timeout)
        self._receiver.close()

    @property
    def is_in_current_thread(self) -> bool:
        return self._thread is threading.current_thread()
