"""Shared words, and record locks, which end with their holders."""

from __future__ import annotations

import os

import pytest

from tests.conftest import wait_until
from tests.marshalling.support import descriptors
from torchwq.peers import record_locks
from torchwq.peers.record_locks import RecordLocks, lockable_memory, reopen
from torchwq.peers.shared_words import SharedWords


def test_a_second_mapping_has_the_same_words_in_the_same_slots() -> None:
    mine = SharedWords(4, 10, 3)
    other = SharedWords(4, 10, 3, os.dup(mine.fd))
    mine.words[mine.slot_offset(2) + 1] = 17
    assert list(other.column(1)) == [0, 0, 17, 0, 0, 0, 0, 0, 0, 0]
    assert list(other.column(1, 3)) == [0, 0, 17]
    assert mine.slot_offset(0) == 4


def test_a_view_of_some_words_outlives_their_closing() -> None:
    shared = SharedWords(0, 2, 8)
    mine = shared.words[8:16]
    mine[0] = 3
    shared.close()
    shared.close()
    assert mine[0] == 3
    with pytest.raises(ValueError, match="released"):
        _ = shared.words[0]


def test_words_that_cannot_be_mapped_leave_no_descriptor() -> None:
    before = descriptors()
    shared = SharedWords(0, 2, 8)
    with pytest.raises((OSError, ValueError)):
        SharedWords(0, 1 << 50, 8, os.dup(shared.fd))
    shared.close()
    assert descriptors() == before


@pytest.fixture(params=["of the open file", "of the process"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Memory for locks of either kind."""
    monkeypatch.setattr(
        record_locks, "HAS_OFD_LOCKS", record_locks.HAS_OFD_LOCKS and request.param == "of the open file"
    )
    return lockable_memory(100)


def test_a_lock_ends_with_the_process_that_holds_it(memory: int) -> None:
    heard, tells = os.pipe()
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(tell)
        theirs = RecordLocks(reopen(memory))
        os.write(tells, b"1" if theirs.acquire(7) else b"0")
        os.read(told, 1)
        os._exit(0)
    mine_fd = reopen(memory)
    mine = RecordLocks(mine_fd)
    try:
        assert os.read(heard, 1) == b"1"
        assert mine.is_held(7)
        assert not mine.is_held(8)
        assert not mine.acquire(7)
        assert mine.acquire(8)
    finally:
        os.close(tell)
        os.waitpid(pid, 0)
    wait_until(lambda: not mine.is_held(7))
    assert mine.acquire(7, wait=True)
    mine.release(7)
    for fd in (heard, tells, told, mine_fd, memory):
        os.close(fd)
