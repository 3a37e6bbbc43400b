"""The connection to a fork server: to one of this process, or, in a worker, to the server that forked it.

A worker shares the server of its owner, so workers of workers start as fast. Any other process starts a server with its
first worker. A server's death kills its workers; the next request starts another server.

Invariants:

* A server that does not fit this process any more (see :mod:`.privileges`) gets no request: the next request starts
  another server. The old one forks no more, and ends with its last worker.
* The connection that requests a worker also reports its end and passes signals on.
* Each worker's end is reported once: the thread that takes the worker out of ``_requested`` or ``_running`` reports it.
  Both change under the lock.
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
from collections.abc import Hashable, Sequence
from typing import Final, Protocol

from ..errors import TorchwqError, WorkerStartError
from ..transport import descriptors, namespace, reactor
from ..transport.fork import closed_in_child, reset_in_child
from ..transport.sockets import is_broken, scm_rights
from . import executable, privileges, server, streams

#: Absolute: the working directory may change.
_SERVER: Final = os.path.abspath(server.__file__)
#: The module whose ``main`` is run in each worker.
_ENTRY: Final = f"{__package__}.child"


class RequestedWorker(Protocol):
    """A worker that a server was asked to fork. The reactor's thread calls the methods; they must not block."""

    def on_started(self, pid: int) -> None: ...

    def on_ended(self, status: int | None, reason: str) -> None:
        """``status``: as of ``waitpid``; None if it is not known, or the worker was never started."""
        ...


class ServerConnection:
    """A connection to one fork server. Safe to use from several threads.

    Args:
        sock: the socket to the server; the connection closes it.
        process: the server, if this process has started it.
        guarded_folder: the namespace folder that the server will remove; empty if it has none.
        server_privileges: the server's privileges; None: those of the calling thread.
    """

    def __init__(
        self,
        sock: socket.socket,
        process: subprocess.Popen[bytes] | None,
        guarded_folder: str = "",
        server_privileges: tuple[Hashable, ...] | None = None,
    ) -> None:
        self._socket = sock
        self.process = process
        self.guarded_folder = guarded_folder
        self._privileges = privileges.current() if server_privileges is None else server_privileges
        self._hard_limits = privileges.hard_limits()
        self._executable = executable.set_by_user()
        self.lost = False
        #: Why the connection was lost, unless this process closed it.
        self.failure = ""
        self._answered = False
        self.warm = threading.Event()
        self._lock = threading.RLock()
        self._tokens = itertools.count(1)
        self._requested: dict[int, RequestedWorker] = {}
        self._running: dict[int, RequestedWorker] = {}
        self._buffer = b""
        closed_in_child(self)
        reactor.get().set_reader(sock.fileno(), self._ready)

    def fits(self) -> bool:
        """Whether a worker from this server has the privileges that a child of the calling thread would have."""
        return (
            executable.set_by_user() in (None, self._executable)
            and privileges.allows(self._hard_limits)
            and self._privileges == privileges.current()
        )

    def request(self, worker: RequestedWorker, fds: Sequence[int]) -> None:
        """Ask the server to fork a worker that gets ``fds``. Raises BrokenPipeError if the server is dead."""
        with self._lock:
            if self.lost:
                raise BrokenPipeError(errno.EPIPE, "the fork server is gone")
            token = next(self._tokens)
            self._requested[token] = worker
            try:
                self._socket.sendmsg([server.FRAME.pack(b"F", 0, token)], scm_rights(fds))
            except OSError as error:
                del self._requested[token]
                if is_broken(error, self._socket.fileno() < 0):
                    raise BrokenPipeError(error.errno, "the fork server is gone") from error
                raise

    def retire(self, *, keep_folder: bool) -> None:
        """Request no more: the server ends with its last worker. ``keep_folder``: another server guards the folder."""
        with self._lock, contextlib.suppress(OSError):
            self._socket.send(server.FRAME.pack(b"R", int(keep_folder), 0))

    def request_preload(self) -> None:
        """Ask the server to import what workers need; sets ``warm`` when the server has answered."""
        with self._lock, contextlib.suppress(OSError):
            self._socket.send(server.FRAME.pack(b"P", 0, 0))

    def kill(self, pid: int, number: signal.Signals) -> None:
        """Send a signal to a worker, through the server: only the parent knows that the pid is still the worker's."""
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
            self._on_disconnect()
            return
        self._buffer += data
        while len(self._buffer) >= server.FRAME.size:
            op, number, token = server.FRAME.unpack_from(self._buffer)
            self._buffer = self._buffer[server.FRAME.size :]
            self._dispatch(op, number, token)

    def _dispatch(self, op: bytes, number: int, token: int) -> None:
        self._answered = True
        if op == b"S":
            with self._lock:
                worker = self._requested.pop(token, None)
                if worker is not None:
                    self._running[number] = worker
            if worker is not None:
                worker.on_started(number)
        elif op == b"E":
            reason = f"it could not be started: {os.strerror(number)}{_limit(number)}"
            self._report_end(self._requested, token, None, reason)
        elif op == b"P":
            self.warm.set()
        elif op == b"X":
            self._report_end(self._running, number, token, "")

    def _report_end(self, workers: dict[int, RequestedWorker], key: int, status: int | None, reason: str) -> None:
        with self._lock:
            worker = workers.pop(key, None)
        if worker is not None:
            worker.on_ended(status, reason)

    def _on_disconnect(self) -> None:
        if self._answered or self.process is None:
            self.failure = "the fork server, which had started it, died, and its workers with it"
        else:
            self.failure = "the fork server ended before it was ready; it has printed why, if this process has a stderr"
        with self._lock:
            self.lost = True
        self.warm.set()
        reactor.get().remove(self._socket.fileno())
        self._report_all_ended(self.failure)

    def _report_all_ended(self, reason: str) -> None:
        with self._lock:
            workers = [*self._requested.values(), *self._running.values()]
            self._requested.clear()
            self._running.clear()
        for worker in workers:
            worker.on_ended(None, reason)

    @property
    def is_over(self) -> bool:
        """Whether the server has ended and was waited for."""
        return self.lost and (self.process is None or self.process.poll() is not None)

    def close(self) -> None:
        """Close the connection. The server ends, with the workers that are left; wait for it."""
        with self._lock:
            self.lost = True
        self.warm.set()
        if self._socket.fileno() >= 0:
            reactor.get().remove(self._socket.fileno())
        self._socket.close()
        if self._requested or self._running:  # a thread has requested them while the interpreter exits
            reactor.get().call_later(0, lambda: self._report_all_ended("the process that had started it is ending"))
        if self.process is not None:
            try:
                self.process.wait(2)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(PermissionError):  # this process has dropped privileges that the server has
                    self.process.kill()
                    self.process.wait()

    def abandon(self) -> None:
        self._socket.close()
        if self.process is not None:
            self.process.returncode = 0  # the parent's child: keeps Popen from waiting and warning


