"""One worker for all the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .support import Peer, started_peer


@pytest.fixture(scope="module")
def peer(_services: None) -> Iterator[Peer]:
    with started_peer() as started:
        yield started
