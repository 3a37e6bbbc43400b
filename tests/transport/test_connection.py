"""A connection: nothing half made stays, waiting threads learn of its end, messages are sent or given back."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator, Sequence

import pytest

from tests.conftest import wait_until
from torchwq.errors import ResourceError
from torchwq.transport import descriptors, kinds, waiting
from torchwq.transport.connection import Connection


class Watched:
    """A payload that notes its calls."""

    kind = 0
    data = b"watched."
    fds: Sequence[int] = ()

    def __init__(self) -> None:
        self.notes: list[str] = []

    def on_send(self) -> None:
        self.notes.append("on_send")

    def on_send_failed(self) -> None:
        self.notes.append("on_send_failed")


@pytest.fixture
def both() -> Iterator[tuple[Connection, Connection]]:
    a, b = kinds.pair()
    ours, theirs = Connection(a), Connection(b)
    yield ours, theirs
    ours.close()
    theirs.close()


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def fill(connection: Connection) -> int:
    count = 0
    while not connection.outbox.pending:
        connection.send(b"x" * 1000 + b".")
        count += 1
    return count


def test_a_connection_that_cannot_be_made_closes_its_endpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_descriptors()

    def refuse() -> int | None:
        raise descriptors.resource_error(OSError(errno.EMFILE, "Too many open files"))

    monkeypatch.setattr(descriptors, "eventfd", refuse)
    for to in (False, True):
        a, b = kinds.pair()
        with pytest.raises(ResourceError, match="RLIMIT_NOFILE"):
            Connection(a, outgoing=b if to else None)
        if not to:
            b.close()
        assert open_descriptors() == before


def test_no_descriptor_is_opened_before_a_thread_sleeps(both: tuple[Connection, Connection]) -> None:
    before = open_descriptors()
    ours, theirs = both
    ours.send(b"1.")
    assert theirs.take() == (b"1.", [])
    assert open_descriptors() == before
    assert theirs.wait(theirs.take, time.monotonic() + 0.01) is None
    assert open_descriptors() <= before + 1


def test_a_thread_sleeps_although_no_descriptor_is_free(
    both: tuple[Connection, Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise descriptors.resource_error(OSError(errno.EMFILE, "Too many open files"))

    monkeypatch.setattr(waiting.descriptors, "epoll", refuse)
    ours, theirs = both
    for wake, expected in ((lambda: ours.send(b"1."), (b"1.", [])), (theirs.alarm.set, None)):
        timer = threading.Timer(0.05, wake)
        timer.start()
        assert theirs.wait(theirs.take, time.monotonic() + 30) == expected
        timer.join()


def test_threads_that_spin_at_the_same_time_do_not_hinder_each_other(both: tuple[Connection, Connection]) -> None:
    """A ``poll`` object raises if two threads use it."""
    ours, theirs = both
    received: list[object] = []

    def read() -> None:
        for _ in range(500):
            assert theirs._waiter is not None
            theirs._waiter._spin = 100_000
            received.append(theirs.wait(theirs.take, time.monotonic() + 30))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(2_000):
        ours.send(b"%d." % number)
        if not number % 50:
            time.sleep(0)
    for thread in threads:
        thread.join()
    assert sorted(received) == sorted((b"%d." % number, []) for number in range(2_000))  # type: ignore[type-var]


@pytest.mark.parametrize("end", ["stop_waiting", "close"])
def test_a_thread_that_waits_learns_of_the_end(both: tuple[Connection, Connection], end: str) -> None:
    _, theirs = both
    results: list[object] = []

    def read() -> None:
        try:
            results.append(theirs.wait(theirs.take, None))
        except EOFError:
            results.append(None)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_until(lambda: theirs._waiter is not None and len(theirs._waiter._waits) == 3, what="three sleepers")
    getattr(theirs, end)()
    for thread in threads:
        thread.join(5)
    assert results == [None, None, None]


def test_a_message_that_has_arrived_can_be_taken_after_stop_waiting(both: tuple[Connection, Connection]) -> None:
    ours, theirs = both
    ours.send(b"1.")
    theirs.stop_waiting()
    assert theirs.wait(theirs.take, None) == (b"1.", [])
    assert theirs.wait(theirs.take, None) is None
    theirs.send(b"2.")
    assert ours.take() == (b"2.", [])


def test_messages_that_wait_are_given_back_when_the_connection_is_closed(both: tuple[Connection, Connection]) -> None:
    ours, _ = both
    fill(ours)
    payload = Watched()
    ours.send(payload)
    ours.close()
    assert payload.notes == ["on_send", "on_send_failed"]
    with pytest.raises(BrokenPipeError):
        ours.send(b"late.")
    ours.close()


def test_a_thread_that_waits_until_all_is_sent_learns_of_the_close(both: tuple[Connection, Connection]) -> None:
    ours, _ = both
    fill(ours)
    thread = threading.Thread(target=ours.outbox.wait_empty)
    thread.start()
    wait_until(lambda: ours.outbox._latches, what="the waiting")
    ours.close()
    thread.join(5)
    assert not thread.is_alive()


def test_a_connection_that_closes_when_sent_is_read_until_then(both: tuple[Connection, Connection]) -> None:
    ours, theirs = both
    count = fill(ours)
    theirs.send(b"answer.")
    ours.close_when_sent()
    with pytest.raises(BrokenPipeError):
        ours.send(b"late.")
    assert ours.take() == (b"answer.", [])
    for _ in range(count):
        assert wait_until(theirs.take, what="a message")[0][:1] == b"x"
    wait_until(lambda: ours.fileno() < 0, what="the closing")
    with pytest.raises(EOFError):
        theirs.take()


def test_a_closed_connection_is_not_watched(both: tuple[Connection, Connection]) -> None:
    ours, theirs = both
    called = threading.Event()
    theirs.watch(called.set)
    ours.send(b"1.")
    assert called.wait(5)
    theirs.close()
    theirs.watch(called.set)
    theirs.watch(None)
    assert theirs.fileno() < 0


def test_one_end_may_be_written_to_and_the_other_one_read(both: tuple[Connection, Connection]) -> None:
    """As each side of a channel does."""
    before = open_descriptors()
    a, b = kinds.pair()
    line = Connection(b, outgoing=a)
    line.send(b"1.")
    assert line.take() == (b"1.", [])
    assert len(line.handover()) == 2 * kinds.handover_size()
    line.close()
    assert open_descriptors() == before


def test_the_child_of_a_fork_closes_its_copies(both: tuple[Connection, Connection]) -> None:
    ours, theirs = both
    fill(ours)
    pid = os.fork()
    if pid == 0:
        kept = ours.fileno() >= 0 or theirs.alarm.fileno() >= 0 or len(ours.outbox)
        os._exit(bool(kept))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert theirs.take() is not None
