"""Q-learning on a table against values that are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from llmrl_envs.grid_world import optimal_q

from llmrl.dqn.config import DQNConfig
from llmrl.dqn.tabular import TabularAgent


def agent(**changes: Any) -> TabularAgent:
    values = {"gamma": 0.9, "epsilon_end": 1.0, **changes}
    return TabularAgent(DQNConfig(**values), num_envs=1, obs_shape=(9,), num_actions=4)


def walk(learning: TabularAgent, num_steps: int, seed: int = 0) -> None:
    env = gymnasium.make("llmrl_envs:llmrl/GridWorld-v0")
    mask = np.ones((1, 4), dtype=np.bool_)
    rng = np.random.default_rng(seed)
    starts = [1, 2, 3, 4, 5, 7, 9]  # state 9 can be reached from no other
    obs, _ = env.reset(seed=seed)
    for _ in range(num_steps):
        action = learning.act(obs[None], mask, explore=True)
        next_obs, reward, terminated, truncated, _ = env.step(int(action[0]))
        ends = np.array([terminated]), np.array([truncated])
        learning.observe(obs[None], action, np.array([reward]), *ends, next_obs[None])
        learning.learn()
        ended = terminated or truncated
        obs = env.reset(options={"state": int(rng.choice(starts))})[0] if ended else next_obs


def test_the_table_reaches_the_optimal_values_of_the_grid() -> None:
    learning = agent()
    walk(learning, 20_000)
    states = [state for state in range(9) if state + 1 not in (6, 8)]
    q = learning.q_values(np.eye(9, dtype=np.float32)[states])
    assert np.abs(q - optimal_q()[states]).max() < 1e-3


def one_step(learning: TabularAgent, *, terminated: bool, truncated: bool) -> float:
    first, second = np.eye(9, dtype=np.float32)[[0]], np.eye(9, dtype=np.float32)[[1]]
    learning.table.values[learning.table.row(learning.states(second)[0])] = [1.0, 5.0, 2.0, 0.0]
    next_mask = np.array([[True, False, True, True]])
    ends = np.array([terminated]), np.array([truncated])
    learning.observe(first, np.array([2]), np.array([3.0]), *ends, second, None, next_mask)
    learning.learn()
    return float(learning.q_values(first)[0, 2])


def test_only_termination_stops_the_bootstrap_and_masks_are_kept() -> None:
    assert one_step(agent(), terminated=False, truncated=False) == pytest.approx(3.0 + 0.9 * 2.0)
    assert one_step(agent(), terminated=False, truncated=True) == pytest.approx(3.0 + 0.9 * 2.0)
    assert one_step(agent(), terminated=True, truncated=False) == pytest.approx(3.0)


def test_a_saved_table_goes_on_exactly(tmp_path: Path) -> None:
    learning, other = agent(epsilon_end=0.3), agent(epsilon_end=0.3, seed=5)
    walk(learning, 300)
    learning.save(tmp_path)
    other.load(tmp_path)
    for each in (learning, other):
        walk(each, 300, seed=1)
    grid = np.eye(9, dtype=np.float32)
    np.testing.assert_array_equal(learning.q_values(grid), other.q_values(grid))
    assert (other.env_steps, other.learner_steps) == (600, 600)


def test_a_table_of_another_shape_is_refused(tmp_path: Path) -> None:
    learning = agent()
    walk(learning, 10)
    learning.save(tmp_path)
    other = TabularAgent(DQNConfig(), num_envs=1, obs_shape=(9,), num_actions=3)
    with pytest.raises(ValueError, match="expected a table of widths"):
        other.load(tmp_path)
    with pytest.raises(ValueError, match="expected shape"):
        learning.q_values(np.zeros((1, 8), dtype=np.float32))
