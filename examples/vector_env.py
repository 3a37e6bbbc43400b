"""A gymnasium vector environment whose simulators run in the workers of a torchwq.WorkerGroup.

    pip install gymnasium
    python examples/vector_env.py

Each worker has a share of the simulators, and their rows of a shared tensor of observations; a step of all of them
costs one small message each way. Where steps are short, as many workers as cores are best: more would only wake more
processes. Where they are long, or differ much, take a worker for each simulator. The script takes the same steps with
gymnasium's AsyncVectorEnv, compares what comes, and says how fast both are.
"""

import argparse
import functools
import itertools
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

import torchwq


class Simulator:
    """One simulator, which leaves its observations in the one place of ``row``."""

    def __init__(self, make: Callable[[], Any], row: Any) -> None:
        self.env, self._row, self._is_over = make(), row, False

    def reset(self, options: dict[str, Any]) -> Any:
        self._row[0], info = self.env.reset(**options)
        self._is_over = False
        return 0.0, False, False, info

    def step(self, action: Any) -> Any:
        if self._is_over:  # the step after the end of an episode begins the next one
            return self.reset({})
        self._row[0], reward, terminated, truncated, info = self.env.step(action)
        self._is_over = terminated or truncated
        return float(reward), bool(terminated), bool(truncated), info


def simulate(q: torchwq.WorkQueue, makers: Sequence[Any], observations: torch.Tensor, share: int, mapid: int) -> None:
    """A worker: has ``share`` of the simulators, takes a value for each of them, and answers with what they give."""
    first, places = mapid * share, observations.numpy()
    simulators = [
        Simulator(make, places[place : place + 1]) for place, make in enumerate(makers[first : first + share], first)
    ]
    for kind, values in q:
        calls = [simulator.step if kind == "step" else simulator.reset for simulator in simulators]
        q.write([call(value) for call, value in zip(calls, values, strict=True)])
    for simulator in simulators:
        simulator.env.close()


class TorchwqVectorEnv(VectorEnv[Any, Any, Any]):
    """The simulators that ``makers`` make, in workers.

    Args:
        makers: a function for each simulator. They travel with what they capture.
        workers: how many workers share them, or a few less; None: as many as there are cores.
        backend: of the workers.
    """

    def __init__(
        self, makers: Sequence[Callable[[], Any]], workers: int | None = None, backend: str = "process"
    ) -> None:
        self.num_envs = len(makers)
        self._share = -(-self.num_envs // (workers or len(os.sched_getaffinity(0))))
        one = makers[0]()
        self.single_observation_space, self.single_action_space = one.observation_space, one.action_space
        self.observation_space = batch_space(one.observation_space, self.num_envs)
        self.action_space = batch_space(one.action_space, self.num_envs)
        self.metadata = {**one.metadata, "autoreset_mode": AutoresetMode.NEXT_STEP}
        self.spec = one.spec
        one.close()
        space = self.single_observation_space
        if not isinstance(space, Box | Discrete | MultiDiscrete | MultiBinary):
            raise TypeError(f"observations must be arrays of one size, to share them as a tensor: not {space}")
        dtype = torch.from_numpy(np.empty(0, space.dtype)).dtype
        self._observations = torchwq.zeros(self.num_envs, *space.shape, dtype=dtype)
        arguments = list(makers), self._observations, self._share
        number = -(-self.num_envs // self._share)
        self._group = torchwq.WorkerGroup(number, simulate, *arguments, backend=backend, upvalues=True)

    def _ask(self, kind: str, values: Sequence[Any]) -> Any:
        """Give each simulator its value; returns what they give, as four columns."""
        for index in range(len(self._group)):
            self._group.send(index, (kind, values[index * self._share : (index + 1) * self._share]))
        return zip(*itertools.chain.from_iterable(self._group.gather()), strict=True)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        seeds = [None if seed is None else seed + index for index in range(self.num_envs)]
        *_, infos = self._ask("reset", [{"seed": each, "options": options} for each in seeds])
        return self._observations.numpy().copy(), self._merged(infos)

    def step(self, actions: Any) -> Any:
        values = actions.tolist() if actions.ndim == 1 else actions  # numbers as they are, or a row for each
        rewards, terminated, truncated, infos = self._ask("step", values)
        return (
            self._observations.numpy().copy(),
            np.array(rewards),
            np.array(terminated),
            np.array(truncated),
            self._merged(infos),
        )

    def _merged(self, infos: Sequence[dict[str, Any]]) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for index, info in enumerate(infos):
            if info:
                merged = self._add_info(merged, info, index)
        return merged

    def close_extras(self, **_: Any) -> None:
        self._group.terminate()


def steps(env: Any, count: int) -> list[Any]:
    """What so many steps with random actions give, always the same."""
    env.action_space.seed(1)
    found = [(env.reset(seed=1)[0].copy(),)]
    for _ in range(count):
        observations, rewards, terminated, truncated, _ = env.step(env.action_space.sample())
        found.append((observations.copy(), rewards.copy(), terminated.copy(), truncated.copy()))
    return found


def same(left: Any, right: Any) -> bool:
    return all(
        np.array_equal(one, other)
        for found, expected in zip(left, right, strict=True)
        for one, other in zip(found, expected, strict=True)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Step simulators in workers.")
    parser.add_argument("--env", default="CartPole-v1", help="the simulator, as gymnasium.make knows it")
    parser.add_argument("--envs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--workers", type=int, help="how many share the simulators; else as many as there are cores")
    arguments = parser.parse_args()
    makers = [functools.partial(gymnasium.make, arguments.env)] * arguments.envs
    envs = {"torchwq": TorchwqVectorEnv(makers, arguments.workers), "gymnasium": AsyncVectorEnv(makers)}
    results = {name: steps(env, 200) for name, env in envs.items()}
    print(f"the same observations and rewards: {same(*results.values())}")
    rates: dict[str, list[float]] = {name: [] for name in envs}
    for _ in range(3):  # in turns
        for name, env in envs.items():
            began = time.perf_counter()
            steps(env, arguments.steps)
            rates[name].append(arguments.envs * arguments.steps / (time.perf_counter() - began))
    for name, each in rates.items():
        print(f"{name:10} {sorted(each)[1]:9,.0f} steps/s")
    ratios = sorted(one / other for one, other in zip(rates["torchwq"], rates["gymnasium"], strict=True))
    print(f"torchwq to gymnasium: {ratios[1]:.2f} ×")
    for env in envs.values():
        env.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
