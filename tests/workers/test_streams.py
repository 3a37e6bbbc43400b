"""If a program's standard streams are closed, neither queues nor workers' prints use their descriptors."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from torchwq.transport import descriptors, namespace

PROGRAM = """
    import os, sys
    first = open(os.devnull)  # takes the place of stdin, and the report that of stdout
    report = open(sys.argv[1], "w")
    assert report.fileno() == 1
    import torch, torchwq

    def work(queue):
        import os, sys
        os.write(1, b"printed by C code\\n")
        os.write(2, b"printed by C code\\n")
        print("printed")
        print("printed", file=sys.stderr)
        for question in queue:
            queue.write((question, 1))

    taken = {fd for fd in range(3) if os.path.exists(f"/proc/self/fd/{fd}")}
    with torchwq.workqueue("streams") as queue, torchwq.workqueue() as other:
        channel = torchwq.channel(2)
        mutex = torchwq.mutex()
        private = torch.ones(4)
        views = private[:2]  # moved by torch itself
        workers = torchwq.map(2, work, queue)
        for index in range(20):
            queue.write([index, torch.full((3,), index), bytes(100_000), views])
        for _ in range(20):
            (index, tensor, _, _), one = queue.read(timeout=40)
            assert one == 1 and tensor.tolist() == [index] * 3
        os.write(1, b"by the owner\\n")
        queue.write(None, None)
        workers.join(40)
        for fd in range(3):
            target = os.readlink(f"/proc/self/fd/{fd}")
            assert target == "/dev/null" or fd in taken, (fd, target)
    report.write("right " * 20)
    report.close()
"""


def test_what_workers_print_goes_nowhere_if_the_program_has_no_streams(tmp_path: Path) -> None:
    """Neither into a file that the program has opened with their descriptors, nor into a queue."""
    script, report = tmp_path / "program.py", tmp_path / "report"
    script.write_text(textwrap.dedent(PROGRAM))
    environment = {key: value for key, value in os.environ.items() if key != namespace.VARIABLE}
    command = f"exec {shlex.quote(sys.executable)} {script} {report} <&- >&- 2>&-"
    subprocess.run(["sh", "-c", command], env=environment, timeout=55)
    said = report.read_text()
    assert said.endswith("right " * 20), said
    assert "printed" not in said


def test_a_descriptor_in_the_place_of_a_standard_stream_is_moved(tmp_path: Path) -> None:
    """Also one that is received, or that is made when a stream was closed while queues are open."""
    program = """
        import os, select, socket, sys
        from torchwq.transport import descriptors, kinds
        from torchwq.transport.alarm import Alarm

        a, b = kinds.pair()
        os.close(1)
        assert descriptors.above_stdio(os.open("/", os.O_RDONLY)) > 2
        assert os.readlink("/proc/self/fd/1") == "/dev/null"
        os.close(1)
        assert min(Alarm().fileno(), descriptors.memory_file("x"), *descriptors.pipe(), descriptors.dup(0)) > 2
        os.close(1)
        a.try_send(b"x", [0])
        assert min(b.try_receive()[1]) > 2
        os.close(1)
        os.close(0)
        a.try_send(b"x", [2, 2, 2])
        assert min(b.try_receive()[1]) > 2
        os.close(1)
        assert min(end.fileno() for end in kinds.pair()) > 2
        os.close(1)
        assert descriptors.epoll().fileno() > 2
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=50)


def test_a_descriptor_that_cannot_be_moved_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(24, "too many")

    fds = [os.open(os.devnull, os.O_RDONLY) for _ in range(3)]
    monkeypatch.setattr(descriptors, "_FIRST_OWN", max(fds) + 1)
    monkeypatch.setattr(descriptors.fcntl, "fcntl", refuse)
    with pytest.raises(OSError, match="too many"):
        descriptors.all_above_stdio(fds)
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
