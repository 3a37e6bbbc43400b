"""The table of peers: slots, which peers are alive, and counts."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import pytest

from tests.conftest import wait_until
from torchwq.errors import ResourceError
from torchwq.peers import table as tables
from torchwq.peers.table import FIRST_SLOT_WORD, PeerTable

WORD = FIRST_SLOT_WORD


@contextlib.contextmanager
def new_table() -> Iterator[PeerTable]:
    made = PeerTable()
    try:
        yield made
    finally:
        made.leave()


def another(table: PeerTable) -> PeerTable:
    """Another peer of the same table, which would normally be another process."""
    return PeerTable([os.dup(fd) for fd in table.handover()])


class Child:
    """A process that claims a slot, and ends as the test says."""

    def __init__(self, table: PeerTable) -> None:
        told, self._tell = os.pipe()
        heard, tells = os.pipe()
        fds = [os.dup(fd) for fd in table.handover()]
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._tell)  # so that it ends if its parent does
            part = PeerTable([os.dup(fd) for fd in fds])
            os.write(tells, part.slot.to_bytes(2, "little"))
            if os.read(told, 1) == b"l":
                part.leave()
            os._exit(0)
        self.slot = int.from_bytes(os.read(heard, 2), "little")
        for each in (told, heard, tells, *fds):
            os.close(each)

    def end(self, how: bytes | signal.Signals) -> None:
        if isinstance(how, bytes):
            os.write(self._tell, how)
        else:
            os.kill(self.pid, how)
        os.close(self._tell)
        os.waitpid(self.pid, 0)


def test_each_peer_has_a_slot_of_its_own() -> None:
    with new_table() as table:
        assert (table.slot, table.was_shared(), list(table.other_slots())) == (0, False, [])
        child = Child(table)
        assert child.slot == 1
        assert list(table.other_slots()) == [(1, True)]
        assert table.pid(1) == child.pid
        child.end(b"l")
        assert list(table.other_slots()) == []
        assert table.was_shared()


@pytest.mark.parametrize("how", [signal.SIGKILL, b"x"], ids=["killed", "exits without leaving"])
def test_a_slot_that_was_not_left_shows_a_dead_peer(how: bytes | signal.Signals) -> None:
    with new_table() as table:
        child = Child(table)
        child.end(how)
        assert list(table.other_slots()) == [(1, False)]
        assert not table.has_failed(1)
        second = Child(table)
        assert second.slot == 2, "it stays so"
        second.end(b"l")


def test_a_slot_that_was_left_is_claimed_again_with_its_counts() -> None:
    with new_table() as table:
        part = another(table)
        part.words[part.slot_offset(part.slot) + WORD] = 5
        part.leave()
        part = another(table)
        assert (part.slot, table.sum(WORD)) == (1, 5)
        part.leave(failed=True)
        assert list(table.other_slots()) == [(1, False)]
        assert table.has_failed(1)


def test_a_forked_child_does_not_hold_its_parents_slot() -> None:
    with new_table() as table:
        part = another(table)
        held, hold = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(hold)
            os.read(held, 1)
            os._exit(0)
        slot = part.slot
        part.words.release()
        part.abandon()  # as a process that ends without a word; its child lives on
        wait_until(lambda: list(table.other_slots()) == [(slot, False)], what="that the child has let go of the lock")
        os.close(hold)
        os.waitpid(pid, 0)
        os.close(held)


@pytest.mark.parametrize("has_gil", [True, False])
def test_a_counter_counts_each_call_of_many_threads(has_gil: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with new_table() as table:
        monkeypatch.setattr(tables, "HAS_GIL", has_gil and tables.HAS_GIL)
        table.words[table.slot_offset(table.slot) + WORD] = 7
        count = table.counter(WORD)

        def count_much() -> None:
            for _ in range(20_000):
                count()

        threads = [threading.Thread(target=count_much) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert table.words[table.slot_offset(table.slot) + WORD] == 7 + 80_000


def test_the_header_lock_excludes_processes_and_threads() -> None:
    with new_table() as table:
        part = another(table)
        order = []
        with table.locked(), table.locked():
            thread = threading.Thread(target=lambda: [order.append("other") for _ in [0] if enter(part)])
            thread.start()
            thread.join(0.1)
            order.append("first")
        thread.join(20)
        assert order == ["first", "other"]
        part.leave()


def enter(part: PeerTable) -> bool:
    with part.locked():
        return True


def die(part: PeerTable) -> None:
    """End as a killed process does."""
    part.abandon()


def test_slots_of_dead_peers_are_claimed_again_and_deaths_do_not_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "REUSE_AFTER", 64)
    monkeypatch.setattr(tables, "MAX_PEERS", 256)
    with new_table() as table:
        deaths: set[int] = set()
        for number in range(tables.MAX_PEERS + 200):
            part = another(table)
            part.words[part.slot_offset(part.slot) + WORD] += 1
            die(part)
            if not number % 50:
                deaths |= {peer_id for _, peer_id, alive in table.other_peers() if not alive}
        deaths |= {peer_id for _, peer_id, alive in table.other_peers() if not alive}
        assert len(deaths) == table.num_deaths == table.sum(WORD) == tables.MAX_PEERS + 200
        assert len(table.used_slots()) < tables.MAX_PEERS


def test_a_peer_that_claims_a_dead_peers_slot_is_another_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    state = WORD + 1
    monkeypatch.setattr(tables, "REUSE_AFTER", 3)
    with new_table() as table:
        lasting = another(table)
        dead = [another(table) for _ in range(4)]
        for part in dead:
            part.words[part.slot_offset(part.slot) + state] = 1
            die(part)
        before = {peer_id for _, peer_id, alive in table.other_peers() if not alive}
        assert len(before) == 4
        successor = PeerTable([os.dup(fd) for fd in table.handover()], reset_words=[state])
        assert successor.slot == dead[0].slot  # not that of the one who lasts
        assert successor.words[successor.slot_offset(successor.slot) + state] == 0
        assert [slot for slot, alive in table.other_slots() if alive] == [lasting.slot, successor.slot]
        assert table.num_deaths == 4
        die(successor)
        new = {peer_id for _, peer_id, alive in table.other_peers() if not alive} - before
        assert len(new) == 1
        assert table.num_deaths == 5
        lasting.leave()


def test_no_slot_of_a_living_peer_is_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "REUSE_AFTER", 2)
    monkeypatch.setattr(tables, "MAX_PEERS", 4)
    with new_table() as table:
        parts = [another(table) for _ in range(3)]
        with pytest.raises(ResourceError, match="more than 4 processes"):
            another(table)
        die(parts.pop())
        parts.append(another(table))
        with pytest.raises(ResourceError, match="more than 4 processes"):
            another(table)
        for part in parts:
            part.leave()


def test_a_peer_that_leaves_while_another_looks_has_not_died(monkeypatch: pytest.MonkeyPatch) -> None:
    with new_table() as table:
        leaver = another(table)
        is_alive = table.is_alive

        def leave_first(slot: int) -> bool:
            leaver.leave()
            return is_alive(slot)

        monkeypatch.setattr(table, "is_alive", leave_first)
        assert list(table.other_slots()) == []


def test_a_peer_that_comes_while_another_looks_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    with new_table() as table:
        leaver = another(table)
        came: list[PeerTable] = []
        is_alive = table.is_alive

        def change(slot: int) -> bool:
            leaver.leave()
            held = is_alive(slot)
            if not came:
                came.append(another(table))
            return held

        monkeypatch.setattr(table, "is_alive", change)
        try:
            assert list(table.other_slots()) == [(came[0].slot, True)]
            assert came[0].slot == 1
        finally:
            came[0].leave()
