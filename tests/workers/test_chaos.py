"""Workers that die at random while the owner keeps on: nothing hangs, nothing is left, no answer is made up."""

from __future__ import annotations

import os
import time
from collections import Counter

import pytest

import torchwq
from tests.workers import jobs


def run_chaos(seconds: float) -> Counter[str]:
    seen: Counter[str] = Counter()
    end = time.monotonic() + seconds
    with torchwq.workqueue() as queue:
        maps = [torchwq.map(2, jobs.chaos, queue) for _ in range(2)]
        number = 0
        outstanding: set[int] = set()
        while time.monotonic() < end:
            while len(outstanding) < 50:
                number += 1
                outstanding.add(number)
                queue.write(number)
            try:
                answer = queue.read(timeout=20)
                assert answer in outstanding, "an answer that nobody was asked for, or a second one"
                outstanding.discard(answer)
                seen["answers"] += 1
            except torchwq.WorkerDied as death:
                if "no worker is left" in str(death):
                    outstanding.clear()
                    seen["all gone"] += 1
                    for each in maps:
                        with pytest.raises((torchwq.WorkerDied, RuntimeError)):
                            each.join(20)
                    queue.close()
                    queue = torchwq.workqueue()
                    maps = [torchwq.map(2, jobs.chaos, queue) for _ in range(2)]
                else:
                    seen["deaths"] += 1
        queue.close()
    for each in maps:
        try:
            each.join(20)
        except (torchwq.WorkerDied, RuntimeError):
            seen["failed maps"] += 1
    return seen


def test_short_chaos() -> None:
    seen = run_chaos(5)
    assert seen["answers"] > 100
    assert seen["deaths"] + seen["all gone"] > 0


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_long_chaos() -> None:
    seen = run_chaos(float(os.environ.get("TORCHWQ_SOAK_SECONDS", "600")))
    print(dict(seen))
    assert seen["deaths"] > 100
