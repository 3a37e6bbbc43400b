"""The counters that a queue's processes share."""

from __future__ import annotations

import os

import pytest

from tests.marshalling.support import descriptors
from torchwq.queues import counters


def test_a_second_mapping_sees_what_the_first_writes() -> None:
    mine = counters.Counters()
    other = counters.Counters(os.dup(mine.fd))
    try:
        slot = mine.slot(3)
        mine.words[slot.number_index] = 17
        mine.words[slot.state_index] = 5 * counters.BUSY + 2
        seen = other.slot(3)
        assert (seen.number, seen.taken, seen.busy) == (17, 5, 2)
        other.words[counters.ASKED] = 1
        assert mine.words[counters.ASKED] == 1
        other.words[counters.ASKED] = 0
        assert mine.words[counters.ASKED] == 0
    finally:
        mine.close()
        other.close()


def test_slots_do_not_touch_each_other_nor_the_head() -> None:
    mine = counters.Counters()
    try:
        places = set()
        for number in (0, 1, 2, counters.SLOTS - 1):
            slot = mine.slot(number)
            places |= {slot.number_index, slot.state_index}
            mine.words[slot.number_index] = number + 1
            mine.words[slot.state_index] = counters.BUSY * number
        assert len(places) == 8
        assert counters.ASKED not in places
        assert [mine.slot(n).number for n in (0, 1, 2, counters.SLOTS - 1)] == [1, 2, 3, counters.SLOTS]
        assert mine.words[counters.ASKED] == 0
        mine.slot(1).clear()
        assert [mine.slot(n).number for n in (0, 1, 2)] == [1, 0, 3]
        assert mine.slot(1).taken == 0
    finally:
        mine.close()


def test_a_slot_beyond_the_last_is_an_error_not_someone_elses_memory() -> None:
    mine = counters.Counters()
    try:
        with pytest.raises(IndexError):
            _ = mine.slot(counters.SLOTS).number
    finally:
        mine.close()


def test_each_slot_is_a_cache_line_of_its_own() -> None:
    mine = counters.Counters()
    try:
        assert [mine.slot(number).number_index % 8 for number in (0, 1, 7)] == [0, 0, 0]
    finally:
        mine.close()


def test_closing_gives_the_descriptor_back_and_may_be_repeated() -> None:
    before = descriptors()
    mine = counters.Counters()
    mine.close()
    mine.close()
    assert descriptors() == before
    mine = counters.Counters()
    del mine
    assert descriptors() == before


def test_new_counters_are_all_zeros() -> None:
    mine = counters.Counters()
    try:
        assert not any(mine.words)
        assert len(mine.words) == (counters.SLOTS + 1) * 8
    finally:
        mine.close()
