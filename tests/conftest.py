"""Fixtures for all tests; above all the one that fails a test which leaves anything behind.

The fork server, the reactor's thread and the namespace folder belong to the process, not to a test: they are started
once, before the first test, so that what a test adds can be told from them.
"""

from __future__ import annotations

import contextlib
import gc
import glob
import itertools
import multiprocessing.process
import multiprocessing.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import torch

import torchwq
from tests.interpreter import Interpreter
from torchwq.memory import pool, received_blocks, recycling, state_lock, tree_table
from torchwq.transport import debug, directory, namespace
from torchwq.workers import client

# A temp folder of this run's own: what other processes of the machine leave there is not ours to judge.
_TEMP = tempfile.mkdtemp(prefix="twq-")
# After multiprocessing has removed a folder of its own in there, which it does with priority -100.
multiprocessing.util.Finalize(None, shutil.rmtree, (_TEMP,), {"ignore_errors": True}, exitpriority=-200)
os.environ["TMPDIR"] = tempfile.tempdir = _TEMP
os.environ.pop("XDG_RUNTIME_DIR", None)
os.environ[debug.VARIABLE] = _DEBUG = f"{_TEMP}/debug"
os.environ.pop(namespace.VARIABLE, None)

# The background jobs of a shell ignore Ctrl-C, and so would every program that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Semaphores of this run, and of processes that multiprocessing starts for it, can be told from those of others.
_SEMAPHORES = f"/twq{os.getpid()}"
multiprocessing.process.current_process()._config["semprefix"] = _SEMAPHORES  # type: ignore[attr-defined]

#: Torch's files that were seen to be another program's.
_of_others: set[str] = set()
#: How long, in seconds, a test's leftovers may take to go away: processes end, garbage is closed by the reactor.
SETTLE = 5.0
#: How often they are looked for at least: the machine may stop for longer than that, for everybody but the clock.
LOOKS = 100


#: The files that take longest, the longest first. Where processes run tests side by side, whole files go to each, and
#: what begins first ends in time: none is left alone with a long one while the others are idle. Those with Ray come
#: last all the same: its workers leave the processor to whoever wants it, and would be late.
LONGEST = [
    "examples/test_examples.py",
    "examples/test_docs.py",
    "loading/test_faults.py",
    "loading/test_what_reaches_workers.py",
    "loading/test_equality.py",
    "examples/test_silence.py",
    "loading/test_state.py",
    "loading/test_stateful.py",
    "loading/test_life.py",
    "marshalling/test_definitions.py",
    "transport/test_exhaustion.py",
    "workers/test_server.py",
    "workers/test_multiprocessing_state.py",
    "mapping/test_map_ends.py",
    "mapping/test_unretrieved_errors.py",
    "mapping/test_map_clean_environment.py",
    "locking/test_mutex.py",
    "channels/test_chaos.py",
    "channels/test_channel_faults.py",
    "memory/test_recycling.py",
    "mapping/test_map.py",
]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="session", autouse=True)
def _services() -> None:
    torchwq.warm_up()
    with torchwq.workqueue("warm-up"):
        pass
    directory.get()
    tree_table.current()
    # torch's own heap need not be looked through each time that garbage is collected.
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def cuda_context() -> None:
    """What torch keeps open for good in a process that uses a GPU is there before a test counts descriptors."""
    torch.zeros(1, device="cuda").untyped_storage()._share_cuda_()
    torch.cuda.synchronize()


class Footprint:
    """What a process holds that a test could leave behind."""

    def __init__(self) -> None:
        server = client.connect().process
        assert server is not None
        me = psutil.Process()
        self.processes = {
            (child.pid, child.create_time()) for child in me.children(recursive=True) if child.pid != server.pid
        }
        self.threads = {
            thread for thread in threading.enumerate() if thread.name not in ("torchwq-reactor", "torchwq-debug")
        }
        self.descriptors = _descriptors()
        folder = namespace.current().path
        self.files = {path for path in glob.glob("/dev/shm/*") if not _is_anothers(path)}
        self.files |= set(glob.glob(f"{_TEMP}/torchwq*"))
        self.files |= set(glob.glob(f"{folder}/n-*"))

    def new_in(self, later: Footprint) -> dict[str, set[Any]]:
        added = {
            "processes": later.processes - self.processes,
            "threads": later.threads - self.threads,
            "descriptors": later.descriptors - self.descriptors,
            "files": later.files - self.files,
        }
        return {kind: items for kind, items in added.items() if items}


