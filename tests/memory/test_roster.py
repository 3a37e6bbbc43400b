"""Seats in shared memory: who has one, who lives, what is counted."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import pytest

from tests.conftest import wait_until
from torchwq.errors import ResourceError
from torchwq.memory import roster as rosters
from torchwq.memory.roster import FIRST_OF_SEAT, Roster

WORD = FIRST_OF_SEAT


@contextlib.contextmanager
def new_roster() -> Iterator[Roster]:
    made = Roster()
    try:
        yield made
    finally:
        made.leave()


def another(roster: Roster) -> Roster:
    """A second part in the same roster, which would normally be another process's."""
    return Roster(os.dup(roster.fd))


class Child:
    """A process that takes a seat, and then does what it is told."""

    def __init__(self, roster: Roster) -> None:
        told, self._tell = os.pipe()
        heard, tells = os.pipe()
        fd = os.dup(roster.fd)
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._tell)  # so that it ends if its parent does
            part = Roster(os.dup(fd))
            os.write(tells, part.seat.to_bytes(2, "little"))
            if os.read(told, 1) == b"l":
                part.leave()
            os._exit(0)
        self.seat = int.from_bytes(os.read(heard, 2), "little")
        for each in (told, heard, tells, fd):
            os.close(each)

    def end(self, how: bytes | signal.Signals) -> None:
        if isinstance(how, bytes):
            os.write(self._tell, how)
        else:
            os.kill(self.pid, how)
        os.close(self._tell)
        os.waitpid(self.pid, 0)


def test_each_part_has_a_seat_of_its_own() -> None:
    with new_roster() as roster:
        assert (roster.seat, roster.others_came(), list(roster.others())) == (0, False, [])
        child = Child(roster)
        assert child.seat == 1
        assert list(roster.others()) == [(1, True)]
        assert roster.pid(1) == child.pid
        child.end(b"l")
        assert list(roster.others()) == []
        assert roster.others_came()


@pytest.mark.parametrize("how", [signal.SIGKILL, b"x"], ids=["killed", "exits without leaving"])
def test_a_seat_that_was_not_left_is_a_dead_ones(how: bytes | signal.Signals) -> None:
    with new_roster() as roster:
        child = Child(roster)
        child.end(how)
        assert list(roster.others()) == [(1, False)]
        assert not roster.has_failed(1)
        second = Child(roster)
        assert second.seat == 2, "it stays so"
        second.end(b"l")


def test_a_seat_that_was_left_is_taken_again_with_its_counts() -> None:
    with new_roster() as roster:
        part = another(roster)
        part.words[part.index(part.seat) + WORD] = 5
        part.leave()
        part = another(roster)
        assert (part.seat, roster.sum(WORD)) == (1, 5)
        part.leave(failed=True)
        assert list(roster.others()) == [(1, False)]
        assert roster.has_failed(1)


def test_a_forked_child_has_no_part_in_its_parents_seat() -> None:
    with new_roster() as roster:
        part = another(roster)
        held, hold = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(hold)
            os.read(held, 1)
            os._exit(0)
        seat = part.seat
        part.words.release()
        part._close()  # as a process that ends without a word; its child lives on
        wait_until(lambda: list(roster.others()) == [(seat, False)], what="that the child has let go of the lock")
        os.close(hold)
        os.waitpid(pid, 0)
        os.close(held)


@pytest.mark.parametrize("has_gil", [True, False])
def test_a_counter_misses_nothing(has_gil: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with new_roster() as roster:
        monkeypatch.setattr(rosters, "_HAS_GIL", has_gil and rosters._HAS_GIL)
        roster.words[roster.index(roster.seat) + WORD] = 7
        count = roster.counter(WORD)

        def count_much() -> None:
            for _ in range(20_000):
                count()

        threads = [threading.Thread(target=count_much) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert roster.words[roster.index(roster.seat) + WORD] == 7 + 80_000


def test_the_head_is_locked_against_processes_and_threads() -> None:
    with new_roster() as roster:
        part = another(roster)
        order = []
        with roster.locked(), roster.locked():
            thread = threading.Thread(target=lambda: [order.append("other") for _ in [0] if enter(part)])
            thread.start()
            thread.join(0.1)
            order.append("first")
        thread.join(20)
        assert order == ["first", "other"]
        part.leave()


def enter(part: Roster) -> bool:
    with part.locked():
        return True


def die(part: Roster) -> None:
    """Leave the seat as a process does that is killed."""
    part._close()


def test_seats_of_the_dead_are_taken_again_and_deaths_do_not_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rosters, "KEPT", 64)
    monkeypatch.setattr(rosters, "SEATS", 256)
    with new_roster() as roster:
        told: set[int] = set()
        for number in range(rosters.SEATS + 200):
            part = another(roster)
            part.words[part.index(part.seat) + WORD] += 1
            die(part)
            if not number % 50:
                told |= {tenancy for _, tenancy, lives in roster.tenancies() if not lives}
        told |= {tenancy for _, tenancy, lives in roster.tenancies() if not lives}
        assert len(told) == roster.losses == roster.sum(WORD) == rosters.SEATS + 200
        assert len(roster.taken()) < rosters.SEATS


def test_a_seat_is_taken_again_by_one_that_is_new_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    state = WORD + 1
    monkeypatch.setattr(rosters, "KEPT", 3)
    with new_roster() as roster:
        lasting = another(roster)
        dead = [another(roster) for _ in range(4)]
        for part in dead:
            part.words[part.index(part.seat) + state] = 1
            die(part)
        before = {tenancy for _, tenancy, lives in roster.tenancies() if not lives}
        assert len(before) == 4
        heir = Roster(os.dup(roster.fd), states=[state])
        assert heir.seat == dead[0].seat  # not that of the one who lasts
        assert heir.words[heir.index(heir.seat) + state] == 0
        assert [seat for seat, lives in roster.others() if lives] == [lasting.seat, heir.seat]
        assert roster.losses == 4
        die(heir)
        new = {tenancy for _, tenancy, lives in roster.tenancies() if not lives} - before
        assert len(new) == 1
        assert roster.losses == 5
        lasting.leave()


def test_no_seat_of_one_who_lives_is_given_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rosters, "KEPT", 2)
    monkeypatch.setattr(rosters, "SEATS", 4)
    with new_roster() as roster:
        parts = [another(roster) for _ in range(3)]
        with pytest.raises(ResourceError, match="more than 4 processes"):
            another(roster)
        die(parts.pop())
        parts.append(another(roster))
        with pytest.raises(ResourceError, match="more than 4 processes"):
            another(roster)
        for part in parts:
            part.leave()


def test_one_who_leaves_while_another_looks_has_not_died(monkeypatch: pytest.MonkeyPatch) -> None:
    with new_roster() as roster:
        leaver = another(roster)
        lives = roster.lives

        def leave_first(seat: int) -> bool:
            leaver.leave()
            return lives(seat)

        monkeypatch.setattr(roster, "lives", leave_first)
        assert list(roster.others()) == []


def test_one_who_comes_while_another_looks_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    with new_roster() as roster:
        leaver = another(roster)
        came: list[Roster] = []
        lives = roster.lives

        def change(seat: int) -> bool:
            leaver.leave()
            held = lives(seat)
            if not came:
                came.append(another(roster))
            return held

        monkeypatch.setattr(roster, "lives", change)
        try:
            assert list(roster.others()) == [(came[0].seat, True)]
            assert came[0].seat == 1
        finally:
            came[0].leave()
