"""A loader's workers as processes or threads: one interface to multiprocessing's processes and torchwq's workers.

Programs look into ``iterator._workers``, which torch's iterator has, too. They find the ``handle`` of each worker, with
the methods of a ``multiprocessing.Process``. It does not keep the iterator alive.
"""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Any, Final

from ..transport.capabilities import SAME_MACHINE, Capabilities
from ..workers import worker

#: Seconds that a worker may take to end by itself, as with torch's DataLoader (``MP_STATUS_CHECK_INTERVAL``): for its
#: present sample, ``finally`` blocks of generators, and exit functions.
END_TIMEOUT: Final = 5.0
#: Seconds for which ``pid`` waits for the fork server, which may be importing torch.
_START_TIMEOUT: Final = 60.0


class ForkedWorker:
    """A process that multiprocessing has forked."""

    #: What it and the loader can give each other, and whether ``kill`` always ends it.
    peer: Capabilities = SAME_MACHINE
    can_be_killed = True
    #: Why it has ended, if more is known than the exit code.
    reason = ""

    def __init__(self, process: Any) -> None:
        self.handle = process
        self.pid: int | None = process.pid

    @property
    def exitcode(self) -> int | None:
        """Its exit code; None while it runs."""
        return self.handle.exitcode  # type: ignore[no-any-return]

    def wait(self, seconds: float | None) -> bool:
        """Whether it ends within ``seconds``; None waits for ever."""
        self.handle.join(seconds)
        return self.handle.exitcode is not None

    def kill(self, number: signal.Signals) -> None:
        """Send it a signal, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            if self.handle.exitcode is None and self.pid is not None:
                os.kill(self.pid, number)


class StartedWorker:
    """A process from torchwq's fork server, or a thread, with the methods of ``multiprocessing.Process``."""

    daemon = True

    def __init__(self, process: worker.Worker) -> None:
        self._process = process
        self.peer, self.can_be_killed = process.peer, process.can_be_killed

    @property
    def handle(self) -> StartedWorker:
        """For ``iterator._workers``."""
        return self

    @property
    def pid(self) -> int | None:
        """The process id, for which this waits until the fork server sends it; None for a thread."""
        self._process.started_event.wait(_START_TIMEOUT)
        return self._process.pid

    @property
    def ident(self) -> int | None:
        """The same as ``pid``."""
        return self.pid

    @property
    def name(self) -> str:
        """A name like that of a process of multiprocessing."""
        return f"torchwq-worker-{self._process.info.mapid}"

    @property
    def exitcode(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.exitcode

    @property
    def reason(self) -> str:
        """Why it has ended, if more is known than the exit code."""
        return self._process.reason

    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return not self._process.ended_event.is_set()

    def wait(self, seconds: float | None) -> bool:
        """Whether it ends within ``seconds``; None waits for ever."""
        return self._process.wait(seconds)

    def join(self, timeout: float | None = None) -> None:
        """Wait until it has ended, ``timeout`` seconds at most."""
        self.wait(timeout)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send it a signal, if it still runs."""
        self._process.kill(number)

    def terminate(self) -> None:
        """Ask it to end."""
        self.kill(signal.SIGTERM)


Process = ForkedWorker | StartedWorker
