"""Backlogs that leave as one item, in the moments in which there is nothing in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import torchwq
from tests.channels import jobs
from tests.channels.parts import another
from torchwq.channels import bundle
from torchwq.channels.line import BACKLOG, BUNDLES, SENT, TAKEN, Line


@contextmanager
def two() -> Iterator[tuple[Line, Line]]:
    line = Line(b"")
    other = another(line)
    try:
        yield line, other
    finally:
        other.leave()
        line.leave()


def test_a_backlog_that_the_reactor_sends_at_the_last_moment_leaves_no_bundle(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with two() as (line, other):
        count = 0
        while not line._outbox.pending:
            assert line._send_or_keep(b"x" * 1000 + b"\0" * 9)
            count += 1
        taken: list[object] = []

        def reactor_sends() -> None:
            while line._outbox.pending:
                while (received := other.take()) is not None:
                    taken.append(received)
                line._outbox.flush()

        monkeypatch.setattr(line, "_announce_descriptors", reactor_sends)
        line.leave()
        while (received := other.take()) is not None:
            taken.append(received)
        assert len(taken) == count
        assert other.num_items() == 0
        assert not other._words[BUNDLES]
        assert not other.table.get_word(line.table.slot, BACKLOG)
    assert capfd.readouterr().err == ""


def test_an_empty_bundle_is_no_item() -> None:
    with two() as (line, other):
        with bundle.pack([]) as (message, fd):
            line._words[BUNDLES] += 1
            assert line._in.try_send(message, [fd])
        assert other.take() is None
        with bundle.pack([]) as (message, fd):
            line._words[BUNDLES] += 1
            assert line._in.try_send(message, [fd])
        assert line.send(b"1")
        assert other.take() == (b"1", [])
        assert other.num_items() == 0
        assert not other._words[BUNDLES]
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
