"""The reference table: its rows come back, and nothing else is taken for it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

import torchwq
from tests.marshalling.support import roundtrip
from torchwq.memory import limits, ref_table, rows, tree_table
from torchwq.memory.counts import FREE, IN_FLIGHT, IN_USE, ROWS
from torchwq.memory.ref_table import RefTable


@pytest.fixture
def table() -> Iterator[str]:
    """Where a reference table of its own can be opened, as often as there are processes to play."""
    fd = ref_table.create()
    yield f"/proc/self/fd/{fd}"
    os.close(fd)


@pytest.fixture
def without_table() -> Iterator[None]:
    """This process has no reference table yet."""
    before = tree_table.current()
    tree_table.use(None)
    yield
    tree_table.use(before)


@pytest.fixture
def two(table: str) -> Iterator[tuple[RefTable, RefTable]]:
    """Two processes of one tree, as far as the table can tell: each has opened it by itself."""
    both = [RefTable(os.open(table, os.O_RDWR | os.O_CLOEXEC)) for _ in range(2)]
    yield both[0], both[1]
    for each in both:
        each.abandon()


def test_rows_of_a_process_that_once_had_all_of_them_go_to_others(
    two: tuple[RefTable, RefTable], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "_RETRY_INTERVAL", 0.0)
    mine, others = two
    had = [mine.take_row() for _ in range(ROWS)]
    assert None not in had
    assert mine.take_row() is None
    assert others.take_row() is None
    for number in had:
        assert number is not None
        mine.release_row(number)
    got = [others.take_row() for _ in range(ROWS - rows.CHUNK)]
    assert None not in got, "all but what the other one keeps in hand"
    assert len({number & 0xFFFFFFFF for number in got if number is not None}) == len(got)
    assert not set(got) & set(had)
    assert not any(others.is_current(number) for number in had if number is not None)
    assert all(others.is_current(number) for number in got if number is not None)
    assert mine.take_row() is not None


def test_a_row_is_given_to_one_process_at_a_time(two: tuple[RefTable, RefTable]) -> None:
    """They take and give back at random; no row is anybody's twice."""
    import random

    choose = random.Random(3)
    has: list[set[int]] = [set(), set()]
    for _ in range(20_000):
        who = choose.randrange(2)
        if choose.random() < 0.5 + 0.3 * (len(has[who]) < choose.choice([0, 100, 500])):
            number = two[who].take_row()
            assert number is not None
            has[who].add(number)
        elif has[who]:
            number = has[who].pop()
            two[who].release_row(number)
            assert not two[1 - who].is_current(number)
    taken = [number & 0xFFFFFFFF for number in has[0] | has[1]]
    assert len(taken) == len(set(taken))


def test_a_search_for_rows_in_vain_is_not_repeated_at_once() -> None:
    looks: list[int] = []
    none = rows.Rows(4, 0, lambda chunk: bool(looks.append(chunk)), lambda chunk: None, lambda row: None)
    assert none.take() is None
    assert none.take() is None
    assert looks == [0, 1, 2, 3]


def of_the_right_size() -> int:
    fd = os.memfd_create("torchwq-ref-table")
    os.ftruncate(fd, ref_table._NBYTES)
    return fd


def of_another_name() -> int:
    fd = os.memfd_create("somebody", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, ref_table._NBYTES)
    return fd


def too_short() -> int:
    fd = os.memfd_create("torchwq-ref-table", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, mmap.PAGESIZE)
    return fd


def a_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("make", [of_the_right_size, of_another_name, too_short, a_pipe, lambda: -1])
def test_what_is_no_reference_table_is_not_taken_for_one(
    make: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, without_table: None
) -> None:
    """The maker of the tree's folder has ended, and its process id and descriptor's number stand for something else."""
    fd = make()
    (tmp_path / "ref-table").symlink_to(f"/proc/{os.getpid()}/fd/{fd if fd >= 0 else 1_000_000}")
    monkeypatch.setattr(tree_table.namespace, "current", lambda: SimpleNamespace(path=str(tmp_path)))
    monkeypatch.setattr(tree_table, "_retry_at", 0.0)
    monkeypatch.setattr(tree_table, "failure_reason", "")
    monkeypatch.setattr(limits, "_warned_of_no_reuse", False)
    before = sorted(os.listdir("/proc/self/fd"))
    assert tree_table.current() is None
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert "TORCHWQ_NAMESPACE" in tree_table.failure_reason
    tensor = torchwq.zeros(10)
    with pytest.warns(RuntimeWarning, match="made anew.*TORCHWQ_NAMESPACE"):
        tensor = roundtrip(tensor)
    assert tensor.tolist() == [0] * 10
    if fd >= 0 and make is not a_pipe:
        assert not any(os.pread(fd, 1 << 20, 0)), "not a byte of it was changed"
    if fd >= 0:
        os.close(fd)


