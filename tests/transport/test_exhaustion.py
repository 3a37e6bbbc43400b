"""No descriptor is free: an error names the limit, nothing half made stays open, and no thread spins."""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import torchwq
from torchwq.errors import NamespaceError
from torchwq.transport import directory, namespace
from torchwq.transport.descriptors import close_fds
from torchwq.transport.link import Link, socket_type


class FullSocket:
    """A listening socket in a process that has no descriptor free for some time."""

    def __init__(self, inner: socket.socket, seconds: float) -> None:
        self.inner, self.until, self.calls = inner, time.monotonic() + seconds, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def accept(self) -> Any:
        self.calls += 1
        if time.monotonic() < self.until:
            raise OSError(errno.EMFILE, "Too many open files")
        return self.inner.accept()


def test_opening_a_name_waits_for_its_owner_to_have_a_descriptor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The owner warns once, and tries again now and then instead of at once."""
    with torchwq.workqueue("full"):
        here = directory.get()
        full = FullSocket(here._socket, 0.5)
        warned: list[object] = []
        monkeypatch.setattr(here, "_socket", full)
        monkeypatch.setattr(directory.warnings, "warn", lambda *args, **_: warned.append(args))
        asking = socket.socket(socket.AF_UNIX, socket_type())
        asking.connect(here.path)
        link = Link(asking.detach())
        link.send(struct.pack("=cQQ", b"O", os.getpid(), 0) + b"full")
        received = link.wait(30)
        link.close()
        assert received is not None
        close_fds(received[1])
        assert received[0][:1] == b"Q"
        assert full.calls < 20, "it has tried again at once"
        assert len(warned) == 1
        assert "RLIMIT_NOFILE" in str(warned)


def test_an_owner_that_lives_and_cannot_answer_keeps_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The link to it ends as one to a dead owner does."""
    with torchwq.workqueue("busy"):
        here = directory.get()
        with monkeypatch.context() as patched:
            patched.setattr(directory, "REPLY_TIMEOUT", 0.2)
            patched.setattr(here, "_answer", lambda link, data, fds: here._gone(link))
            patched.setattr(directory, "existing", lambda: None)  # as another process sees it
            with pytest.raises(NamespaceError, match="is there and has not answered"):
                directory.ask("busy")


def test_descriptors_run_out_while_things_are_opened(run_script: Callable[..., object]) -> None:
    done = run_script(
        """
        import gc, os, resource, time, torchwq

        def count():
            found = 0
            for fd in range(300):
                try:
                    os.fstat(fd)
                    found += 1
                except OSError:
                    pass
            return found

        def line():
            channel = torchwq.channel(1)
            channel._core.open_to_processes()
            return channel

        def watched():
            channel = torchwq.channel()
            channel.fileno()
            return channel

        names = iter(range(1000))
        makers = {
            "queue": torchwq.workqueue,
            "named": lambda: torchwq.workqueue(f"queue {next(names)}"),
            "channel": torchwq.channel,
            "line": line,
            "watched": watched,
            "mutex": torchwq.mutex,
            "task": lambda: torchwq.BackgroundTask(iter, [1, 2]),
        }
        for make in makers.values():
            make()
        torchwq.BackgroundTask(os.getpid).result(40)

        def settled(most):
            until = time.monotonic() + 10
            while count() > most and time.monotonic() < until:
                gc.collect()
                time.sleep(0.02)
            return count()

        last = -1
        while last != count():  # some descriptors are opened once, and stay
            last = count()
            gc.collect()
            time.sleep(0.3)
        base = count()
        resource.setrlimit(resource.RLIMIT_NOFILE, (base + 36, base + 36))
        for spare in range(6):  # the descriptors run out at another place of each
            kept = [os.open("/", os.O_RDONLY) for _ in range(spare)]
            for name, make in makers.items():
                made = []
                try:
                    while True:
                        made.append(make())
                except torchwq.ResourceError as error:
                    assert "RLIMIT_NOFILE" in str(error), (name, error)
                assert made, name
                del made
                assert settled(base + spare) <= base + spare, (name, spare, count(), base)
            for fd in kept:
                os.close(fd)
        torchwq.workqueue().write(1)
        """
    )
    assert done.stderr == ""  # type: ignore[attr-defined]


def test_a_relative_folder_for_temporary_files(run_script: Callable[..., object], tmp_path: Path) -> None:
    """Names are found, and removed, after the program has changed its directory."""
    run_script(
        """
        import os, tempfile, torchwq
        from torchwq.transport import namespace

        def work():
            import os, torchwq
            with torchwq.workqueue("elsewhere") as queue:
                queue.write(os.environ["TORCHWQ_NAMESPACE"])

        with torchwq.workqueue("elsewhere") as queue:
            os.chdir("/")
            workers = torchwq.map(1, work)
            assert os.path.isabs(queue.read(timeout=40))
            workers.join(40)
        """,
        env={"TMPDIR": ".", "XDG_RUNTIME_DIR": ""},
    )
    assert not list(tmp_path.glob(f"{namespace._PREFIX}*"))


def test_a_folder_that_cannot_be_finished_is_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(namespace, "_current", None)
    monkeypatch.delenv(namespace.VARIABLE)
    monkeypatch.setattr(namespace, "_folder", lambda: str(tmp_path))
    monkeypatch.setattr(namespace.descriptors.os, "open", refuse)
    with pytest.raises(torchwq.ResourceError, match="RLIMIT_NOFILE"):
        namespace.current()
    assert not os.listdir(tmp_path)
