"""What a test leaves behind is found; what other programs of the machine do meanwhile is not taken for that."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import _SEMAPHORES, Footprint

SHM = Path("/dev/shm")
pytestmark = pytest.mark.skipif(not SHM.is_dir(), reason="there is no /dev/shm")


@contextlib.contextmanager
def made(name: str) -> Iterator[None]:
    (SHM / name).touch()
    try:
        yield
    finally:
        (SHM / name).unlink()


def test_files_of_other_programs_are_not_leftovers() -> None:
    before = Footprint()
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True)
    grandparent = os.getppid()
    try:
        names = [f"sem.mp-{os.getpid()}x", f"psm_{os.getpid()}x", f"torch_{grandparent}_1_0", f"of_{os.getpid()}"]
        with contextlib.ExitStack() as stack:
            for name in names:
                stack.enter_context(made(name))
            assert not {Path(path).name for path in Footprint().files}.intersection(names)
        with made(f"torch_{other.pid}_1_0"):
            assert before.new_in(Footprint())["files"] == {f"/dev/shm/torch_{other.pid}_1_0"}
    finally:
        other.communicate(b"\n")


def test_a_semaphore_of_this_run_is_a_leftover() -> None:
    before = Footprint()
    name = f"sem.{_SEMAPHORES.removeprefix('/')}-0123abcd"
    with made(name):
        assert before.new_in(Footprint())["files"] == {f"/dev/shm/{name}"}
