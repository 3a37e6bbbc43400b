"""Python embedded in another program: workers run the right interpreter, or the error says how to name it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import torchwq
from torchwq.workers import executable


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A program that is no Python, and notes that it was started."""
    program = tmp_path / "host"
    program.write_text(f"#!/bin/sh\necho started >> {tmp_path}/starts\nsleep 100\n")
    program.chmod(0o755)
    return program


@pytest.fixture(autouse=True)
def _looks_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executable, "_found", None)
    monkeypatch.setattr(executable, "_set_by_user", None)


def alone(monkeypatch: pytest.MonkeyPatch, path: object) -> None:
    """Leave no other sign of where the interpreter is."""
    monkeypatch.setattr(sys, "executable", path)
    monkeypatch.setattr(sys, "_base_executable", path)
    monkeypatch.setattr(executable.spawn, "get_executable", lambda: path)
    monkeypatch.setattr(sys, "exec_prefix", "/nowhere")
    monkeypatch.setattr(sys, "base_exec_prefix", "/nowhere")


def test_the_interpreter_is_found_where_sys_executable_is_not_it(monkeypatch: pytest.MonkeyPatch, host: Path) -> None:
    for path in (None, "", "/nowhere/python3", str(host), str(host.parent)):
        monkeypatch.setattr(sys, "executable", path)
        found = executable.find()
        assert os.path.samefile(found, "/proc/self/exe"), path
        assert executable.find() is found
    assert not (host.parent / "starts").exists()


def test_without_an_interpreter_the_error_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, host: Path, tmp_path: Path
) -> None:
    stranger = tmp_path / "python3"
    stranger.symlink_to("/bin/true")
    for path in (None, "", "/nowhere/python3", str(host), str(host.parent), str(stranger)):
        alone(monkeypatch, path)
        with pytest.raises(torchwq.WorkerStartError, match=r"torchwq\.set_executable") as caught:
            executable.find()
        assert not path or os.path.basename(path) in str(caught.value)
    assert not (host.parent / "starts").exists()


def test_what_the_user_sets_is_asked_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    alone(monkeypatch, None)
    for path in ("/nowhere/python3", tmp_path, b"/bin/true"):
        with pytest.raises(torchwq.WorkerStartError, match="cannot run workers"):
            torchwq.set_executable(path)
    with pytest.raises(torchwq.WorkerStartError):
        executable.find()
    any_name = tmp_path / "hosted"
    any_name.symlink_to(os.path.realpath("/proc/self/exe"))
    torchwq.set_executable(any_name)
    asked: list[object] = []
    monkeypatch.setattr(executable.subprocess, "run", asked.append)
    assert executable.find() == executable.find() == str(any_name)
    assert not asked
    torchwq.set_executable(None)
    with pytest.raises(torchwq.WorkerStartError):
        executable.find()


def test_whatever_needs_workers_says_that_there_is_no_interpreter(
    run_script: Callable[..., object], host: Path
) -> None:
    """Nothing hangs, threads work, and so do workers once the interpreter was named, or another one is."""
    run_script(
        f"""
        import multiprocessing.spawn, os, sys, torchwq
        from torchwq.workers import client

        right = os.path.realpath("/proc/self/exe")
        sys.executable = sys._base_executable = {str(host)!r}
        multiprocessing.spawn.set_executable(sys.executable)
        sys.exec_prefix = sys.base_exec_prefix = "/nowhere"

        def refused(call):
            try:
                call()
            except torchwq.WorkerStartError as error:
                assert "set_executable" in str(error), error
            else:
                raise AssertionError(call)

        refused(torchwq.warm_up)
        refused(lambda: torchwq.map(2, os.getpid))
        refused(lambda: torchwq.BackgroundTask(os.getpid))
        refused(lambda: next(iter(torchwq.DataLoader([1, 2], num_workers=1, multiprocessing_context="spawn"))))
        with torchwq.BackgroundTaskPool(1) as pool:
            error = pool.submit(os.getpid).exception(40)
            assert isinstance(error.__cause__, torchwq.WorkerStartError), repr(error)
        with torchwq.workqueue("threads") as queue:
            torchwq.map(1, os.getpid, backend="thread").join(40)

        torchwq.set_executable(right)
        assert torchwq.map(1, os.getpid).join(40) != [os.getpid()]
        first = client.connect()
        torchwq.set_executable(right)
        assert client.connect() is first
        os.symlink(right, "another")
        torchwq.set_executable("another")
        os.chdir("/")
        assert not first.fits()
        """,
        fresh=True,
    )
    assert not (host.parent / "starts").exists()
