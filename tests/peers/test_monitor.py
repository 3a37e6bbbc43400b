"""A monitor reports at once that a peer comes, leaves, dies or changes a word."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import pytest

from tests.marshalling.support import descriptors as open_descriptors
from tests.peers.test_table import Child, another, new_table
from torchwq.errors import ResourceError
from torchwq.peers import table as tables
from torchwq.peers.monitor import PeerMonitor
from torchwq.peers.table import FIRST_SLOT_WORD, PeerTable
from torchwq.transport import descriptors, reactor

WORD = FIRST_SLOT_WORD


class Changes:
    """What a monitor has reported."""

    def __init__(self, table: PeerTable) -> None:
        self._changed = threading.Event()
        self.monitor = PeerMonitor(table, self._changed.set)

    def after(self, action: object) -> bool:
        """Whether the monitor reports a change after ``action``."""
        self._changed.wait(0.2)  # for earlier changes, whose event may still come
        self._changed.clear()
        action()  # type: ignore[operator]
        return self._changed.wait(10)


@contextlib.contextmanager
def watched() -> Iterator[tuple[PeerTable, Changes]]:
    with new_table() as table:
        changes = Changes(table)
        with changes.monitor.watching():
            yield table, changes
        changes.monitor.close()


def test_it_reports_a_peer_that_comes_leaves_or_changes_a_word() -> None:
    with watched() as (table, changes):
        came: list[PeerTable] = []
        assert changes.after(lambda: came.append(another(table)))
        came[0].set_word(WORD, 3)
        assert changes.after(came[0].notify_all)
        assert changes.after(came[0].leave)
        assert changes.after(lambda: came.append(another(table)))
        assert changes.after(lambda: came[1].leave(failed=True))


@pytest.mark.parametrize("how", [signal.SIGKILL, b"x"], ids=["killed", "exits without leaving"])
def test_it_reports_the_death_of_peers_from_before_and_after_it_was_opened(how: bytes | signal.Signals) -> None:
    with new_table() as table:
        before = Child(table)
        changes = Changes(table)
        with changes.monitor.watching():
            later = Child(table)
            for child in (later, before):
                assert changes.after(lambda child=child: child.end(how))
                assert (child.slot, False) in list(table.other_slots())
            assert changes.monitor.covers_all_peers
        changes.monitor.close()


def test_while_nobody_waits_it_has_no_descriptor_open() -> None:
    with new_table() as table:
        child = Child(table)
        before = open_descriptors()
        changes = Changes(table)
        with changes.monitor.watching(), changes.monitor.watching():
            assert len(open_descriptors()) == len(before) + 2
        assert open_descriptors() == before
        child.end(b"l")


def test_a_thread_can_wait_without_descriptors_for_a_reactor(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> reactor.Reactor:
        raise ResourceError("no descriptor is free")

    with new_table() as table:
        child = Child(table)
        before = open_descriptors()
        changes = Changes(table)
        with monkeypatch.context() as patched:
            patched.setattr(reactor, "get", refuse)
            with changes.monitor.watching():
                assert not changes.monitor.covers_all_peers
                assert open_descriptors() == before
        with changes.monitor.watching():
            assert changes.monitor.covers_all_peers
        child.end(b"l")


def test_ctrl_c_while_it_looks_for_peers_leaves_it_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(slot: int) -> bool:
        raise KeyboardInterrupt

    with new_table() as table:
        child = Child(table)
        before = open_descriptors()
        changes = Changes(table)
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(table, "shares_pid_namespace", interrupt)
            changes.monitor.open()
        assert open_descriptors() == before
        with changes.monitor.watching():
            assert changes.after(lambda: child.end(signal.SIGKILL))


@pytest.mark.parametrize("what", ["pidfd", "epoll", "eventfd", "another namespace"])
def test_it_says_if_a_death_would_cause_no_event(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if what == "another namespace":
        monkeypatch.setattr(tables, "_pid_namespace", lambda: os.getpid())
    else:
        monkeypatch.setattr(descriptors, what, lambda *args: None)
    with watched() as (table, changes):
        child = Child(table)
        with changes.monitor.watching():
            assert changes.monitor.covers_all_peers is False or what in ("pidfd", "another namespace")
        changes.monitor._on_event()
        assert not changes.monitor.covers_all_peers
        child.end(signal.SIGKILL)
        assert (child.slot, False) in list(table.other_slots())


def test_it_does_not_watch_a_later_process_with_the_same_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer dies just before its pidfd is opened."""
    with new_table() as table:
        child = Child(table)
        real = descriptors.pidfd

        def pidfd(pid: int) -> int | None:
            assert pid == child.pid
            child.end(signal.SIGKILL)
            return real(os.getpid())

        monkeypatch.setattr(descriptors, "pidfd", pidfd)
        before = open_descriptors()
        changes = Changes(table)
        changes.monitor.open()
        changes.monitor.close()
        assert len(open_descriptors()) == len(before) - 1  # the pipe to the child
