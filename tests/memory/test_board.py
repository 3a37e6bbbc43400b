"""The counters that a queue's processes share."""

from __future__ import annotations

import os

import pytest

from tests.marshalling.support import descriptors
from torchwq.memory import board


def test_a_second_mapping_sees_what_the_first_writes() -> None:
    mine = board.Board()
    other = board.Board(os.dup(mine.fd))
    try:
        slot = mine.slot(3)
        mine.words[slot.number_index] = 17
        mine.words[slot.state_index] = 5 * board.BUSY + 2
        seen = other.slot(3)
        assert (seen.number, seen.taken, seen.busy) == (17, 5, 2)
        other.set_asked(True)
        assert mine.words[board.ASKED] == 1
        other.set_asked(False)
        assert mine.words[board.ASKED] == 0
    finally:
        mine.close()
        other.close()


def test_slots_do_not_touch_each_other_nor_the_head() -> None:
    counters = board.Board()
    try:
        places = set()
        for number in (0, 1, 2, board.SLOTS - 1):
            slot = counters.slot(number)
            places |= {slot.number_index, slot.state_index}
            counters.words[slot.number_index] = number + 1
            counters.words[slot.state_index] = board.BUSY * number
        assert len(places) == 8
        assert board.ASKED not in places
        assert [counters.slot(n).number for n in (0, 1, 2, board.SLOTS - 1)] == [1, 2, 3, board.SLOTS]
        assert counters.words[board.ASKED] == 0
        counters.slot(1).clear()
        assert [counters.slot(n).number for n in (0, 1, 2)] == [1, 0, 3]
        assert counters.slot(1).taken == 0
    finally:
        counters.close()


def test_a_slot_beyond_the_board_is_an_error_not_someone_elses_memory() -> None:
    counters = board.Board()
    try:
        with pytest.raises(IndexError):
            _ = counters.slot(board.SLOTS).number
    finally:
        counters.close()


def test_each_slot_is_a_cache_line_of_its_own() -> None:
    counters = board.Board()
    try:
        assert [counters.slot(number).number_index % 8 for number in (0, 1, 7)] == [0, 0, 0]
    finally:
        counters.close()


def test_closing_gives_the_descriptor_back_and_may_be_repeated() -> None:
    before = descriptors()
    counters = board.Board()
    counters.close()
    counters.close()
    assert descriptors() == before
    counters = board.Board()
    del counters
    assert descriptors() == before


def test_a_new_board_is_all_zeros() -> None:
    counters = board.Board()
    try:
        assert not any(counters.words)
        assert len(counters.words) == (board.SLOTS + 1) * 8
    finally:
        counters.close()
