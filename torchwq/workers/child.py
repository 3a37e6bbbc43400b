"""Runs in a worker process, from the fork to its end.

The environment is clean: the module ``__main__`` is empty, no other thread runs, no queue is open. The worker takes
over the owner's *present* environment variables, working directory, ``sys.path``, ``sys.argv``, warning filters, stdout
and stderr.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import os
import pickle
import random
import signal
import sys
import threading
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch
import torch.multiprocessing

from ..memory import anonymous, limits
from ..memory.message import Message
from ..transport import directory, endpoint, kinds, namespace
from ..transport.capabilities import SAME_MACHINE
from ..transport.connection import Connection
from ..transport.trailer import payload_of
from . import client, failures, info, multiprocessing_state, privileges, shutdown

_PR_SET_PDEATHSIG: Final = 1
#: How many seconds a worker may live after its owner's death.
ORPHAN_TIMEOUT: Final = 3.0


class Context:
    """The connection of a worker to its owner, as an entry function uses it."""

    #: Says what a message to the owner may hold.
    peer = SAME_MACHINE
    max_payload: int
    #: The worker's end of its own connection, if that may have further uses: see ``Backend.connect``.
    end: Any = None

    def __init__(self, end: endpoint.Endpoint) -> None:
        self._connection = Connection(end, waitable=False)
        self.max_payload = end.max_payload

    @property
    def _failures(self) -> failures.FailureState:
        return failures.process_state  # looked up at each use: a process forked by the function has its own

    def receive(self) -> endpoint.Received:
        """Wait for the next message. Raises EOFError if the owner has closed the connection."""
        while (received := self._connection.receive()) is None:
            pass
        return received

    def send(self, payload: bytes | Message) -> None:
        """Send a message; never blocks. Raises BrokenPipeError if the owner has closed the connection."""
        self._connection.send(payload)

    def report_failure(self, error: Any) -> None:
        """Tell the worker's handles that its function has failed, with this packed error. The worker will end."""
        shutdown.failed = True
        self._failures.fail(error, ends=True)

    def report_task_failure(self, error: Any) -> None:
        """Tell the worker's handles that a task has failed, with this packed error. The worker goes on."""
        self._failures.fail(error, ends=False)

    def report_success(self) -> None:
        """Tell the worker's handles that a task has ended without an error."""
        self._failures.succeed()

    def finish(self) -> None:
        """Wait until all messages are sent."""
        self._connection.outbox.wait_empty()

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def exit_status(stop: SystemExit) -> int:
    """Return the exit status that ``sys.exit`` asks for, as the interpreter would."""
    if stop.code is None or isinstance(stop.code, int):
        return stop.code or 0
    print(stop.code, file=sys.stderr)
    return 1


def main(control: Sequence[int], server: int, stdout: int, stderr: int) -> int:
    """Run one worker. Returns its exit status."""
    _die_with_the_server()
    # ``marshalling.namespaces`` puts the definitions of the owner's ``__main__`` there.
    sys.modules["__main__"] = sys.modules["__mp_main__"] = main = types.ModuleType("__main__")
    vars(main)["__torchwq_worker__"] = True
    _redirect_streams(stdout, stderr)
    set_signal_handlers()
    limits.delay_warnings(ORPHAN_TIMEOUT)
    gc.enable()
    client.adopt_connection(server)
    context = Context(kinds.adopt(control))
    code = 1
    try:
        code = _set_up(context)(context)
        context.finish()
    finally:
        if code and not shutdown.failed:
            context.report_failure(None)
        shutdown.failed = bool(code)
        _run_exit_handlers()
        context.close()
    return code


def set_signal_handlers() -> None:
    """Leave Ctrl-C to the owner; SIGHUP and SIGTERM end the worker, whatever handlers it has inherited."""
    # The owner handles Ctrl-C; Python's default handler would print a traceback here. Programs that the worker starts
    # would inherit SIG_IGN, but not a handler.
    signal.signal(signal.SIGINT, lambda *_: None)
    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def _die_with_the_server() -> None:
    server = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != server or server == 1:
        os._exit(1)


def _redirect_streams(stdout: int, stderr: int) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (stdout, 1), (stderr, 2)):
        os.dup2(source, target)
    for fd in {null, stdout, stderr} - {0, 1, 2}:
        os.close(fd)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - lives as long as the process
    for name, fd in (("stdout", 1), ("stderr", 2)):
        setattr(sys, name, open(fd, "w", buffering=1, closefd=False, errors="backslashreplace"))  # noqa: SIM115


def _set_up(context: Context) -> Callable[[Context], int]:
    """Apply the owner's setup message, and return the entry function."""
    data, fds = context.receive()
    if not payload_of(data):  # the environment is too large for a message: it is in a block
        with contextlib.closing(anonymous.Descriptor(fds.pop())) as block:
            data = bytes(anonymous.map_private(block.fd))
    setup = pickle.loads(data)
    privileges.apply_settings(setup["settings"])
    multiprocessing_state.adopt(setup["key"], fds[0] if fds else None)
    os.environ.clear()
    os.environ.update(setup["environment"])
    os.environ[namespace.VARIABLE] = setup["namespace"]
    namespace.current()  # before the user's code can change the environment
    directory.started_ns = setup["started_ns"]
    with contextlib.suppress(OSError):  # the directory was removed
        os.chdir(setup["directory"])
    sys.path[:] = setup["path"]
    sys.argv[:] = setup["argv"]
    importlib.invalidate_caches()
    warnings.resetwarnings()
    set_filters(setup["filters"])
    info.set_process_info(setup["info"])
    set_seeds(setup["info"].seed)
    torch.set_num_threads(1)
    torch.set_default_dtype(setup["dtype"])
    torch.multiprocessing.set_sharing_strategy(setup["strategy"])
    module_name, _, function = setup["entry"].partition(":")
    entry: Callable[[Context], int] = getattr(importlib.import_module(module_name), function)
    return entry


def set_filters(filters: Sequence[tuple[Any, ...]]) -> None:
    """Take over the owner's warning filters, as ``processes.warning_filters`` gives them."""
    for action, text, category_module, category_name, module, line in filters:
        category = getattr(sys.modules.get(category_module), category_name, None)
        if isinstance(category, type):
            warnings.filterwarnings(action, text, category, module, line, append=True)


def set_seeds(seed: int) -> None:
    """Seed the generators of this process."""
    random.seed(seed)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)


def _run_exit_handlers() -> None:
    """Do what the interpreter does at exit, except for the exit itself: join threads, run exit functions, flush."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        shutdown.run()
        atexit._run_exitfuncs()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
