"""Bugs of well-known libraries that show only where two parts of the agent meet; see `scripts/check_mutations.py`."""

from __future__ import annotations

import numpy as np
import torch

from llmrl.dqn.agent import DQNAgent
from llmrl.dqn.config import DQNConfig

NUM_ACTIONS = 4


def make_agent(**changes):
    settings = {"hidden_sizes": (8,), "batch_size": 16, "learning_starts": 16, "replay_capacity": 400, "seed": 1}
    return DQNAgent(DQNConfig(**{**settings, **changes}), num_envs=2, obs_shape=(3,), num_actions=NUM_ACTIONS)


def play(agent, num_steps):
    """Steps with random observations and rewards; returns [T, E] whether the action was the greedy one."""
    rng = np.random.default_rng(0)
    mask, no = np.ones((2, NUM_ACTIONS), dtype=bool), np.zeros(2, dtype=bool)
    greedy = []
    for _ in range(num_steps):
        obs, next_obs = rng.normal(size=(2, 2, 3)).astype(np.float32)
        action = agent.act(obs, mask, explore=True)
        greedy.append(action == agent.act(obs, mask, explore=False))
        agent.observe(obs, action, rng.normal(size=2), no, no, next_obs, mask, mask)
    return np.array(greedy)


def test_an_agent_explores_as_its_schedule_says_while_it_steps():
    agent = make_agent(epsilon_start=1.0, epsilon_end=0.0, epsilon_decay_steps=200)
    greedy = play(agent, 200)  # two environments: 400 steps
    assert 0.1 < greedy[:20].mean() < 0.6
    assert greedy[100:].all()


def test_the_priority_of_a_transition_is_the_size_of_its_td_error():
    agent = make_agent(sampling="prioritized", gamma=0.0, n_step=1)
    play(agent, 30)
    batch = agent.replay.sample(16, np.random.default_rng(0), n_step=1, gamma=0.0)
    value = agent.q_values(batch.obs)[np.arange(16), batch.action]
    priority = agent.learner.update(batch).priorities()
    assert np.allclose(priority, np.abs(batch.reward - value), rtol=1e-5)
    assert priority.max() > 1.5 > 0.5 > priority.min()  # far enough from one to tell a square apart


def test_an_agent_hands_its_td_errors_to_the_replay():
    agent = make_agent(sampling="prioritized", priority_exponent=1.0, gamma=0.0, n_step=1, learning_rate=1e-9)
    play(agent, 30)
    for _ in agent.learn_from_log(100):  # the rate is too low to change anything
        pass
    batch = agent.replay.sample(20_000, np.random.default_rng(0), n_step=1, gamma=0.0)
    slots, counts = np.unique(batch.index, return_counts=True)
    first = [int(np.flatnonzero(batch.index == slot)[0]) for slot in slots]
    value = agent.q_values(batch.obs[first])[np.arange(len(first)), batch.action[first]]
    error = np.abs(batch.reward[first] - value)
    assert np.allclose(counts / counts.sum(), error / error.sum(), atol=2e-4 + 1 / 20_000)


def test_an_agent_weighs_its_losses_by_importance():
    agent = make_agent(sampling="prioritized", importance_exponent=0.5)
    play(agent, 30)
    seen = []
    update = agent.learner.update
    agent.learner.update = lambda batch: (seen.append(batch.weight), update(batch))[1]
    for _ in agent.learn_from_log(3):
        pass
    assert seen[0].tolist() == [1.0] * 16  # nothing has a priority of its own yet
    assert seen[2].min() < 0.99 < seen[2].max() == 1.0


def test_agents_leave_the_global_generators_alone():
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    agent = make_agent(noisy=True, exploration_max_repeat=4)
    play(agent, 30)
    agent.learn()
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
