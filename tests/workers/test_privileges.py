"""Workers have their owner's present privileges, not those that it had when the fork server started."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

import torchwq
from torchwq.workers import client, privileges


def test_workers_have_the_limits_cores_umask_and_niceness_of_the_order(run_script: Callable[..., object]) -> None:
    """Their own workers as well, and no second server is needed for it."""
    run_script(
        """
        import os, resource, torchwq
        from torchwq.workers import client

        def look():
            import os, resource
            mask = os.umask(0)
            os.umask(mask)
            return mask, os.sched_getaffinity(0), os.nice(0), resource.getrlimit(resource.RLIMIT_NOFILE)

        def look_below():
            import torchwq
            return look(), torchwq.map(1, look).join(30)[0]

        torchwq.warm_up()
        server = client.connect().process.pid
        os.umask(0o027)
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        os.nice(1)
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, 300))
        here = look()
        (found,) = torchwq.map(1, look_below).join(30)
        assert found == (here, here), (found, here)
        assert client.connect().process.pid == server
        """
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give something up")
def test_privileges_that_were_given_up_are_given_up_for_new_workers(run_script: Callable[..., object]) -> None:
    """And the workers that there are go on, with their server, which leaves nothing behind when they end."""
    done = run_script(
        """
        import ctypes, os, psutil, time, torchwq
        from torchwq.transport import namespace
        from torchwq.workers import client

        def who(question=None):
            import os
            return os.getuid(), os.getgid(), os.getegid(), os.getgroups()

        def serve(queue):
            for question in queue:
                queue.write((question, who()))

        def below():  # a worker whose own workers must not have the privileges that it has dropped
            import os
            from torchwq.workers import client
            shares_the_server = client._connection.fits()
            os.setegid(65534)
            return shares_the_server, client._connection.fits()

        before = who()
        queue = torchwq.workqueue()
        old = torchwq.map(1, serve, queue)
        queue.write(1)
        assert queue.read(timeout=40) == (1, before)
        first = client.connect()
        folder = namespace.current().path

        assert torchwq.map(1, below).join(40) == [(True, False)]
        os.setegid(65534)
        assert torchwq.map(1, who).join(40)[0] == who() != before
        second = client.connect()
        assert second is not first
        queue.write(2)
        assert queue.read(timeout=40) == (2, before)  # it was there before
        queue.write(None)
        old.join(40)
        first.process.wait(40)  # its last worker has ended
        assert os.path.isdir(folder) and client.connect() is second

        os.setegid(0)
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        try:
            print("workers are", torchwq.map(1, who).join(40)[0][:2])
        except torchwq.WorkerStartError as error:  # another user may not execute this interpreter
            print("workers are", who()[:2], error)
        """,
        fresh=True,
    )
    assert done.stdout.startswith("workers are (65534, 65534)"), done.stdout  # type: ignore[attr-defined]


def test_every_part_of_the_standing_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    connection = client.connect()
    assert connection.fits()
    changed = [
        ("getresuid", lambda: (1, 1, 1)),
        ("getresgid", lambda: (1, 1, 1)),
        ("getgroups", lambda: [4711]),
        ("readlink", lambda path: f"{path} of another container"),
        ("stat", lambda path: os.lstat("/proc")),
    ]
    for name, replacement in changed:
        with monkeypatch.context() as patched:
            patched.setattr(privileges.os, name, replacement)
            assert not connection.fits(), name
    read = privileges._read
    for file in ("status", "cgroup"):
        with monkeypatch.context() as patched:
            patched.setattr(privileges, "_read", lambda name, file=file: read(name).replace("0", "1") * (name != file))
            assert not connection.fits(), file
    with monkeypatch.context() as patched:
        unlimited = privileges.resource.RLIM_INFINITY
        patched.setattr(privileges, "hard_limits", lambda: [unlimited] * len(privileges._LIMITS))
        assert connection.fits() == all(limit == unlimited for limit in connection._hard_limits)
    assert connection.fits()
    assert torchwq.map(1, os.getuid).join(40) == [os.getuid()]
