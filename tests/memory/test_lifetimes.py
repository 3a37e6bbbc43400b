"""No process ever sees its tensor overwritten: a state machine over several processes, checked at each step."""

from __future__ import annotations

import os
import random
import time
from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from . import process_model
from .process_model import ProcessModel

PROCESSES = 3
NAMES = st.integers(0, PROCESSES - 1)
WITH_QUEUE = st.integers(0, PROCESSES - 2)
#: Who asks: the one without a queue as often as all others together.
ASKING = st.sampled_from([*range(PROCESSES - 1), *[PROCESSES - 1] * (PROCESSES - 1)])
SIZES = st.sampled_from(process_model.SIZES)


class Lifetimes(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.model = ProcessModel(PROCESSES)

    def _mine(self, data: st.DataObject) -> int | None:
        return data.draw(st.sampled_from(sorted(self.model.mine))) if self.model.mine else None

    def _has(self, data: st.DataObject, name: int) -> int | None:
        has = sorted(self.model.processes[name].has)
        return data.draw(st.sampled_from(has)) if has else None

    @initialize(size=SIZES, in_place=st.booleans())
    def make_one_each(self, size: int, in_place: bool) -> None:
        for name in (None, *range(PROCESSES)):
            self.model.make(name, size, in_place)

    @rule(name=st.none() | NAMES, size=SIZES, in_place=st.booleans())
    def make(self, name: int | None, size: int, in_place: bool) -> None:
        self.model.make(name, size, in_place)

    @precondition(lambda self: self.model.mine)
    @rule(data=st.data(), name=NAMES)
    def give(self, data: st.DataObject, name: int) -> None:
        key = self._mine(data)
        assert key is not None
        self.model.give(key, name)

    @rule(size=SIZES, name=NAMES)
    def give_array(self, size: int, name: int) -> None:
        self.model.give_array(size, name)

    @rule(data=st.data(), name=NAMES, meanwhile=st.sampled_from(process_model.MEANWHILE))
    def collect(self, data: st.DataObject, name: int, meanwhile: str) -> None:
        key = self._has(data, name)
        if key is not None:
            self.model.collect(key, name, meanwhile)

    @rule(data=st.data(), name=WITH_QUEUE)
    def publish(self, data: st.DataObject, name: int) -> None:
        key = self._has(data, name)
        if key is not None:
            self.model.publish(key, name)

    @rule(source=WITH_QUEUE, name=NAMES, keep=st.booleans())
    def fetch(self, source: int, name: int, keep: bool) -> None:
        if source != name and self.model.published[source]:
            self.model.fetch(source, name, keep)

    @rule(
        data=st.data(),
        name=ASKING,
        questions=st.integers(2, 3),
        between=st.sampled_from(process_model.BETWEEN),
        keep=st.booleans(),
    )
    def ask(self, data: st.DataObject, name: int, questions: int, between: str, keep: bool) -> None:
        processes = self.model.processes
        others = [other for other in processes if other != name]
        offers = [(other, key) for other in others for key in sorted(processes[other].has - processes[name].has)]
        if offers:
            self.model.ask(name, *data.draw(st.sampled_from(offers)), questions, between, keep)

    @rule(data=st.data(), name=NAMES)
    def drop(self, data: st.DataObject, name: int) -> None:
        key = self._has(data, name)
        if key is not None:
            self.model.drop(name, key)

    @precondition(lambda self: self.model.mine)
    @rule(data=st.data())
    def drop_mine(self, data: st.DataObject) -> None:
        key = self._mine(data)
        assert key is not None
        self.model.drop(None, key)

    @rule(data=st.data(), name=NAMES)
    def fill(self, data: st.DataObject, name: int) -> None:
        key = self._has(data, name)
        if key is not None:
            self.model.fill(name, key)

    @rule(name=NAMES)
    def kill(self, name: int) -> None:
        self.model.kill(name)

    @precondition(lambda self: self.model.mine)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        key = self._mine(data)
        assert key is not None
        self.model.fork(key)

    @invariant()
    def nobody_sees_anything_else(self) -> None:
        self.model.check()

    def teardown(self) -> None:
        self.model.close()


Lifetimes.TestCase.settings = settings(
    max_examples=6, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
TestLifetimes = pytest.mark.timeout(240)(Lifetimes.TestCase)


def random_step(model: ProcessModel, choose: random.Random) -> None:
    name = choose.randrange(PROCESSES)
    process = model.processes[name]
    has, mine = sorted(process.has), sorted(model.mine)
    if len(has) > 20:
        return model.drop(name, choose.choice(has))
    if len(mine) > 20:
        return model.drop(None, choose.choice(mine))
    size = choose.choice(process_model.SIZES)
    other = choose.choice([each for each in range(PROCESSES) if each != name])
    step = choose.choices(
        ["make", "give", "array", "collect", "publish", "fetch", "ask", "drop", "drop mine", "fill", "kill", "fork"],
        [4, 4, 1, 3, 3, 3, 2, 4, 4, 2, 0.3, 0.3],
    )[0]
    if step == "make":
        model.make(choose.choice([name, None]), size, choose.random() < 0.5)
    elif step == "array":
        model.give_array(size, name)
    elif step == "fetch" and model.published[other]:
        model.fetch(other, name, choose.random() < 0.7)
    elif step == "kill":
        model.kill(name)
    elif mine and step in ("give", "drop mine", "fork"):
        key = choose.choice(mine)
        if step == "give":
            model.give(key, name)
        elif step == "fork":
            model.fork(key)
        else:
            model.drop(None, key)
    elif has and step in ("collect", "publish", "ask", "drop", "fill"):
        key = choose.choice(has)
        if step == "fill":
            model.fill(name, key)
        elif step == "ask":
            if key not in model.processes[other].has:
                between = choose.choice(process_model.BETWEEN)
                model.ask(other, name, key, choose.randint(2, 3), between, choose.random() < 0.5)
        elif step == "collect":
            model.collect(key, name, choose.choice(process_model.MEANWHILE))
        elif step == "publish":
            if name != model.without_queue:
                model.publish(key, name)
        else:
            model.drop(name, key)
    return None


def run_at_random(seconds: float, seed: int) -> Counter[str]:
    choose = random.Random(seed)
    model = ProcessModel(PROCESSES)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        random_step(model, choose)
        model.check()
    model.close()
    return model.done


def test_a_short_random_run() -> None:
    done = run_at_random(8, seed=1)
    assert done["make"]
    assert done["fetch"]


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_a_long_random_run() -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    done = run_at_random(float(os.environ.get("TORCHWQ_SOAK_SECONDS", "600")), seed)
    print(sum(done.values()), "steps:", dict(done))
