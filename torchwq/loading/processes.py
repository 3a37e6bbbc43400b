"""A loader's workers as processes or threads: one interface over multiprocessing's processes and torchwq's workers.

``handle`` is what programs find in ``iterator._workers``, as they do in that of torch's iterator: it has the methods of
a ``multiprocessing.Process``. It does not keep the iterator alive.
"""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Any, Final, Protocol

from ..workers import threads, worker

#: How long, in seconds, whoever asks for a pid waits for the fork server, which may import torch meanwhile.
_START_TIMEOUT: Final = 60.0
#: How long, in seconds, a thread that has ended may take until it is gone.
_THREAD_END_TIMEOUT: Final = 1.0


class Process(Protocol):
    """A worker's process or thread, however it was started."""

    #: Whether it is a thread.
    is_thread: bool

    @property
    def pid(self) -> int | None: ...
    @property
    def exitcode(self) -> int | None: ...
    @property
    def handle(self) -> Any: ...
    def wait(self, seconds: float | None) -> bool: ...
    def kill(self, number: signal.Signals) -> None: ...


class Forked:
    """A process that multiprocessing has forked."""

    is_thread = False

    def __init__(self, process: Any) -> None:
        self.handle = process
        self.pid: int | None = process.pid

    @property
    def exitcode(self) -> int | None:
        return self.handle.exitcode  # type: ignore[no-any-return]

    def wait(self, seconds: float | None) -> bool:
        self.handle.join(seconds)
        return self.handle.exitcode is not None

    def kill(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self.handle.exitcode is None and self.pid is not None:
                os.kill(self.pid, number)


class Served:
    """A process from torchwq's fork server, or a thread. Has the methods of ``multiprocessing.Process``, too."""

    daemon = True

    def __init__(self, process: worker.Worker) -> None:
        self._process = process
        self.is_thread = process.here

    @property
    def handle(self) -> Served:
        return self

    @property
    def pid(self) -> int | None:
        """Waits until the fork server has told it, which it does at once. None of a thread."""
        self._process.started_event.wait(_START_TIMEOUT)
        return self._process.pid

    @property
    def ident(self) -> int | None:
        return self.pid

    @property
    def name(self) -> str:
        return f"torchwq-worker-{self._process.info.mapid}"

    @property
    def exitcode(self) -> int | None:
        return self._process.exitcode

    def is_alive(self) -> bool:
        return not self._process.ended_event.is_set()

    def wait(self, seconds: float | None) -> bool:
        if self._process is threads.current():
            return True  # the iterator was dropped in its own worker
        if not self._process.ended_event.wait(seconds):
            return False
        if isinstance(self._process, threads.ThreadWorker):
            # It has ended for all but itself. Not for long: what it does last may want a lock that this thread has.
            self._process.thread.join(_THREAD_END_TIMEOUT)
        return True

    def join(self, timeout: float | None = None) -> None:
        self.wait(timeout)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        self._process.kill(number)

    def terminate(self) -> None:
        self.kill(signal.SIGTERM)
