"""One worker for all the tests of a module."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from .support import Peer, started_peer


@pytest.fixture(scope="module", autouse=True)
def _quick_collections(_services: None) -> None:
    """Each test collects garbage twice: spare it what torch and the modules before have left, which is none."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def module_peer(_services: None) -> Iterator[Peer]:
    with started_peer() as started:
        yield started


@pytest.fixture
def peer(module_peer: Peer) -> Iterator[Peer]:
    """The worker, which keeps no memory of one test's for the next: by itself it looks only every other second."""
    yield module_peer
    module_peer.settle()
