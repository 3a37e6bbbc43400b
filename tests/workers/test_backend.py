"""The table of backends: one line adds a kind of workers, and no code compares names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import torchwq
from torchwq.workers import backend
from torchwq.workers.threads import Threads

from . import jobs


class _Strings(Threads):
    name = "string"


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the table back afterwards."""
    monkeypatch.setattr(backend, "_table", dict(backend._table))


def _loaded(backend: Any, **more: Any) -> list[Any]:
    return list(torchwq.DataLoader(range(3), None, num_workers=1, backend=backend, **more))  # type: ignore[arg-type]


@pytest.mark.usefixtures("table")
def test_a_further_backend_is_taken_by_its_name_wherever_workers_are_started() -> None:
    backend.register(_Strings())
    assert torchwq.map(1, jobs.is_a_thread, backend="string").join(20) == [True]
    assert torchwq.BackgroundTask(jobs.is_a_thread, backend="string").result(20)
    with torchwq.BackgroundTaskPool(1, backend="string") as pool:
        assert pool.submit(jobs.is_a_thread).result(20)
    assert _loaded("string") == [0, 1, 2]
    with pytest.raises(ValueError, match=r"multiprocessing_context is for processes: .* backend='string'"):
        _loaded("string", multiprocessing_context="spawn")


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(
    "start",
    [
        lambda backend: torchwq.map(1, jobs.is_a_thread, backend=backend),
        lambda backend: torchwq.BackgroundTask(jobs.is_a_thread, backend=backend),
        lambda backend: torchwq.BackgroundTaskPool(1, backend=backend),
        _loaded,
    ],
    ids=["map", "task", "pool", "loader"],
)
def test_a_name_that_is_not_in_the_table_is_refused_with_those_that_are(start: Callable[[Any], object]) -> None:
    for name in ("fibre", "", None, ["thread"]):
        with pytest.raises(ValueError, match="backend must be 'process', 'thread' or 'ray', not ") as caught:
            start(name)
        assert str(caught.value).endswith(repr(name))
    backend.register(_Strings())
    with pytest.raises(ValueError, match="backend must be 'process', 'thread', 'string' or 'ray', not 'fibre'"):
        start("fibre")
