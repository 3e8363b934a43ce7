"""The other side of `bench_dqn.py`: one measurement of one library, printed as JSON; runs with that library's Python.

    python scripts/dqn_peers.py sb3_steps 20000

Prints {"cpu_seconds", "count", "version"}. CPU seconds of the process are counted, so that a busy machine changes
little. This file imports nothing of this project.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from resource import RUSAGE_CHILDREN, getrusage
from typing import Any

import numpy as np

EPSILON = 0.29  # the mean over the published run, which goes from 1 to 0.05 in its first half and stays there


def report(count: int, cpu_seconds: float, library: str) -> None:
    """Prints the measurement."""
    print(json.dumps({"cpu_seconds": cpu_seconds, "count": count, "version": library}))


def timed(run: Callable[[], Any]) -> float:
    """CPU seconds of a call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def sb3_steps(count: int) -> None:
    """Environment steps of stable-baselines3 with CleanRL's settings, after learning has started."""
    import torch
    from stable_baselines3 import DQN

    torch.set_num_threads(1)
    model = DQN(
        "MlpPolicy",
        "CartPole-v1",
        learning_rate=2.5e-4,
        buffer_size=10_000,
        learning_starts=10_000,
        batch_size=128,
        gamma=0.99,
        train_freq=10,
        gradient_steps=1,
        target_update_interval=500,
        exploration_initial_eps=EPSILON,
        exploration_final_eps=EPSILON,
        policy_kwargs={"net_arch": [120, 84]},
        device="cpu",
        seed=0,
    )
    model.learn(10_500)
    seconds = timed(lambda: model.learn(count, reset_num_timesteps=False))
    report(count, seconds, version("stable-baselines3"))


def sb3_learner(count: int) -> None:
    """Gradient steps of stable-baselines3: 40 observations, two layers of 128, batch 128, sampling included."""
    import gymnasium
    import torch
    from stable_baselines3 import DQN
    from stable_baselines3.common.logger import configure

    torch.set_num_threads(1)

    class Still(gymnasium.Env[Any, Any]):
        observation_space = gymnasium.spaces.Box(-10, 10, (40,))
        action_space = gymnasium.spaces.Discrete(9)

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            return np.zeros(40, dtype=np.float32), {}

    model = DQN("MlpPolicy", Still(), batch_size=128, policy_kwargs={"net_arch": [128, 128]}, device="cpu", seed=0)
    model.set_logger(configure(None, []))
    rng = np.random.default_rng(0)
    for _ in range(10_000):
        obs, next_obs = rng.normal(size=(2, 1, 40)).astype(np.float32)
        action, reward = rng.integers(9, size=(1, 1)), rng.normal(size=1)
        model.replay_buffer.add(obs, next_obs, action, reward, rng.random(1) < 0.02, [{}])  # type: ignore[union-attr]
    model.train(gradient_steps=100, batch_size=128)

    def run() -> None:
        for _ in range(count):
            model.train(gradient_steps=1, batch_size=128)

    report(count, timed(run), version("stable-baselines3"))


def cleanrl_steps(count: int, directory: str) -> None:
    """Environment steps of CleanRL's `dqn.py`, unmodified: a long run less a short one."""

    def run(total: int) -> float:
        before = getrusage(RUSAGE_CHILDREN)
        options = ["--no-cuda", "--start-e", str(EPSILON), "--end-e", str(EPSILON), "--total-timesteps", str(total)]
        command = [sys.executable, "cleanrl/dqn.py", *options]
        subprocess.run(command, cwd=directory, check=True, capture_output=True, env=_with_path(directory))
        after = getrusage(RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    short = run(10_500)
    report(count, run(10_500 + count) - short, "dqn.py")


def _with_path(directory: str) -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": directory}


if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    functions: dict[str, Callable[..., None]] = {
        function.__name__: function for function in (sb3_steps, sb3_learner, cleanrl_steps)
    }
    functions[name](*(int(value) if value.isdigit() else value for value in arguments))
