"""A finalizer or signal handler uses the channel that its thread is using: nothing hangs, and nothing is lost."""

from __future__ import annotations

from typing import Any

import pytest

import torchwq
from tests.injection import KINDS, loses_nothing


@pytest.mark.parametrize("nested", ["write", "read"])
@pytest.mark.parametrize("outer", ["write", "read"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("capacity", [None, 8])
@pytest.mark.parametrize("where", ["local", "socket"])
def test_writing_and_reading_in_the_middle_of_either_loses_nothing(
    where: str, capacity: int | None, kind: str, outer: str, nested: str
) -> None:
    channel = torchwq.channel(capacity)
    if where == "socket":
        channel._core.open_to_processes()

    def read(nonblocking: bool) -> Any:
        return channel.read(True)[1] if nonblocking else channel.read(timeout=10)[1]

    assert loses_nothing(channel.write, read, kind, outer, nested) > 2
    channel.close()
