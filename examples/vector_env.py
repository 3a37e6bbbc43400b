"""A gymnasium vector environment whose simulators are the workers of a torchwq.WorkerGroup.

    pip install gymnasium
    python examples/vector_env.py

Each worker has one simulator and its row of a shared tensor of observations; a step costs one small message each way.
The script takes the same steps with gymnasium's AsyncVectorEnv, compares what comes, and says how fast both are.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

import torchwq


def simulate(q: torchwq.WorkQueue, makers: Sequence[Callable[[], Any]], observations: torch.Tensor, mapid: int) -> None:
    """A worker: steps its simulator, and leaves the observation in its row."""
    env, row = makers[mapid](), observations[mapid].numpy()
    is_over = False
    for kind, value in q:
        if kind == "step" and not is_over:
            row[...], reward, terminated, truncated, info = env.step(value)
            is_over = terminated or truncated
            q.write((float(reward), bool(terminated), bool(truncated), info))
        else:  # also the step after the end of an episode
            row[...], info = env.reset(**(value if kind == "reset" else {}))
            is_over = False
            q.write((0.0, False, False, info))
    env.close()


class TorchwqVectorEnv(VectorEnv[Any, Any, Any]):
    """The simulators that ``makers`` make, each in a worker of its own.

    Args:
        makers: a function for each simulator. They travel with what they capture.
        backend: of the workers.
    """

    def __init__(self, makers: Sequence[Callable[[], Any]], backend: str = "process") -> None:
        self.num_envs = len(makers)
        one = makers[0]()
        self.single_observation_space, self.single_action_space = one.observation_space, one.action_space
        self.observation_space = batch_space(one.observation_space, self.num_envs)
        self.action_space = batch_space(one.action_space, self.num_envs)
        self.metadata = {**one.metadata, "autoreset_mode": AutoresetMode.NEXT_STEP}
        self.spec = one.spec
        one.close()
        space = self.single_observation_space
        dtype = torch.from_numpy(np.empty(0, space.dtype)).dtype
        self._observations = torchwq.zeros(self.num_envs, *space.shape, dtype=dtype)
        self._group = torchwq.WorkerGroup(
            self.num_envs, simulate, list(makers), self._observations, backend=backend, upvalues=True
        )

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        for index in range(self.num_envs):
            own = None if seed is None else seed + index
            self._group.send(index, ("reset", {"seed": own, "options": options}))
        *_, infos = zip(*self._group.gather(), strict=True)
        return self._observations.numpy().copy(), self._merged(infos)

    def step(self, actions: Any) -> Any:
        for index, action in enumerate(actions.tolist()):
            self._group.send(index, ("step", action))
        rewards, terminated, truncated, infos = zip(*self._group.gather(), strict=True)
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
    """What so many steps with repeating actions give."""
    found = [env.reset(seed=1)[0]]
    actions = itertools.cycle([np.arange(env.num_envs) % 2, (np.arange(env.num_envs) + 1) % 2])
    for _, action in zip(range(count), actions, strict=False):
        observations, rewards, terminated, truncated, _ = env.step(action)
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
    parser.add_argument("--envs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args()
    makers = [lambda: gymnasium.make("CartPole-v1")] * arguments.envs
    envs = {"torchwq": TorchwqVectorEnv(makers), "gymnasium": AsyncVectorEnv(makers)}
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
