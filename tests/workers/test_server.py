"""The fork server: shared by a tree, replaced when it dies, gone when its owner is."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import torchwq
from tests.conftest import wait_until
from tests.interpreter import Interpreter
from tests.workers import jobs
from torchwq.transport import namespace
from torchwq.workers import client, server


def server_pid() -> int:
    process = client.connect().process
    assert process is not None
    return process.pid


def lives(process: psutil.Process) -> bool:
    """An orphan that has ended may stay a zombie for a while: process 1 reaps it when it likes."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class _Failing:
    """A socket whose ``send`` fails in one way, and then does not."""

    def __init__(self, *errors: int) -> None:
        self._errors = list(errors)
        self.sent = b""

    def send(self, data: bytes, flags: int = 0) -> int:
        if self._errors:
            raise OSError(self._errors.pop(), "failed")
        self.sent += data
        return len(data)


def test_the_server_keeps_what_it_could_not_send_for_another_reason_than_that_its_client_is_gone() -> None:
    connection = _Failing(errno.ENOBUFS)
    served = server.Client(connection)  # type: ignore[arg-type]
    served.send(b"X", 1, 2)
    assert served.unsent == server.FRAME.pack(b"X", 1, 2)
    served.flush()
    assert connection.sent == server.FRAME.pack(b"X", 1, 2)
    gone = server.Client(_Failing(errno.EPIPE))  # type: ignore[arg-type]
    gone.send(b"X", 1, 2)
    assert not gone.unsent


def test_an_order_that_cannot_be_sent_is_no_sign_of_a_dead_server() -> None:
    connection = client.connect()
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        connection.request(None, [-1])  # type: ignore[arg-type]
    assert not isinstance(caught.value, BrokenPipeError)
    assert torchwq.map(1, os.getpid).join(20)[0] > 0
    assert client.connect() is connection


def test_workers_of_workers_come_from_the_same_server() -> None:
    with torchwq.workqueue() as queue:
        workers = torchwq.map(1, jobs.map_and_wait, queue)
        (pid, parent), (inner_pid, inner_parent) = queue.read(timeout=30), queue.read(timeout=30)
        assert pid != inner_pid
        assert parent == inner_parent == server_pid()
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not psutil.pid_exists(inner_pid), 2, "the end of a dead owner's worker")
        with pytest.raises(torchwq.WorkerDied):
            workers.join(20)


def test_workers_have_the_options_of_the_interpreter(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys, torchwq

            def options():
                return tuple(sys.flags), sys.warnoptions

            print(sys.flags.dev_mode, sys.flags.optimize, torchwq.map(1, options).join() == [options()])
            """
        )
    )
    command = [sys.executable, "-X", "dev", "-O", "-W", "error::UserWarning", str(script)]
    environment = {key: value for key, value in os.environ.items() if key != namespace.VARIABLE}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50)
    assert (done.stdout, done.stderr) == ("True 1 True\n", "")


def test_a_dead_server_takes_its_workers_along_and_is_replaced(run_script: Callable[..., object]) -> None:
    done = run_script(
        """
        import os, psutil, signal, time, torchwq
        from torchwq.workers import client

        def work(queue):
            import os
            queue.write(os.getpid())
            queue.read()

        torchwq.warm_up()
        q = torchwq.workqueue()
        m = torchwq.map(1, work, q)
        pid = q.read()
        os.kill(client.connect().process.pid, signal.SIGKILL)
        try:
            m.join(10)
        except torchwq.WorkerDied as error:
            print("died", error.mapid, "fork server" in str(error))
        end = time.monotonic() + 5
        while psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie":
            assert time.monotonic() < end, "the worker has outlived its server"
            time.sleep(0.01)
        m = torchwq.map(1, work, q)
        q.write("end")
        print(m.join(30))
        """
    )
    assert done.stdout.splitlines() == ["died 0 True", "[None]"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_nothing_outlives_an_owner_that_is_killed(
    interpreter: Interpreter, number: signal.Signals, tmp_path: Path
) -> None:
    script = tmp_path / "owner.py"
    script.write_text(
        "import os, torchwq\n"
        "from torchwq.transport import namespace\n"
        "def work(q):\n"
        "    import os\n"
        "    q.write(os.getpid())\n"
        "    while True: pass\n"
        "q = torchwq.workqueue('killed')\n"
        "torchwq.map(2, work, q)\n"
        "print(q.read(), q.read(), namespace.current().path, flush=True)\n"
        "q.read()\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != namespace.VARIABLE}
    with interpreter.start([str(script)], str(tmp_path), environment) as owner:
        *pids, folder = owner.stdout.readline().split()
        children = psutil.Process(owner.pid).children(recursive=True)
        assert {int(pid) for pid in pids} <= {child.pid for child in children}
        assert os.path.isdir(folder)
        owner.send_signal(number)
        owner.wait(10)
        wait_until(lambda: not any(map(lives, children)), 2, "the end of the workers")
        wait_until(lambda: not os.path.exists(folder), 2, "the removal of the namespace")


def test_warm_up_can_be_called_again_and_without_waiting() -> None:
    torchwq.warm_up()
    torchwq.warm_up(wait=False)
    assert torchwq.map(1, os.getpid).join(20)[0] != os.getpid()


def test_two_hundred_workers() -> None:
    with torchwq.workqueue() as queue:
        workers = torchwq.map(200, jobs.pid_and_wait, queue)
        pids = {queue.read(timeout=60)[0] for _ in range(200)}
        assert len(pids) == 200
        wait_until(lambda: set(workers.pids) == pids)
        queue.close()
        assert workers.join(60) == [None] * 200


def test_an_owner_killed_while_the_server_imports_leaves_nothing(interpreter: Interpreter, tmp_path: Path) -> None:
    script = tmp_path / "owner.py"
    script.write_text(
        "import torchwq\n"
        "from torchwq.transport import namespace\n"
        "torchwq.warm_up(wait=False)\n"
        "print(namespace.current().path, flush=True)\n"
        "torchwq.workqueue().read()\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != namespace.VARIABLE}
    with interpreter.start([str(script)], str(tmp_path), environment) as owner:
        folder = owner.stdout.readline().strip()
        children = psutil.Process(owner.pid).children(recursive=True)
        assert children
        owner.kill()
        owner.wait(10)
        wait_until(lambda: not any(map(lives, children)), 2, "the end of the server")
        wait_until(lambda: not os.path.exists(folder), 2, "the removal of the namespace")


def test_a_program_ends_while_a_thread_of_it_warms_up(run_script: Callable[..., object]) -> None:
    run_script(
        """
        import threading, torchwq
        from torchwq.workers import client

        begun = threading.Event()
        request_preload = client.ServerConnection.request_preload
        client.ServerConnection.request_preload = lambda self: (request_preload(self), begun.set())
        threading.Thread(target=torchwq.warm_up).start()
        begun.wait()
        """,
        timeout=40,
    )