def _limit(number: int) -> str:
    """Return the limit that an error number of the server stands for, for an error message."""
    if number == errno.EAGAIN:
        return " (a limit on processes: RLIMIT_NPROC or the cgroup's pids.max)"
    if number in (errno.EMFILE, errno.ENFILE):
        return " (the fork server has too many file descriptors open: raise RLIMIT_NOFILE, or have fewer workers)"
    return ""


_connection: ServerConnection | None = None
#: Connections to servers that do not fit any more, but may have workers.
_retired: list[ServerConnection] = []
_guard = threading.RLock()


@reset_in_child
def _forget() -> None:
    global _connection, _guard
    _connection, _guard = None, threading.RLock()
    _retired.clear()


def connect() -> ServerConnection:
    """Return this process's connection to a server that fits it; starts one if necessary.

    Raises WorkerStartError if no program can run the server, ResourceError if the system's limits do not allow it.
    """
    with _guard:
        if _connection is not None and _is_usable(_connection):
            return _connection
    space = namespace.current()  # before ``_guard``: making the namespace may call ``_guard_folder``
    with _guard:
        if _connection is not None and _is_usable(_connection):
            return _connection
        return _launch(space.path if space.made else "")


def _is_usable(connection: ServerConnection) -> bool:
    return not connection.lost and connection.fits()


def adopt_connection(fd: int) -> None:
    """Use the connection that the server gave this worker; both have the same privileges."""
    global _connection
    _connection = ServerConnection(socket.socket(fileno=fd), None)


def close() -> None:
    global _connection
    with _guard:
        connections = _retired if _connection is None else [_connection, *_retired]
        for connection in connections:
            connection.close()
        _connection = None
        _retired.clear()


def _launch(folder: str) -> ServerConnection:
    """Start a server that guards ``folder``, and use it for all further requests."""
    global _connection
    new = _start(folder)
    old, _connection = _connection, new
    _retired[:] = [each for each in _retired if not each.is_over]
    if old is not None and old.lost:
        old.close()
    elif old is not None:
        old.retire(keep_folder=old.guarded_folder == folder)
        _retired.append(old)
    return new


def _start(folder: str) -> ServerConnection:
    program = executable.find()
    path, directory = _start_path_and_directory()
    settings = {"path": path, "namespace": folder, "entry": _ENTRY}
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    server_privileges = privileges.current()
    try:
        reactor.get()  # starting it may fail, so this comes before the server
        ours, theirs = descriptors.socketpair()
    except OSError as error:
        raise descriptors.resource_error(error) from error
    with theirs:
        try:
            process = subprocess.Popen(
                [program, *flags, _SERVER, str(theirs.fileno()), json.dumps(settings)],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=None if streams.is_stream("stderr", 2) else subprocess.DEVNULL,
                start_new_session=True,
                cwd=directory,
            )
        except OSError as error:
            ours.close()
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN):
                raise descriptors.resource_error(error) from error
            raise WorkerStartError(
                f"the fork server cannot be started: {program}: {error.strerror}, to user {os.geteuid()}"
            ) from error
    return ServerConnection(ours, process, folder, server_privileges)


def _start_path_and_directory() -> tuple[list[str], str | None]:
    """Return ``sys.path`` as absolute paths, and the server's first working directory; None: that of this process.

    If the working directory was removed, the server starts in the root: libraries that ask for it would fail.
    """
    try:
        directory = os.getcwd()
    except FileNotFoundError:
        return [path for path in sys.path if os.path.isabs(path)], "/"
    return [os.path.join(directory, path) for path in sys.path], None


def _guard_folder(path: str) -> None:
    """Start a server that removes the new folder if this process is killed.

    If no server can be started, this process removes the folder when it exits, or the next program that makes one.
    The first worker's start then raises the error.
    """
    with _guard, contextlib.suppress(TorchwqError):
        if _connection is None or not _is_usable(_connection):
            _launch(path)


namespace.on_made(_guard_folder)
