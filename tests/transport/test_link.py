from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.conftest import wait_until
from torchwq.transport import link
from torchwq.transport.link import Link


def descriptors_of(path: Path) -> int:
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            count += os.readlink(f"/proc/self/fd/{fd}") == str(path)
        except OSError:
            continue  # the one that listed the directory
    return count


@pytest.mark.parametrize("end", ["the peer goes", "it is closed", "the process forks"])
def test_descriptors_that_wait_in_a_link_are_closed_when_they_cannot_be_sent(tmp_path: Path, end: str) -> None:
    file = tmp_path / "file"
    file.touch()
    ours, their_fd = link.pair()
    theirs = Link(their_fd)
    while not ours.unsent:
        ours.send(b"x" * 1000)
    with file.open() as opened:
        for _ in range(20):
            ours.send(b"with a descriptor", [opened.fileno()])
    assert descriptors_of(file) == 20
    if end == "the peer goes":
        theirs.close()
        wait_until(lambda: not descriptors_of(file), what="the closing of what could not be sent")
    elif end == "it is closed":
        ours.close()
    else:
        pid = os.fork()
        if pid == 0:
            os._exit(descriptors_of(file))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert descriptors_of(file) == 20
    ours.close()
    theirs.close()
    assert not descriptors_of(file)


def test_a_descriptor_that_cannot_be_copied_leaves_no_others(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    ours, their_fd = link.pair()
    theirs = Link(their_fd)
    while not ours.unsent:
        ours.send(b"x" * 1000)
    with file.open() as opened:
        with pytest.raises(OSError, match="Bad file descriptor"):
            ours.send(b"", [opened.fileno(), opened.fileno(), 1_000_000])
        assert descriptors_of(file) == 1
    ours.close()
    theirs.close()
