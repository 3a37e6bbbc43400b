"""Copies batches into pinned memory ahead of the consumer, in a thread, as torch's loader does.

The thread receives, decodes and pins answers, in the order in which the consumer will want them.

Invariants:

* For each ``expect`` the thread receives one answer, even if nobody wants it any more: the consumer drops those.
* While the thread runs, no other thread receives: it would take an answer for which this one then waits in vain. So
  the thread is stopped before the workers are closed.
* The last thing that ``receive`` raises is what has ended the thread, or that it was stopped.
"""

from __future__ import annotations

import queue
import threading
import time
from typing import Any

import torch

from ..marshalling import exceptions
from . import internals
from .messages import Batch, End, Failure
from .result_receiver import ResultReceiver
from .worker_handle import WorkerGone, WorkerHandle


class Pinner:
    """The thread that takes answers from ``receiver``, and pins them for ``device``."""

    def __init__(self, receiver: ResultReceiver, device: Any) -> None:
        self._receiver = receiver
        self._device = device
        self._expected: queue.SimpleQueue[WorkerHandle | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[tuple[WorkerHandle | None, Any]] = queue.SimpleQueue()
        self._restarted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        receiver.use_from_thread()
        self._device_index = torch.accelerator.current_device_index() if torch.accelerator.is_available() else None
        self._thread = threading.Thread(target=self._run, name="torchwq-pin", daemon=True)
        self._thread.start()

    def expect(self, worker: WorkerHandle) -> None:
        """One more answer of this worker will come."""
        self._expected.put(worker)
        self._receiver.recheck()

    def restarted(self) -> None:
        """A dead worker was replaced: its answers will come."""
        self._restarted.put(True)

    def receive(self, worker: WorkerHandle, deadline: float | None) -> tuple[WorkerHandle, Any]:
        """The next answer, pinned, and the worker that has sent it. ``worker`` is ignored: the thread knows it.

        Raises TimeoutError after ``deadline`` (time.monotonic); WorkerGone, after which the thread waits for
        ``restarted``; or what has ended the thread.
        """
        try:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            sender, answer = self._ready.get(timeout=left)
        except queue.Empty:
            raise TimeoutError from None
        if sender is None:
            try:
                raise answer
            finally:
                del answer  # or the error would keep this frame, and that the error
        return sender, answer

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
                    worker, answer = self._receiver.receive(expected, None)
                    break
                except WorkerGone as gone:
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
        """End the thread, and wait at most ``timeout`` seconds for that: it may be in a user's ``pin_memory``."""
        self._receiver.stop()
        self._expected.put(None)
        self._restarted.put(False)
        self._ready.put((None, RuntimeError("the DataLoader's iterator was closed while a batch was waited for")))
        self._thread.join(timeout)
        self._receiver.close()

    @property
    def is_in_current_thread(self) -> bool:
        """Whether the current thread is the one that pins."""
        return self._thread is threading.current_thread()
