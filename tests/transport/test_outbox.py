from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.conftest import wait_until
from torchwq.memory.message import Message
from torchwq.transport import kinds, reactor
from torchwq.transport.endpoint import Endpoint
from torchwq.transport.outbox import Outbox
from torchwq.transport.sockets import NotSent
from torchwq.transport.trailer import number_of


@pytest.fixture
def ends() -> Iterator[tuple[Endpoint, Endpoint]]:
    a, b = kinds.pair()
    yield a, b
    a.close()
    b.close()


def receive(end: Endpoint) -> bytes:
    received = wait_until(end.try_receive, what="a message")
    return bytes(received[0])


def test_messages_that_a_full_socket_does_not_take_are_sent_later_in_order(ends: tuple[Endpoint, Endpoint]) -> None:
    a, b = ends
    outbox = Outbox(a)
    for number in range(20_000):
        outbox.send(b"%d." % number)
    assert len(outbox) > 0
    assert [receive(b) for _ in range(20_000)] == [b"%d." % number for number in range(20_000)]
    outbox.wait_empty()
    assert len(outbox) == 0


def test_a_message_that_cannot_be_sent_raises_and_leaves_the_outbox_as_it_was(
    ends: tuple[Endpoint, Endpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = ends
    outbox = Outbox(a, numbered=True)
    bad = Message(b"bad.", [-1], [])
    with pytest.raises(NotSent):
        outbox.send(bad)
    reported: list[Any] = []
    monkeypatch.setattr(sys, "excepthook", lambda *error: reported.append(error[0]))
    count = 0
    while not outbox.pending:
        outbox.send(b"%d." % count)
        count += 1
    outbox.send(bad)  # waits with the others; its writer learns no more of it
    outbox.send(b"%d." % count)
    messages = [receive(b) for _ in range(count + 1)]
    assert [message.partition(b".")[0] for message in messages] == [b"%d" % number for number in range(count + 1)]
    numbers = [number_of(message) for message in messages]
    assert numbers == [*range(1, count + 1), count + 2]
    outbox.wait_empty()
    assert reported == [NotSent]


def test_many_threads_keep_their_own_order_and_numbers_match_the_order(ends: tuple[Endpoint, Endpoint]) -> None:
    a, b = ends
    outbox = Outbox(a, numbered=True)

    def send(name: int) -> None:
        for count in range(2_000):
            outbox.send(b"%d %d." % (name, count))

    threads = [threading.Thread(target=send, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    messages = [receive(b) for _ in range(8_000)]
    for thread in threads:
        thread.join()
    for name in range(4):
        counts = [int(m.split(b".")[0].split()[1]) for m in messages if m.startswith(b"%d " % name)]
        assert counts == list(range(2_000))
    numbers = [number_of(m) for m in messages]
    assert numbers == list(range(1, 8_001))


def test_on_sent_is_called_once_for_each_message_the_socket_took(ends: tuple[Endpoint, Endpoint]) -> None:
    a, b = ends
    taken: list[bytes] = []
    outbox = Outbox(a, on_sent=lambda tag, data: taken.append(data))
    for number in range(5_000):
        outbox.send(b"%d." % number)
    assert len(taken) < 5_000
    for _ in range(5_000):
        receive(b)
    outbox.wait_empty()
    assert taken == [b"%d." % number for number in range(5_000)]


def test_a_closed_peer_drops_pending_messages_and_refuses_more(ends: tuple[Endpoint, Endpoint]) -> None:
    a, b = ends
    outbox = Outbox(a)
    for _ in range(20_000):
        outbox.send(b"x.")
    b.close()
    outbox.wait_empty()
    with pytest.raises(BrokenPipeError):
        outbox.send(b"y.")


def test_close_when_sent_waits_for_the_last_message(ends: tuple[Endpoint, Endpoint]) -> None:
    a, b = ends
    closed = threading.Event()
    outbox = Outbox(a)
    for _ in range(20_000):
        outbox.send(b"x.")
    outbox.close_when_sent(closed.set)
    assert not closed.is_set()
    with pytest.raises(BrokenPipeError):
        outbox.send(b"late.")
    for _ in range(20_000):
        assert receive(b) == b"x."
    assert closed.wait(5)


def test_the_reactor_sends_pending_messages_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has other descriptors to serve, and calls again while there is room."""
    a, b = kinds.pair()
    outbox = Outbox(a)
    written = 1000
    while not outbox.pending:
        outbox.send(b"x" * 100 + b".")
        written += 1
    for number in range(1000):
        outbox.send(b"%d." % number)
    waiting = len(outbox)
    sent_in_a_call: list[int] = []
    flush = outbox._flush

    def counting() -> bool:
        before = len(outbox.pending)
        try:
            return flush()
        finally:
            sent_in_a_call.append(before - len(outbox.pending))

    monkeypatch.setattr(outbox, "_flush", counting)
    got = 0
    while got < written:
        got += b.try_receive() is not None
    outbox.wait_empty()
    assert sum(sent_in_a_call) == waiting
    assert max(sent_in_a_call) <= 256
    a.close()
    b.close()


@pytest.mark.parametrize("is_watched", [True, False])
def test_a_ctrl_c_as_the_first_message_becomes_pending_leaves_nothing_behind(
    ends: tuple[Endpoint, Endpoint], monkeypatch: pytest.MonkeyPatch, is_watched: bool
) -> None:
    a, b = ends
    outbox = Outbox(a, numbered=True)
    watcher = reactor.get()
    watch = watcher.set_writer

    def interrupt(fd: int, callback: Callable[[], None] | None) -> None:
        if is_watched:
            watch(fd, callback)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(watcher, "set_writer", interrupt)
        with pytest.raises(KeyboardInterrupt):
            while True:
                outbox.send(b"first.")
    outbox.send(b"last.")
    count = outbox.number
    numbers = [number_of(receive(b)) for _ in range(count)]
    assert numbers == list(range(1, count + 1))
    wait_until(lambda: a.fileno() not in watcher._watched)


def test_a_message_that_the_reactor_cannot_send_later_is_as_if_it_had_not_been_written(
    ends: tuple[Endpoint, Endpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = ends
    outbox = Outbox(a, numbered=True)

    def refuse(fd: int, callback: Callable[[], None] | None) -> None:
        if callback is not None:
            raise RuntimeError("can't start new thread")

    count = 0
    with monkeypatch.context() as patched:
        patched.setattr(reactor.get(), "set_writer", refuse)
        with pytest.raises(RuntimeError, match="new thread"):
            while True:
                outbox.send(b"sent.")
                count += 1
    assert (outbox.number, len(outbox)) == (count, 0)
    outbox.send(b"last.")
    assert [number_of(receive(b)) for _ in range(count + 1)] == list(range(1, count + 2))
