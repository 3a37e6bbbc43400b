"""Both kinds of endpoint keep the invariants that ``transport.endpoint`` states."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import resource
import signal
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

from torchwq.errors import ResourceError
from torchwq.transport import fd_bundle, kinds, seqpacket, stream
from torchwq.transport.descriptors import close_fds
from torchwq.transport.endpoint import Endpoint
from torchwq.transport.sockets import NotSent, check_sendable, received_fds

KINDS = {"seqpacket": seqpacket.pair, "stream": stream.pair}


@pytest.fixture(params=KINDS)
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[Endpoint, Endpoint]]:
    a, b = KINDS[request.param]()
    yield a, b
    a.close()
    b.close()


def test_messages_arrive_whole_and_in_order(ends: tuple[Endpoint, Endpoint]) -> None:
    a, b = ends
    sent = [bytes([i]) * (i * 37 + 1) for i in range(100)]
    for data in sent:
        assert a.try_send(data)
    assert [b.try_receive() for _ in sent] == [(data, []) for data in sent]
    assert b.try_receive() is None


def test_a_message_that_cannot_be_sent_is_not_taken_for_a_peer_that_is_gone(ends: tuple[Endpoint, Endpoint]) -> None:
    a, b = ends
    closed = os.dup(0)
    os.close(closed)
    for fd in (-1, closed):
        with pytest.raises(NotSent) as caught:
            a.try_send(b"with a descriptor", [fd])
        assert caught.value.errno == errno.EBADF
        assert not isinstance(caught.value, BrokenPipeError)
    assert a.try_send(b"after it")
    assert b.try_receive() == (b"after it", [])
    a.close()
    with pytest.raises(BrokenPipeError):  # because this end is closed
        a.try_send(b"x")


def test_an_fd_bundle_that_cannot_be_packed_says_why() -> None:
    with pytest.raises(NotSent, match="Bad file descriptor"):
        fd_bundle.pack([-1])


def test_an_error_of_a_signal_handler_comes_out_as_it_is() -> None:
    def raise_it(*_: object) -> None:
        raise OSError(errno.EBADF, "of the handler")

    with pytest.raises(OSError, match="of the handler") as caught:
        try:
            raise_it()
        except OSError as error:
            check_sendable(error, is_closed=False)
    assert type(caught.value) is OSError


def test_largest_message_passes(ends: tuple[Endpoint, Endpoint]) -> None:
    a, b = ends
    data = os.urandom(a.max_message)
    assert a.try_send(data)
    received = b.try_receive()
    assert received is not None
    assert received[0] == data


def test_a_full_socket_says_so_and_recovers(ends: tuple[Endpoint, Endpoint]) -> None:
    a, b = ends
    count = 0
    while a.try_send(b"x" * 1000):
        count += 1
        assert count < 100_000
    assert count > 10
    for _ in range(count):
        assert b.try_receive() == (b"x" * 1000, [])
    assert b.try_receive() is None
    assert a.try_send(b"again")


def test_descriptors_ride_along(ends: tuple[Endpoint, Endpoint]) -> None:
    a, b = ends
    with tempfile.TemporaryFile() as one, tempfile.TemporaryFile() as two:
        one.write(b"one")
        two.write(b"two")
        one.flush()
        two.flush()
        assert a.try_send(b"none")
        assert a.try_send(b"both", [one.fileno(), two.fileno()])
        assert a.try_send(b"none")
    assert b.try_receive() == (b"none", [])
    received = b.try_receive()
    assert received is not None
    data, fds = received
    assert data == b"both"
    assert [os.pread(fd, 9, 0) for fd in fds] == [b"one", b"two"]
    assert not any(os.get_inheritable(fd) for fd in fds)
    for fd in fds:
        os.close(fd)
    assert b.try_receive() == (b"none", [])


def test_peek_shows_the_next_message_and_leaves_it(ends: tuple[Endpoint, Endpoint]) -> None:
    a, b = ends
    assert b.peek() is None
    with tempfile.TemporaryFile() as file:
        assert a.try_send(b"with a descriptor", [file.fileno()])
    assert b.peek() == b.peek() == b"with a descriptor"
    received = b.try_receive()
    assert received is not None
    data, fds = received
    assert data == b"with a descriptor"
    os.close(*fds)
    a.close()
    assert b.peek() == b""


def test_messages_sent_before_closing_are_still_received(ends: tuple[Endpoint, Endpoint]) -> None:
    a, b = ends
    b.try_send(b"unread by the one that closes")
    a.try_send(b"last")
    a.close()
    assert b.try_receive() == (b"last", [])
    with pytest.raises(EOFError):
        b.try_receive()
    with pytest.raises(BrokenPipeError):
        b.try_send(b"nobody there")


def test_stop_receiving_refuses_the_other_side_and_still_sends(ends: tuple[Endpoint, Endpoint]) -> None:
    a, b = ends
    a.stop_receiving()
    with pytest.raises(BrokenPipeError):
        b.try_send(b"x")
    assert a.try_send(b"y")
    assert b.try_receive() == (b"y", [])


def test_unread_by_peer_says_when_all_is_taken(ends: tuple[Endpoint, Endpoint]) -> None:
    a, b = ends
    assert a.unread_by_peer() == 0
    a.try_send(b"x")
    assert a.unread_by_peer()
    b.try_receive()
    assert a.unread_by_peer() == 0


def test_a_closed_end_is_at_its_end(ends: tuple[Endpoint, Endpoint]) -> None:
    a, _ = ends
    a.close()
    a.close()
    with pytest.raises(EOFError):
        a.try_receive()
    with pytest.raises(BrokenPipeError):
        a.try_send(b"x")


def test_an_adopted_end_is_the_same_end(ends: tuple[Endpoint, Endpoint]) -> None:
    a, b = ends
    twin = kinds.adopt([os.dup(fd) for fd in b.handover()])
    try:
        a.try_send(b"1")
        a.try_send(b"2")
        assert twin.try_receive() == (b"1", [])
        assert b.try_receive() == (b"2", [])
    finally:
        twin.close()


def test_too_many_descriptors_are_a_clear_error_and_leak_nothing(ends: tuple[Endpoint, Endpoint]) -> None:
    a, b = ends
    with tempfile.TemporaryFile() as file:
        a.try_send(b"many", [file.fileno()] * 40)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = len(os.listdir("/proc/self/fd"))
    used = {int(fd) for fd in os.listdir("/proc/self/fd")}
    free = [fd for fd in range(before + 20) if fd not in used]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[10], limits[1]))
    try:
        with pytest.raises(ResourceError, match="RLIMIT_NOFILE"):
            b.try_receive()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(os.listdir("/proc/self/fd")) == before
    assert a.try_send(b"next")
    assert b.try_receive() == (b"next", [])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("victim_reads", [True, False])
def test_killed_processes_leave_nothing_to_repair(kind: str, victim_reads: bool) -> None:
    """Readers or writers of one shared end are killed at random: every message left is whole, others work on."""
    a, b = KINDS[kind]()
    mine, theirs = a, b
    body = b"0123456789" * 300
    for _ in range(15):
        copies = [os.dup(fd) for fd in theirs.handover()]  # a fork closes the endpoints themselves in the child
        ready, announce = os.pipe()
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                end = kinds.adopt(copies)
                os.write(announce, b"!")
                while True:
                    if victim_reads:
                        end.try_receive()
                    else:
                        end.try_send(body)
            os._exit(0)
        for fd in copies:
            os.close(fd)
        assert os.read(ready, 1) == b"!"
        os.close(ready)
        os.close(announce)
        for _ in range(300):
            if victim_reads:
                mine.try_send(body)
            else:
                received = mine.try_receive()
                assert received is None or received == (body, [])
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    while (received := (theirs if victim_reads else mine).try_receive()) is not None:
        assert received == (body, [])
    assert theirs.try_send(b"alive")
    assert mine.try_receive() == (b"alive", [])
    a.close()
    b.close()


def test_the_environment_chooses_the_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHWQ_TRANSPORT", "stream")
    assert kinds.kind() == "stream"
    assert kinds.handover_size() == 2
    monkeypatch.setenv("TORCHWQ_TRANSPORT", "pigeon")
    with pytest.raises(ValueError, match="pigeon"):
        kinds.kind()


def test_an_fd_bundle_that_does_not_fit_leaves_no_descriptor_open(monkeypatch: pytest.MonkeyPatch) -> None:
    with open(os.devnull) as file:
        carrier = fd_bundle.pack([file.fileno()] * 400)
    taken: list[list[int]] = []

    def fail_at_the_second(ancillary: Any, flags: int) -> list[int]:
        if taken:
            close_fds(received_fds(ancillary, flags))
            raise ResourceError(0, "too many")
        taken.append(received_fds(ancillary, flags))
        return taken[0]

    monkeypatch.setattr(fd_bundle, "received_fds", fail_at_the_second)
    with pytest.raises(ResourceError, match="too many"):
        fd_bundle.unpack(carrier.detach())
    assert taken
    for fd in taken[0]:
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(fd)


def test_a_send_with_timeout_does_not_begin_anew_with_each_signal(ends: tuple[Endpoint, Endpoint]) -> None:
    a, _ = ends
    while a.try_send(b"x" * 1000):
        pass
    signals = itertools.count(1)

    def handler(*_: object) -> None:
        assert next(signals) < 200, "it waits for as long as signals come"

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
    try:
        assert not a.send_with_timeout(b"x" * 1000)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