def test_a_table_that_could_not_be_had_is_looked_for_again(
    table: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, without_table: None
) -> None:
    monkeypatch.setattr(tree_table.namespace, "current", lambda: SimpleNamespace(path=str(tmp_path)))
    monkeypatch.setattr(tree_table, "_retry_at", 0.0)
    monkeypatch.setattr(tree_table, "failure_reason", "")
    monkeypatch.setattr(tree_table, "_RETRY_INTERVAL", 0.0)
    monkeypatch.setattr(ref_table, "SLOTS", 0)
    (tmp_path / "ref-table").symlink_to(table)
    assert tree_table.current() is None
    assert "processes share memory" in tree_table.failure_reason
    monkeypatch.undo()
    monkeypatch.setattr(tree_table.namespace, "current", lambda: SimpleNamespace(path=str(tmp_path)))
    monkeypatch.setattr(tree_table, "_retry_at", 0.0)
    found = tree_table.current()
    assert found is not None
    assert not tree_table.failure_reason
    monkeypatch.undo()
    found.abandon()


def test_the_table_of_many_processes_takes_little_memory(table: str) -> None:
    """Each of 300 has a block, which one other holds, and looks whether it is free."""
    many = [RefTable(os.open(table, os.O_RDWR | os.O_CLOEXEC)) for _ in range(300)]
    try:
        assert [each.slot for each in many] == list(range(300))
        for mine, other in zip(many, many[1:] + many[:1], strict=True):
            number = mine.take_row()
            assert number is not None
            assert mine.state(number) == FREE
            mine.count_sent(number)
            assert mine.state(number) == IN_FLIGHT
            other.count_received(number, IN_USE)
            assert mine.state(number) == IN_USE
            other.clear_flag(number, IN_USE)
            assert mine.state(number) == FREE
        taken = os.stat(table).st_blocks * 512
        assert taken < 16 << 20
    finally:
        for each in many:
            each.abandon()


@pytest.mark.parametrize("slot", [0, 1, 63, 64, 130])
def test_who_takes_a_slot_over_holds_nothing_that_its_last_process_held(table: str, slot: int) -> None:
    def opened() -> RefTable:
        return RefTable(os.open(table, os.O_RDWR | os.O_CLOEXEC))

    before = [opened() for _ in range(slot)]
    maker_and_dead = opened(), opened()
    maker, dead = maker_and_dead if slot != 0 else maker_and_dead[::-1]
    numbers = [maker.take_row() for _ in range(300)]
    for number in numbers:
        assert number is not None
        maker.count_sent(number)
        dead.count_received(number, IN_USE)
    assert {maker.state(number) for number in numbers if number is not None} == {IN_USE}
    its_slot = dead.slot
    dead.abandon()
    heir = opened()
    assert heir.slot == its_slot
    assert {maker.state(number) for number in numbers if number is not None} == {FREE}
    for each in (*before, maker, heir):
        each.abandon()


def test_a_worker_whose_owner_may_have_died_says_nothing_of_a_missing_table_before_it_would_have_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    later: list[tuple[float, Any]] = []
    monkeypatch.setattr(limits.reactor, "get", lambda: SimpleNamespace(call_later=lambda *args: later.append(args)))
    monkeypatch.setattr(limits, "_warned_of_no_reuse", False)
    monkeypatch.setattr(limits, "_warning_delay", 0.0)
    limits.delay_warnings(3.0)
    limits.warn_of_no_reuse("it has gone with its maker")
    ((seconds, warn),) = later
    assert seconds == 3.0
    with pytest.warns(RuntimeWarning, match="gone with its maker"):
        warn()