def _is_anothers(path: str) -> bool:
    """Whether a file of /dev/shm belongs to some other program: other Python programs run on the machine.

    What can be this run's has its mark, or is torch's. Torch's files are another's if the process that has made them
    has been seen alive, and was no child of this one.
    """
    name = os.path.basename(path)
    if name.startswith(f"sem{_SEMAPHORES.replace('/', '.')}"):
        return False
    parts = name.split("_")
    if parts[0] != "torch" or not parts[1:] or not parts[1].isdigit():
        return True
    if int(parts[1]) == os.getpid():
        return False
    if path not in _of_others:
        with contextlib.suppress(psutil.NoSuchProcess):
            if os.getpid() not in {each.pid for each in psutil.Process(int(parts[1])).parents()}:
                _of_others.add(path)
    return path in _of_others


def _descriptors() -> set[tuple[str, str]]:
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.add((fd, os.readlink(f"/proc/self/fd/{fd}")))
        except OSError:
            continue  # the one that listed the directory
    return found


def trim() -> None:
    """Memory that is kept for use again is no leak; memory that something uses is not given up by this."""
    pool.trim()
    received_blocks.trim()


def let_memory_go() -> None:
    """Give up at once, too, what a message is believed to have lost: between two tests, none is under way any more."""
    with state_lock.lock, mock.patch.object(recycling, "_IN_FLIGHT_TIMEOUT_AFTER_LOSS", 0.0):
        trim()


def wait_until(condition: Callable[[], Any], seconds: float = 10.0, what: str = "the condition") -> Any:
    """Wait for what no event tells of; returns what ``condition`` gave."""
    until = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < until, f"{what} did not come about within {seconds} s"
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def _leaves_nothing_behind(_services: None) -> Iterator[None]:
    let_memory_go()
    before = Footprint()
    yield
    until = time.monotonic() + SETTLE
    for look in itertools.count():
        let_memory_go()
        left = before.new_in(Footprint())
        if not left or (look >= LOOKS and time.monotonic() > until):
            break
        gc.collect()  # takes longer than most tests: only if there is a need
        time.sleep(0.02)
    assert not left, f"left behind: {left}"


#: How much of the file has been read.
_debug_read = 0


def report_of_debug_mode() -> str:
    """What the debug mode of the reactor has told, in this process and in those below, since this was asked last."""
    global _debug_read
    assert debug.ON
    try:
        with open(_DEBUG, "rb") as file:  # which stays: a process may have opened it, and not written yet
            file.seek(_debug_read)
            told = file.read()
    except FileNotFoundError:
        return ""
    _debug_read += len(told)
    return told.decode()


@pytest.fixture(autouse=True)
def _nothing_holds_the_reactor_up(_services: None) -> Iterator[None]:
    yield
    told = report_of_debug_mode()
    assert not told, told


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    """A warm interpreter: see there what its scripts are good for."""
    with contextlib.closing(Interpreter()) as warm:
        yield warm


@pytest.fixture
def run_script(interpreter: Interpreter, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python source as a script in a process of its own, in a namespace of its own.

    With ``fresh`` the process is a new interpreter, not one that the warm one has forked.
    """

    def run(
        source: str,
        *args: str,
        timeout: float = 60,
        check: bool = True,
        fresh: bool = False,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        script = tmp_path / "script.py"
        script.write_text(textwrap.dedent(source))
        argv = [str(script), *args]
        environment = {key: value for key, value in os.environ.items() if key != namespace.VARIABLE} | dict(env or {})
        if fresh:
            done = subprocess.run(
                [sys.executable, *argv], capture_output=True, text=True, timeout=timeout, env=environment, cwd=tmp_path
            )
        else:
            done = interpreter.start(argv, str(tmp_path), environment).complete(timeout)
        if check:
            assert done.returncode == 0, done.stderr
        return done

    return run


@pytest.fixture(autouse=True)
def _timers_are_not_users_threads() -> None:
    """Channels ask whether another thread of the user's may write to them; the one that watches a test does not."""
    for thread in threading.enumerate():
        if thread.name.startswith("pytest_timeout"):
            thread._daemonic = True  # type: ignore[attr-defined]


@pytest.fixture(params=["process", "thread"])
def backend(request: pytest.FixtureRequest) -> str:
    """What workers are."""
    return str(request.param)


@pytest.fixture(params=["here", "line"])
def make(request: pytest.FixtureRequest) -> Callable[[], torchwq.Channel]:
    """Makes a channel whose items stay in this process, or one whose items might go to others."""

    def make_channel() -> torchwq.Channel:
        made = torchwq.channel()
        if request.param == "line":
            made._core.open_to_processes()
        return made

    return make_channel
