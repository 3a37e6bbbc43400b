"""One worker for all the tests of a module."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from .support import Peer, started_peer


@pytest.fixture(scope="session", autouse=True)
def _quick_collections(_services: None) -> None:
    """Each test collects garbage twice: spare it torch's own objects, which are none."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def peer(_services: None) -> Iterator[Peer]:
    with started_peer() as started:
        yield started
