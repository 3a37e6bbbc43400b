"""What the owner of a queue and its workers' handles say to each other beside the queue."""

from __future__ import annotations

import pytest

from torchwq.queues import protocol
from torchwq.queues.protocol import FunctionFailed, Hello, Seat
from torchwq.workers.failures import Failure


@pytest.mark.parametrize("seat", [Seat(0, None, 0, 0), Seat(4095, 7, 1, 256), Seat(3, 2**40, 2**40, 2**40)])
def test_a_seat_is_read_as_it_was_written(seat: Seat) -> None:
    assert Seat.decode(seat.encode()) == seat


def test_each_message_says_of_which_kind_it_is() -> None:
    told = [protocol.LEAVING, protocol.GOODBYE, protocol.IN_DOUBT, protocol.ADOPT]
    kinds = [*map(protocol.kind_of, told), Hello.KIND, FunctionFailed.KIND]
    assert len(set(kinds)) == len(kinds)
    assert protocol.kind_of(Hello.encode(77)) == Hello.KIND
    assert Hello.decode(Hello.encode(77)) == 77


@pytest.mark.parametrize("error", [None, ValueError("short"), ValueError("x" * 100_000)])
def test_a_failure_comes_with_its_error_which_is_short_enough(error: BaseException | None) -> None:
    data = FunctionFailed.encode(Failure(5, None, error, True))
    assert protocol.kind_of(data) == FunctionFailed.KIND
    assert len(data) <= FunctionFailed._LIMIT
    failure = FunctionFailed.decode(data)
    assert (failure.number, failure.mapid, failure.ends) == (5, None, True)
    found = FunctionFailed.error_in(failure.error)
    if error is None:
        assert found is None
    else:
        assert str(error)[:100] in str(found)
