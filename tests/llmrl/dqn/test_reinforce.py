"""REINFORCE: returns, masks, bootstrap, resume, and a problem it must solve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmrl.dqn.config import DQNConfig
from llmrl.dqn.network_file import load_network
from llmrl.dqn.reinforce import ReinforceAgent, discounted_returns

MASK = np.ones((2, 3), dtype=np.bool_)


def agent(**changes: Any) -> ReinforceAgent:
    values = {"hidden_sizes": (16,), "learning_rate": 0.01, "batch_size": 20, "gamma": 0.9, **changes}
    return ReinforceAgent(DQNConfig(**values), num_envs=2, obs_shape=(2,), num_actions=3)


def play(learning: ReinforceAgent, num_steps: int, seed: int = 0, mask: np.ndarray = MASK) -> None:
    """Three-step episodes in which the action that the observation names earns 1."""
    rng = np.random.default_rng(seed)
    for step in range(num_steps):
        best = rng.integers(2, size=2)
        obs = np.eye(2, dtype=np.float32)[best]
        action = learning.act(obs, mask, explore=True)
        ends = np.full(2, step % 3 == 2)
        learning.observe(obs, action, (action == best).astype(float), ends, ~ends & False, obs, mask, mask)
        learning.learn()


def test_returns_by_hand() -> None:
    np.testing.assert_allclose(discounted_returns(np.array([1.0, 0.0, 2.0]), 0.5, 0.0), [1.5, 1.0, 2.0])
    np.testing.assert_allclose(discounted_returns(np.array([1.0, 0.0, 2.0]), 0.5, 8.0), [2.5, 3.0, 6.0])


def test_it_learns_which_action_an_observation_names() -> None:
    learning = agent()
    play(learning, 2000)
    assert learning.act(np.eye(2, dtype=np.float32), MASK, explore=False).tolist() == [0, 1]


def test_it_keeps_to_the_mask() -> None:
    learning, mask = agent(), np.array([[True, False, False], [False, True, True]])
    for _ in range(50):
        action = learning.act(np.eye(2, dtype=np.float32), mask, explore=True)
        assert mask[np.arange(2), action].all()
    play(learning, 60, mask=mask)
    assert torch.isfinite(learning.parameters.values).all()


def test_draws_follow_the_policy() -> None:
    learning = agent()
    obs = np.zeros((2, 2), dtype=np.float32)
    counts = np.zeros(3)
    for _ in range(3000):
        counts += np.bincount(learning.act(obs, MASK, explore=True), minlength=3)
    expected = torch.softmax(torch.from_numpy(learning.q_values(obs)[0]), dim=0).numpy()
    np.testing.assert_allclose(counts / counts.sum(), expected, atol=0.03)


@pytest.mark.parametrize("truncated", [False, True])
def test_a_truncated_episode_is_continued_by_the_baseline(truncated: bool) -> None:
    learning = agent()
    obs = np.ones((2, 2), dtype=np.float32)
    ends = np.full(2, True)
    learning.observe(obs, np.zeros(2, dtype=np.int64), np.ones(2), ends & (not truncated), ends & truncated, obs)
    value = float(learning.value(torch.ones(1, 2)).detach())
    expected = 1.0 + (0.9 * value if truncated else 0.0)
    assert learning._finished[0]["target"][0] == pytest.approx(expected)


def test_a_saved_agent_goes_on_bit_for_bit(tmp_path: Path) -> None:
    learning, other = agent(), agent(seed=3)
    play(learning, 37)
    learning.save(tmp_path)
    other.load(tmp_path)
    for each in (learning, other):
        play(each, 50, seed=1)
    assert torch.equal(learning.parameters.values, other.parameters.values)
    assert learning.learner_steps == other.learner_steps
    learning.export_network(tmp_path / "network.safetensors")
    obs = np.eye(2, dtype=np.float32)
    exported = load_network(tmp_path / "network.safetensors")(torch.from_numpy(obs))
    np.testing.assert_array_equal(exported.detach().numpy(), learning.q_values(obs))
