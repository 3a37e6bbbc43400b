"""The deaths that a handle has been told of, and the handles of one process."""

from __future__ import annotations

import os

import pytest

from torchwq.errors import WorkerDied
from torchwq.peers import table as tables
from torchwq.peers.failures import SeenFailures
from torchwq.peers.local_handles import LocalHandles
from torchwq.peers.table import PeerTable
from torchwq.workers.deaths import raise_next_death


class Handle:
    pass


def die(table: PeerTable) -> None:
    """Let a peer come to the table and die."""
    PeerTable([os.dup(fd) for fd in table.handover()]).abandon()


def test_each_death_is_told_once_to_each_handle() -> None:
    table = PeerTable()
    first, second = SeenFailures(), SeenFailures()
    for _ in range(3):
        die(table)
    for seen in (first, second):
        for _ in range(3):
            with pytest.raises(WorkerDied, match="without having closed this thing"):
                raise_next_death(seen, table, "this thing")
        raise_next_death(seen, table, "this thing")
    table.leave()


def test_a_copy_is_told_only_of_deaths_after_it_was_made() -> None:
    table = PeerTable()
    die(table)
    seen = SeenFailures()
    with pytest.raises(WorkerDied):
        raise_next_death(seen, table, "this thing")
    copy = seen.copy()
    die(table)
    with pytest.raises(WorkerDied):
        raise_next_death(seen, table, "this thing")
    assert copy.next_unseen_death(table) is not None
    assert seen.next_unseen_death(table) is None
    table.leave()


def test_a_death_waits_for_what_comes_first_and_for_whom_it_concerns() -> None:
    table = PeerTable()
    die(table)
    seen = SeenFailures()
    raise_next_death(seen, table, "this thing", unless=lambda: True)
    raise_next_death(seen, table, "this thing", concerning=lambda dead, living: ())
    with pytest.raises(WorkerDied):
        raise_next_death(seen, table, "this thing")
    table.leave()


def test_deaths_that_the_table_does_not_show_any_more_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "REUSE_AFTER", 4)
    table = PeerTable()
    seen = SeenFailures()
    for _ in range(50):
        die(table)
        with pytest.raises(WorkerDied):
            raise_next_death(seen, table, "this thing")
    assert len(seen.deaths) <= 5
    table.leave()


def test_a_handle_that_is_garbage_or_waits_is_no_other_handle() -> None:
    handles: LocalHandles[Handle] = LocalHandles()
    mine, other = Handle(), Handle()
    handles.add(mine)
    handles.add(other)
    assert handles.any_other_than({mine})
    del other
    assert not handles.any_other_than({mine})
    handles.count_pending(1)
    assert handles.any_other_than({mine})
    handles.count_pending(-1)
    assert not handles.any_other_than({mine})
    assert handles.ever_pending
