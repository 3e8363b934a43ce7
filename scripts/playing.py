"""Training an agent on an environment, and greedy episodes afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from llmrl.dqn.collector import Collector

EVALUATION_SEED = 1_000_000  # evaluation episodes never share a seed with training


def train(agent: Any, env: Any, steps: int, seed: int) -> float:
    """Collects and learns for so many environment steps; returns environment steps per second."""
    collector = Collector(env, agent, seed=seed)
    start = time.perf_counter()
    while collector.env_steps < steps:
        collector.step()
        agent.learn()
    return steps / (time.perf_counter() - start)


def evaluate(agent: Any, make: Callable[[], gymnasium.Env[Any, Any]], num_episodes: int, seed: int) -> NDArray[Any]:
    """Returns of greedy episodes, all played at once."""
    envs = [make() for _ in range(num_episodes)]
    first = [env.reset(seed=EVALUATION_SEED + seed * num_episodes + i) for i, env in enumerate(envs)]
    obs = [item[0] for item in first]
    masks = [item[1].get("action_mask") for item in first]
    returns, alive = np.zeros(num_episodes), list(range(num_episodes))
    while alive:
        full = np.ones(int(envs[0].action_space.n), dtype=np.bool_)  # type: ignore[attr-defined]
        mask = np.stack([full if masks[i] is None else np.asarray(masks[i], dtype=np.bool_) for i in alive])
        actions = agent.act(np.stack([np.asarray(obs[i]) for i in alive]), mask, explore=False)
        still = []
        for i, action in zip(alive, actions, strict=True):
            obs[i], reward, terminated, truncated, info = envs[i].step(int(action))
            masks[i] = info.get("action_mask")
            returns[i] += float(reward)
            if not (terminated or truncated):
                still.append(i)
        alive = still
    return returns
