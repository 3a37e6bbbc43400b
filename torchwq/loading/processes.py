"""A loader's workers as processes or threads: one interface over multiprocessing's processes and torchwq's workers.

``handle`` is what programs find in ``iterator._workers``, as they do in that of torch's iterator: it has the methods of
a ``multiprocessing.Process``. It does not keep the iterator alive.
"""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Any, Final, Protocol

from ..transport.capabilities import SAME_MACHINE, Capabilities
from ..workers import worker

#: How long, in seconds, whoever asks for a pid waits for the fork server, which may import torch meanwhile.
_START_TIMEOUT: Final = 60.0


class Process(Protocol):
    """A worker's process or thread, however it was started."""

    #: What it is to its loader.
    peer: Capabilities
    #: Whether ``kill`` ends it, whatever it is at.
    can_be_killed: bool

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

    peer = SAME_MACHINE
    can_be_killed = True

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
        self.peer, self.can_be_killed = process.peer, process.can_be_killed

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
        return self._process.wait(seconds)

    def join(self, timeout: float | None = None) -> None:
        self.wait(timeout)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        self._process.kill(number)

    def terminate(self) -> None:
        self.kill(signal.SIGTERM)
