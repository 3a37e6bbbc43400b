from __future__ import annotations

import os
import socket
import stat
import threading

import pytest

import torchwq
from torchwq.errors import NamespaceError
from torchwq.transport import directory, namespace
from torchwq.transport.link import socket_type


def test_the_folder_is_private_and_children_find_it() -> None:
    path = namespace.current().path
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o700
    assert os.environ[namespace.VARIABLE] == path


def test_a_folder_open_to_others_is_not_used(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = f"{tmp_path}/shared"
    os.mkdir(shared, 0o755)
    assert not namespace._usable(shared)
    os.chmod(shared, 0o700)
    assert namespace._usable(shared)
    os.symlink(shared, f"{tmp_path}/link")
    assert not namespace._usable(f"{tmp_path}/link")


def test_a_peer_of_another_user_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with torchwq.workqueue("private") as queue:
        path = namespace.current().lookup("private")
        assert path is not None
        monkeypatch.setattr(directory, "peer_uid", lambda sock: os.geteuid() + 1)
        with socket.socket(socket.AF_UNIX, socket_type()) as stranger:
            stranger.connect(path)
            stranger.settimeout(5)
            assert stranger.recv(100) == b""
        assert queue.statistics().handles == 0


def test_garbage_on_the_socket_harms_nobody() -> None:
    with torchwq.workqueue("sturdy"):
        path = namespace.current().lookup("sturdy")
        assert path is not None
        for garbage in (b"?", b"O", b"\xff" * 500):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
                try:
                    stranger.connect(path)
                except OSError:
                    pytest.skip("the stream transport frames its requests")
                stranger.send(garbage)
                stranger.settimeout(5)
                assert stranger.recv(100) in (b"", b"N")
        found: list[bool] = []
        thread = threading.Thread(target=lambda: found.append(torchwq.workqueue("sturdy").creator))
        thread.start()
        thread.join()
        assert found == [False]


def test_the_lock_of_a_stopped_process_is_an_error_and_not_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    space = namespace.current()
    monkeypatch.setattr(namespace, "LOCK_TIMEOUT", 0.1)
    with space.locked(), pytest.raises(NamespaceError, match="stopped"), space.locked():
        pass
    with space.locked():
        pass


def test_folders_of_killed_makers_are_swept(tmp_path: object) -> None:
    dead, alive, young = (f"{tmp_path}/torchwq-{name}" for name in ("dead", "alive", "young"))
    for path in (dead, alive, young):
        os.mkdir(path, 0o700)
    living = namespace.Namespace(alive, made=True)
    namespace.Namespace(dead, made=True).abandon()
    namespace.Namespace(young, made=True).abandon()
    for path in (dead, alive):
        os.utime(path, (0, 0))
    namespace._sweep(str(tmp_path))
    assert sorted(os.listdir(str(tmp_path))) == ["torchwq-alive", "torchwq-young"]
    living.remove()
    assert os.listdir(str(tmp_path)) == ["torchwq-young"]
