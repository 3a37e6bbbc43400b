"""A warm interpreter: it has imported torch, and forks a process for each script that a test wants to have run.

Most of what a short script costs is the import of torch. What a test looks at is torchwq, which every script imports
itself. The warm interpreter imports nothing of torchwq, starts no thread and runs no operation of torch, so a process
that it forks is what a new interpreter is just after ``import torch``:

* the script is ``__main__``, in the module that the interpreter made for it, and ends as any script does;
* it has the arguments, environment, working directory, streams and session that were asked for, and no descriptor more;
* signals do what they do in a new process.

What differs: the flags of the interpreter, what the process maps and shares with its parent, its command line in
/proc, that garbage is not looked for among what torch has made, and one more entry, of this file, at the top of a
traceback. What depends on one of these needs a fresh interpreter, and so does a test of how programs start.

The module is also the program that the interpreter runs: then it must not import pytest, nor anything of the tests.
"""

from __future__ import annotations

import array
import gc
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import IO, Any

#: A pid, and later a status as of ``waitpid``.
_NUMBER = struct.Struct("=q")


class Script:
    """A script that runs: what of ``subprocess.Popen`` the tests use, with pipes of text as its streams."""

    def __init__(self, status: socket.socket, stdin: IO[str] | None, stdout: IO[str], stderr: IO[str]) -> None:
        self._status = status
        self.stdin, self.stdout, self.stderr = stdin, stdout, stderr
        self.returncode: int | None = None
        self._readers: list[threading.Thread] = []
        self._texts: dict[IO[str], str] = {}
        self.pid: int = _NUMBER.unpack(status.recv(_NUMBER.size))[0]

    def __enter__(self) -> Script:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.kill()  # or the test would wait for it, and not say what has failed
        self.communicate(10)

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, negative for a signal. Raises ``subprocess.TimeoutExpired``."""
        if self.returncode is None:
            self._status.settimeout(timeout)
            try:
                data = self._status.recv(_NUMBER.size)
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired("script", timeout or 0) from None
            self._status.close()
            self.returncode = os.waitstatus_to_exitcode(_NUMBER.unpack(data)[0])
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Read both streams to their end, and wait. Can be called again after ``subprocess.TimeoutExpired``."""
        if self.stdin is not None:
            self.stdin.close()
        if not self._readers:
            self._readers = [
                threading.Thread(target=self._read, args=[stream]) for stream in (self.stdout, self.stderr)
            ]
            for reader in self._readers:
                reader.start()
        for reader in self._readers:
            reader.join(timeout)
        if any(reader.is_alive() for reader in self._readers):
            raise subprocess.TimeoutExpired("script", timeout or 0)
        self.wait(timeout)
        return self._texts[self.stdout], self._texts[self.stderr]

    def _read(self, stream: IO[str]) -> None:
        with stream:
            self._texts[stream] = stream.read()

    def complete(self, timeout: float) -> subprocess.CompletedProcess[str]:
        """What ``subprocess.run`` would do: a script that takes longer is killed."""
        try:
            out, err = self.communicate(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            self.communicate()
            raise
        assert self.returncode is not None
        return subprocess.CompletedProcess("script", self.returncode, out, err)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Interpreter:
    """A warm interpreter, which ends with this process. Each script is a grandchild of this process."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
            )

    def start(
        self, argv: list[str], cwd: str, env: dict[str, str], stdin: bool = False, start_new_session: bool = False
    ) -> Script:
        """Start the script ``argv[0]``, with a pipe as its stdin or none of its own."""
        pipes = [os.pipe() for _ in range(3 if stdin else 2)]
        (out, their_out), (err, their_err) = pipes[:2]
        their_in, in_ = pipes[2] if stdin else (0, -1)
        status, their_status = socket.socketpair()
        order = {"argv": argv, "cwd": cwd, "env": env, "session": start_new_session}
        fds = array.array("i", [their_in, their_out, their_err, their_status.fileno()])
        self._socket.sendmsg([json.dumps(order).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
        their_status.close()
        for fd in fds[0 if stdin else 1 : 3]:
            os.close(fd)
        return Script(status, open(in_, "w") if stdin else None, open(out), open(err))

    def close(self) -> None:
        self._socket.close()
        self._process.wait()


def _serve(orders: socket.socket) -> dict[str, Any]:
    """Fork a process for each order. Returns in those, with the order; ends when nobody can order any more."""
    running: dict[int, tuple[int, socket.socket]] = {}
    while True:
        for ready in select.select([orders.fileno(), *running], [], [])[0]:
            if ready != orders.fileno():
                pid, status = running.pop(ready)
                os.close(ready)
                status.send(_NUMBER.pack(os.waitpid(pid, 0)[1]))
                status.close()
                continue
            data, fds, _, _ = socket.recv_fds(orders, 1 << 20, 4)
            if not data:
                os._exit(0)
            pid = os.fork()
            if pid == 0:
                for each in (orders, *(status for _, status in running.values())):
                    each.detach()  # what goes by its number, below, is not to be closed again, nor to be warned of
                for number, fd in enumerate(fds[:3]):
                    os.dup2(fd, number)
                os.closerange(3, 1 << 20)
                order: dict[str, Any] = json.loads(data)
                return order
            status = socket.socket(fileno=fds[3])
            status.send(_NUMBER.pack(pid))
            running[os.pidfd_open(pid)] = pid, status
            for fd in fds[:3]:
                os.close(fd)


def _become(order: dict[str, Any]) -> CodeType:
    """Make this process what the order wants; returns the code of the script."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, under which the tests may run, has it ignored
    if order["session"]:
        os.setsid()
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    tempfile.tempdir = None
    path = order["argv"][0]
    sys.argv[:] = sys.orig_argv[1:] = order["argv"]
    sys.path.insert(0, os.path.dirname(path))
    code = compile(Path(path).read_bytes(), path, "exec", dont_inherit=True)
    # Nothing of this file's stays: what is in a script's __main__ is its own.
    main = sys.modules["__main__"].__dict__
    loader = SourceFileLoader("__main__", path)
    kept = {name: main[name] for name in ("__name__", "__package__", "__spec__", "__builtins__")}
    main.clear()
    main.update(kept, __doc__=None, __loader__=loader, __file__=path, __cached__=None)
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # that of the terminal is for the scripts
    del sys.path[0]  # the folder of this file; a script has its own
    import torch  # noqa: F401

    gc.collect()
    gc.freeze()  # so a script that collects garbage does not look through all of torch
    exec(_become(_serve(socket.socket(fileno=int(sys.argv[1])))))
