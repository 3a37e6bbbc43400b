"""One worker for all the tests of a module."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from .support import Peer, started_peer


@pytest.fixture(scope="module", autouse=True)
def _quick_collections(_services: None) -> None:
    """Freeze the objects of torch and of earlier modules: each test collects garbage twice."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def module_peer(_services: None) -> Iterator[Peer]:
    with started_peer() as started:
        yield started


@pytest.fixture
def peer(module_peer: Peer) -> Iterator[Peer]:
    """The worker, after freeing the last test's memory: by itself it would do so only every other second."""
    yield module_peer
    module_peer.free_unused_memory()
