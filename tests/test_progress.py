"""``progress=True`` shows a bar, and needs tqdm."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest

import torchwq
from torchwq import progress


def square(number: int) -> int:
    return number * number


def add(left: int, right: int) -> int:
    return left + right


class Bar:
    """What tqdm does, for the tests."""

    def __init__(self, items: Any = None, **options: Any) -> None:
        self.items, self.options, self.n, self.updates = items, options, 0, [0]

    def update(self, number: int) -> None:
        self.n += number
        self.updates.append(self.n)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: Any) -> None:
        self.updates.append(-1)

    def __iter__(self) -> Iterator[Any]:
        for item in self.items:
            yield item
            self.update(1)


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Bar]:
    made: list[Bar] = []

    def make(*args: Any, **options: Any) -> Bar:
        made.append(Bar(*args, **options))
        return made[-1]

    monkeypatch.setattr(progress, "check", lambda wanted: make if wanted else None)
    return made


def test_join_shows_how_many_workers_have_ended(backend: str, bars: list[Bar]) -> None:
    assert torchwq.map(3, square, backend=backend, progress=True).join(40) == [0, 1, 4]
    (bar,) = bars
    assert bar.options == {"total": 3, "desc": "square", "unit": "worker"}
    assert bar.updates == [*sorted(bar.updates[:-1]), -1]
    assert bar.n == 3
    assert torchwq.map(1, square, backend=backend).join(40) == [0]
    assert len(bars) == 1


def wait_for_none(queue: torchwq.WorkQueue) -> None:
    queue.read()


def test_a_join_that_is_out_of_time_ends_its_bar(bars: list[Bar]) -> None:
    with torchwq.workqueue() as queue:
        workers = torchwq.map(1, wait_for_none, queue, progress=True)
        with pytest.raises(TimeoutError):
            workers.join(0.01)
        assert bars[0].updates[-1] == -1
        queue.write(None)
        assert workers.join(40) == [None]


def test_a_pools_map_shows_how_many_results_were_taken(backend: str, bars: list[Bar]) -> None:
    with torchwq.BackgroundTaskPool(1, backend=backend) as pool:
        assert list(pool.map(add, range(4), iter([1, 2, 3]), progress=True)) == [1, 3, 5]
        assert list(pool.map(add, [], [], progress=True)) == []
        assert list(pool.map(square, range(3))) == [0, 1, 4]
    assert [bar.options["total"] for bar in bars] == [3, 0]
    assert bars[0].updates == [0, 1, 2, 3]


def test_the_bar_is_tqdms(run_script: Any) -> None:
    """In a process of its own: tqdm keeps a thread."""
    done = run_script("import math, torchwq; print(torchwq.map(2, math.sqrt, progress=True).join(40))")
    assert done.stdout == "[0.0, 1.0]\n"
    assert "sqrt: 100%" in done.stderr


def test_a_bar_that_is_turned_off_is_no_obstacle(run_script: Any) -> None:
    program = "import math, torchwq; print(torchwq.map(2, math.sqrt, progress=True).join(40))"
    done = run_script(program, env={"TQDM_DISABLE": "1"}, fresh=True)
    assert done.stdout == "[0.0, 1.0]\n"


def test_without_tqdm_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match="torchwq\\[progress\\]"):
        torchwq.map(1, square, progress=True)
    with torchwq.BackgroundTaskPool(1) as pool, pytest.raises(ImportError, match="pip install tqdm"):
        pool.map(square, [1], progress=True)
