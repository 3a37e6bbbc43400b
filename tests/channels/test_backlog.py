"""Backlogs that leave as one message, also when nothing is left to be in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import torchwq
from tests.channels import jobs
from tests.channels.parts import another
from torchwq.channels.socket import SocketChannel
from torchwq.channels.table import BACKLOG, BACKLOG_MESSAGES, SENT, TAKEN
from torchwq.marshalling.wire import BacklogMessage


@contextmanager
def two() -> Iterator[tuple[SocketChannel, SocketChannel]]:
    socket = SocketChannel(b"")
    other = another(socket)
    try:
        yield socket, other
    finally:
        other.leave()
        socket.leave()


def test_a_backlog_that_the_reactor_sends_at_the_last_moment_leaves_no_bundle(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with two() as (socket, other):
        count = 0
        while not socket._outbox.pending:
            assert socket._send_or_keep(b"x" * 1000 + b"\0" * 9)
            count += 1
        taken: list[object] = []

        def reactor_sends() -> None:
            while socket._outbox.pending:
                while (received := other.take()) is not None:
                    taken.append(received)
                socket._outbox.flush()

        monkeypatch.setattr(socket._receiver, "announce_descriptors", reactor_sends)
        socket.leave()
        while (received := other.take()) is not None:
            taken.append(received)
        assert len(taken) == count
        assert other.num_items() == 0
        assert not other.table.words[BACKLOG_MESSAGES]
        assert not other.table.get_word(socket.table.slot, BACKLOG)
    assert capfd.readouterr().err == ""


def test_an_empty_bundle_is_no_item() -> None:
    with two() as (socket, other):
        with BacklogMessage.encode([]) as (message, fd):
            socket.table.words[BACKLOG_MESSAGES] += 1
            assert socket._outgoing.try_send(message, [fd])
        assert other.take() is None
        with BacklogMessage.encode([]) as (message, fd):
            socket.table.words[BACKLOG_MESSAGES] += 1
            assert socket._outgoing.try_send(message, [fd])
        assert socket.send(b"1")
        assert other.take() == (b"1", [])
        assert other.num_items() == 0
        assert not other.table.words[BACKLOG_MESSAGES]
        assert other.table.sum(SENT) == other.table.sum(TAKEN) == 1


@pytest.mark.parametrize("transport", ["seqpacket", "stream"])
def test_processes_and_threads_leave_with_backlogs_while_others_read(
    transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHWQ_TRANSPORT", transport)
    for _ in range(3):
        channel = torchwq.channel()
        writers = [
            torchwq.map(2, jobs.write_from_threads, channel, 2, 300),
            torchwq.map(1, jobs.write_from_threads, channel, 2, 300, backend="thread"),
        ]
        found = [channel.read(timeout=30)[1] for _ in range(3 * 2 * 300)]
        for each in writers:
            each.join()
        assert len(set(found)) == len(found)
        channel.close()
