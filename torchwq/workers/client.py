"""The connection of this process to a fork server: its own, or, in a worker, the one that forked it.

A process that was started by torchwq shares its forefather's server, so workers of workers start as fast. Any other
process starts a server when it first needs one. If the server dies, all its workers have died with it; the next
order starts another.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Protocol

from ..transport import namespace, reactor
from ..transport.process import closed_in_child, reset_in_child
from ..transport.sockets import rights
from . import descent, server


class Ordered(Protocol):
    """A worker that was ordered from a server. Called in the reactor's thread; must not block."""

    def started(self, pid: int) -> None: ...

    def ended(self, status: int | None, reason: str) -> None:
        """``status`` as of ``waitpid``; None if the worker was never started or nobody can tell."""
        ...


class Connection:
    """A connection to one fork server. Safe to use from several threads."""

    def __init__(self, sock: socket.socket, process: subprocess.Popen[bytes] | None) -> None:
        self._socket = sock
        self.process = process
        self.lost = False
        self.warm = threading.Event()
        self._lock = threading.Lock()
        self._tokens = itertools.count(1)
        self._ordered: dict[int, Ordered] = {}
        self._running: dict[int, Ordered] = {}
        self._buffer = b""
        closed_in_child(self)
        reactor.get().set_reader(sock.fileno(), self._ready)

    def order(self, worker: Ordered, fds: Sequence[int]) -> None:
        """Have a worker forked that gets ``fds``. Raises BrokenPipeError if the server is gone."""
        with self._lock:
            token = next(self._tokens)
            self._ordered[token] = worker
            try:
                self._socket.sendmsg([server.FRAME.pack(b"F", 0, token)], rights(fds))
            except OSError as error:
                del self._ordered[token]
                raise BrokenPipeError(error.errno, "the fork server is gone") from error

    def order_preload(self) -> None:
        """Have the imports done that the first worker needs; ``warm`` is set when they are."""
        with self._lock, contextlib.suppress(OSError):
            self._socket.send(server.FRAME.pack(b"P", 0, 0))

    def kill(self, pid: int, number: signal.Signals) -> None:
        """Send a signal to a worker. The server does it, because only it knows that the pid is still the worker's."""
        with self._lock, contextlib.suppress(OSError):
            self._socket.send(server.FRAME.pack(b"K", pid, number))

    def _ready(self) -> None:
        try:
            data = self._socket.recv(65536, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lose()
            return
        self._buffer += data
        while len(self._buffer) >= server.FRAME.size:
            op, number, token = server.FRAME.unpack_from(self._buffer)
            self._buffer = self._buffer[server.FRAME.size :]
            self._handle(op, number, token)

    def _handle(self, op: bytes, number: int, token: int) -> None:
        if op == b"S":
            worker = self._ordered.pop(token)
            self._running[number] = worker
            worker.started(number)
        elif op == b"E":
            limit = " (a limit on processes: RLIMIT_NPROC or the cgroup's pids.max)" if number == errno.EAGAIN else ""
            self._ordered.pop(token).ended(None, f"it could not be started: {os.strerror(number)}{limit}")
        elif op == b"P":
            self.warm.set()
        elif op == b"X":
            self._running.pop(number).ended(token, "")

    def _lose(self) -> None:
        self.lost = True
        self.warm.set()  # whoever waits for it must not wait for ever
        reactor.get().remove(self._socket.fileno())
        self._tell_workers("the fork server, which had started it, died, and its workers with it")

    def _tell_workers(self, reason: str) -> None:
        workers = [*self._ordered.values(), *self._running.values()]
        self._ordered.clear()
        self._running.clear()
        for worker in workers:
            worker.ended(None, reason)

    def close(self) -> None:
        """Give the server up; it ends, with whatever workers are left, and is waited for."""
        self.lost = True
        self.warm.set()
        if self._socket.fileno() >= 0:
            reactor.get().remove(self._socket.fileno())
        self._socket.close()
        if self._ordered or self._running:  # by a thread that starts workers while the interpreter ends
            reactor.get().call_later(0, lambda: self._tell_workers("the process that had started it is ending"))
        if self.process is not None:
            try:
                self.process.wait(2)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def abandon(self) -> None:
        self._socket.close()
        if self.process is not None:
            self.process.returncode = 0  # not this process's child: nothing to wait for, nothing to warn about


_connection: Connection | None = None
_guard = threading.RLock()


@reset_in_child
def _forget() -> None:
    global _connection, _guard
    _connection, _guard = None, threading.RLock()


def connect() -> Connection:
    """The connection of this process, made now if there is none."""
    global _connection
    with _guard:
        if _connection is None or _connection.lost:
            if _connection is not None:
                _connection.close()
            space = namespace.current()  # making it may have connected us already, to have it guarded
            if _connection is None or _connection.lost:
                _connection = _launch(space.path if space.made else "")
        return _connection


def warm_up(wait: bool = True) -> None:
    """Start the fork server now, so that the first workers start as fast as later ones.

    Without it, the server starts when it is first needed, which takes as long as importing torch does. Workers share
    the server of the process that started them, so this does nothing in a worker.

    Args:
        wait: return when the server is ready; False returns at once and lets it get ready in the background.

    Source: what ``multiprocessing.set_forkserver_preload`` is for.
    """
    descent.warm_up()
    connection = connect()
    connection.order_preload()
    if wait:
        connection.warm.wait()


def born_with(fd: int) -> None:
    """Use the connection that this worker was given when it was forked."""
    global _connection
    _connection = Connection(socket.socket(fileno=fd), None)


def close() -> None:
    global _connection
    with _guard:
        if _connection is not None:
            _connection.close()
            _connection = None


def _launch(namespace_path: str) -> Connection:
    ours, theirs = socket.socketpair()
    settings = {"path": [os.path.abspath(path) for path in sys.path], "namespace": namespace_path}
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    with theirs:
        process = subprocess.Popen(
            [sys.executable, *flags, server.__file__, str(theirs.fileno()), json.dumps(settings)],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
    return Connection(ours, process)


def _guard_namespace(path: str) -> None:
    """A folder was made: the server sees to its end if this process is killed."""
    global _connection
    with _guard:
        if _connection is None or _connection.lost:
            _connection = _launch(path)


namespace.on_made(_guard_namespace)
