"""In a sandbox, torchwq replaces a refused system call, or its error names it: no wrong value, and no hang."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import torchwq
from torchwq.memory import anonymous
from torchwq.transport import descriptors, namespace

#: Refuses system calls from now on, in this process and those that it starts (x86-64's numbers).
REFUSE = """
    import ctypes, struct
    NUMBERS = {"memfd_create": 319, "eventfd2": 290, "epoll_create1": 291, "pidfd_open": 434, "fallocate": 285}

    def refuse(error):
        load, equal, give = 0x20, 0x15, 0x06
        program = [(load, 0, 0, 0)]
        for index, number in enumerate(NUMBERS.values()):
            program.append((equal, len(NUMBERS) - index, 0, number))
        program += [(give, 0, 0, 0x7FFF0000), (give, 0, 0, 0x00050000 | error)]
        code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in program))

        class Filter(ctypes.Structure):
            _fields_ = [("length", ctypes.c_ushort), ("program", ctypes.c_void_p)]

        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.prctl(38, 1, 0, 0, 0) == 0
        found = Filter(len(program), ctypes.cast(code, ctypes.c_void_p))
        assert libc.prctl(22, 2, ctypes.byref(found)) == 0, ctypes.get_errno()
"""

PROGRAM = """
    import numpy as np, torch, torchwq

    def work(queue, channel, mutex):
        for question in queue:
            queue.write(question)
        with mutex:
            pass
        for item in channel:
            mutex.barrier(2, timeout=40)
            return item

    with torchwq.workqueue("sandbox") as queue, torchwq.channel(2) as channel:
        mutex = torchwq.mutex()
        workers = torchwq.map(1, work, queue, channel, mutex)
        sent = [1, np.arange(300_000), bytes(2_000_000), torch.arange(1000), torch.empty(0)]
        queue.write(*sent)
        got = [queue.read(timeout=40) for _ in sent]
        for before, after in zip(sent, got):
            if hasattr(before, "shape"):
                assert before.shape == after.shape and (before == after).all()
            else:
                assert before == after
        queue.write(None)
        channel.write(sent[1])
        mutex.barrier(2, timeout=40)
        assert (workers.join(40)[0] == sent[1]).all()
        assert sum(batch.sum() for batch in torchwq.DataLoader(list(range(10)), num_workers=1)) == 45
        try:
            assert queue.fileno() > 2
        except torchwq.ResourceError as error:
            assert "epoll_create1" in str(error), error
        print("right")
"""


@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="calls have other numbers here")
def test_without_the_calls_that_sandboxes_refuse(run_script: Callable[..., object]) -> None:
    source = textwrap.dedent(REFUSE) + "import errno\nrefuse(errno.EPERM)\n" + textwrap.dedent(PROGRAM)
    assert "right" in run_script(source, fresh=True).stdout  # type: ignore[attr-defined]


def test_without_proc(tmp_path: Path) -> None:
    hide = "mount -t tmpfs none /proc"
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "sh", "-c", hide]).returncode:
        pytest.skip("this user may not hide /proc")
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(PROGRAM))
    environment = {key: value for key, value in os.environ.items() if key != namespace.VARIABLE}
    command = f"{hide} && exec {sys.executable} {script}"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", command], env=environment, timeout=55, capture_output=True, text=True
    )
    assert "right" in done.stdout, done.stderr


def test_what_cannot_be_done_in_another_way_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = PermissionError(1, "Operation not permitted")

    def refuse(*_: object, **__: object) -> int:
        raise refused

    monkeypatch.setattr(descriptors.os, "memfd_create", refuse)
    monkeypatch.setattr(descriptors.tempfile, "mkstemp", refuse)
    with pytest.raises(anonymous.descriptors.ResourceError, match=r"memfd_create.*allow that call"):
        anonymous.create()
    monkeypatch.undo()
    fd = anonymous.create()
    monkeypatch.setattr(anonymous.os, "posix_fallocate", refuse)
    anonymous.reserve(fd, 3 << 20)
    assert os.fstat(fd).st_blocks * 512 >= 3 << 20
    monkeypatch.setattr(anonymous.os, "pwrite", refuse)
    with pytest.raises(anonymous.descriptors.ResourceError, match="fallocate"):
        anonymous.reserve(fd, 1)
    os.close(fd)


def test_a_loader_with_workers_refuses_green_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """gevent replaces the function that starts a thread."""

    def start_green_thread(*_: object) -> int:
        raise AssertionError("nothing is to be started")

    start_green_thread.__module__ = "gevent.thread"
    for name in ("_start_new_thread", "_start_joinable_thread"):
        if hasattr(threading, name):
            monkeypatch.setattr(threading, name, start_green_thread)
    for options in ({}, {"multiprocessing_context": "forkserver"}):
        with pytest.raises(RuntimeError, match=r"green.*gevent.*num_workers=0"):
            next(iter(torchwq.DataLoader([1, 2], num_workers=1, **options)))
    assert len(list(torchwq.DataLoader([1, 2]))) == 2
