"""torch's own loaders, which these tests compare with, leave a thread of multiprocessing's behind."""

from __future__ import annotations

import multiprocessing.resource_sharer
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _stop_torchs_sharer(_leaves_nothing_behind: None) -> Iterator[None]:
    yield
    multiprocessing.resource_sharer.stop()
