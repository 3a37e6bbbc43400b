"""Runs a program that uses torchwq, and finds the processes and files that it leaves behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import psutil

from tests.interpreter import Interpreter, Script
from torchwq.transport import namespace


class Program:
    """A Python program in a session and a temporary folder of its own.

    Its folder is outside of pytest's, whose paths are too long for a socket's address. ``interpreter``: the warm one
    starts it, as a script; without, it is a new interpreter.
    """

    def __init__(
        self, source: str, *args: str, how: str = "script", interpreter: Interpreter | None = None, **environment: str
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="wq-"))
        self.temporary = self.folder / "tmp"
        self.temporary.mkdir()
        source = textwrap.dedent(source)
        command = {
            "script": [str(self.folder / "script.py"), *args],
            "-c": ["-c", source, *args],
            "-": ["-", *args],
        }[how]
        (self.folder / "script.py").write_text(source)
        env = {key: value for key, value in os.environ.items() if key != namespace.VARIABLE}
        env |= {"TMPDIR": str(self.temporary), "XDG_RUNTIME_DIR": str(self.temporary), **environment}
        self.process: subprocess.Popen[str] | Script
        if interpreter is not None:
            self.process = interpreter.start(command, str(self.folder), env, stdin=True, start_new_session=True)
        else:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=env,
                cwd=self.folder,
                start_new_session=True,
            )
        if how == "-":
            assert self.process.stdin is not None
            self.process.stdin.write(source)
            self.process.stdin.close()
            self.process.stdin = None  # and communicate() does not expect it to be open
        self._seen: set[psutil.Process] = set()

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: Any) -> None:
        self.descendants()
        for each in (*self._seen, self.process):
            try:
                each.kill()
            except (psutil.Error, OSError):
                pass
        self.process.communicate()
        shutil.rmtree(self.folder, ignore_errors=True)

    def expect(self, line: str) -> None:
        """Wait until the program prints ``line``, note which processes it has by then, and send it a line.

        A program that ends soon must wait for that line, with ``input()``, for something to be there to be noted.
        """
        assert self.process.stdout is not None
        found = self.process.stdout.readline().rstrip("\n")
        if found != line:
            self.process.kill()
            raise AssertionError(f"{found!r} instead of {line!r}:\n{self.process.communicate()[1]}")
        assert self.descendants(), "the program has no fork server, no workers: nothing could be left behind"
        assert list(self.temporary.glob("torchwq-*")), "the program has no namespace folder"
        if self.process.stdin is not None:
            self.process.stdin.write("\n")
            self.process.stdin.flush()

    def descendants(self) -> set[psutil.Process]:
        """Every process below the program, those seen earlier included."""
        try:
            self._seen |= set(psutil.Process(self.process.pid).children(recursive=True))
        except psutil.NoSuchProcess:
            pass
        return self._seen

    def interrupt(self) -> None:
        """Ctrl-C: the terminal sends SIGINT to all of the program's process group."""
        self.descendants()
        os.killpg(self.process.pid, signal.SIGINT)

    def send(self, number: signal.Signals) -> None:
        self.descendants()
        self.process.send_signal(number)

    def end(self, timeout: float = 45) -> tuple[int, str, str]:
        """Wait until the program has ended: its status, stdout and stderr."""
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err

    def assert_nothing_is_left(self, seconds: float = 2.0) -> None:
        """Within ``seconds``, all processes and files of the program are gone."""
        until = time.monotonic() + seconds
        while True:
            processes = [each for each in self._seen if _runs(each)]
            files = sorted(self.temporary.iterdir())
            if not processes and not files:
                return
            assert time.monotonic() < until, f"left behind: {processes} {files}"
            time.sleep(0.01)


def _runs(process: psutil.Process) -> bool:
    try:
        # An orphan that has ended may stay a zombie where process 1 reaps nobody
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
