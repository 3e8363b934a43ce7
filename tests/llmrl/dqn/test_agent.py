"""The DQN agent as a training loop meets it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmrl.dqn.acting import greedy_actions, random_actions
from llmrl.dqn.agent import DQNAgent
from llmrl.dqn.config import DQNConfig
from llmrl.dqn.interface import Agent
from llmrl.dqn.network_file import load_network
from llmrl.dqn.reinforce import ReinforceAgent
from llmrl.dqn.tabular import TabularAgent

NUM_ENVS, NUM_OBS, NUM_ACTIONS = 2, 3, 4
FAST: dict[str, Any] = {
    "hidden_sizes": (16,), "batch_size": 8, "learning_starts": 10, "replay_capacity": 200, "epsilon_decay_steps": 50
}  # fmt: skip
VARIANTS: list[dict[str, Any]] = [
    {},
    {"sampling": "prioritized"},
    {"sampling": "lap"},
    {"noisy": True, "normalize_obs": True, "normalize_obs_steps": 40},
    {"head": "quantile", "num_quantiles": 4, "replay_ratio": 2.5, "reset_period": 30},
    {"head": "categorical", "num_atoms": 5, "epsilon_schedule": "ladder"},
    {"munchausen": True, "branches": (2, 2), "exploration_max_repeat": 5},
    {"reward_clip": 1.0, "reward_scale": 3.0, "replay_ratio": 0.3, "optimizer": "rmsprop"},
    {"default_action": 2, "default_action_margin": 0.1, "epsilon_schedule": "exponential"},
]


def agent(**changes: Any) -> DQNAgent:
    config = DQNConfig(**{**FAST, **changes})
    return DQNAgent(config, num_envs=NUM_ENVS, obs_shape=(NUM_OBS,), num_actions=NUM_ACTIONS)


class World:
    """A stream of random observations, masks and rewards whose course depends on the actions."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.obs, self.mask = self._draw()

    def _draw(self) -> tuple[np.ndarray, np.ndarray]:
        mask = self.rng.random((NUM_ENVS, NUM_ACTIONS)) < 0.7
        mask[:, 0] = True
        return self.rng.normal(size=(NUM_ENVS, NUM_OBS)).astype(np.float32), mask

    def play(self, learning: Agent, num_steps: int) -> list[tuple[list[int], dict[str, float] | None]]:
        trace = []
        for _ in range(num_steps):
            action = learning.act(self.obs, self.mask, explore=True)
            next_obs, next_mask = self._draw()
            terminated = self.rng.random(NUM_ENVS) < 0.1
            truncated = (self.rng.random(NUM_ENVS) < 0.1) & ~terminated
            reward = self.obs[:, 0] * action
            learning.observe(self.obs, action, reward, terminated, truncated, next_obs, self.mask, next_mask)
            trace.append((action.tolist(), learning.learn()))
            self.obs, self.mask = next_obs, next_mask
        return trace


@pytest.mark.parametrize("changes", VARIANTS)
def test_a_resumed_agent_goes_on_bit_for_bit(tmp_path: Path, changes: dict[str, Any]) -> None:
    learning = agent(**changes)
    World(0).play(learning, 60)
    learning.save(tmp_path)
    resumed = agent(seed=7, **changes)
    resumed.load(tmp_path)
    first, second = World(1).play(learning, 60), World(1).play(resumed, 60)
    assert first == second
    assert any(metrics for _, metrics in first)
    tensors = learning.learner.tensors(), resumed.learner.tensors()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    assert (learning.env_steps, learning.learner_steps) == (resumed.env_steps, resumed.learner_steps)


@pytest.mark.parametrize("changes", VARIANTS)
def test_the_seed_decides_everything(changes: dict[str, Any]) -> None:
    traces = [World(0).play(agent(seed=seed, **changes), 60) for seed in (3, 3, 4)]
    assert traces[0] == traces[1]
    assert traces[0] != traces[2]


@pytest.mark.parametrize("kind", [DQNAgent, TabularAgent, ReinforceAgent])
def test_no_agent_takes_an_action_that_is_not_available(kind: Any) -> None:
    config = DQNConfig(**FAST)
    learning = kind(config, num_envs=NUM_ENVS, obs_shape=(NUM_OBS,), num_actions=NUM_ACTIONS)
    world = World(0)
    world.play(learning, 80)  # the replay buffer refuses masked actions as well
    for _ in range(50):
        obs, mask = world._draw()
        for explore in (False, True):
            assert mask[np.arange(NUM_ENVS), learning.act(obs, mask, explore=explore)].all()
    with pytest.raises(ValueError, match="expected an available action in every environment, got none in \\[1\\]"):
        learning.act(obs, np.array([[True] * 4, [False] * 4]), explore=False)


def test_ranks_share_the_network_and_nothing_else() -> None:
    config = DQNConfig(**FAST)
    first, second = (
        DQNAgent(config, num_envs=NUM_ENVS, obs_shape=(NUM_OBS,), num_actions=NUM_ACTIONS, rank=rank) for rank in (0, 1)
    )
    assert torch.equal(first.learner.parameters.values, second.learner.parameters.values)
    actions = [[action for action, _ in World(0).play(each, 5)] for each in (first, second)]
    assert actions[0] != actions[1]


def test_acting_noise_moves_nothing_that_ranks_share() -> None:
    """Resets draw from the learner's generator, which must stand at the same place on every rank."""
    learning = agent(noisy=True, epsilon_start=0.0, epsilon_end=0.0)
    obs, mask = World(0)._draw()
    before = learning.learner.generator.get_state()
    actions = {tuple(learning.act(obs, mask, explore=True).tolist()) for _ in range(50)}
    assert len(actions) > 1, "the noise explores"
    assert torch.equal(learning.learner.generator.get_state(), before)


@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize("changes", VARIANTS[:5])
def test_agents_that_learned_together_go_on_in_another_number(
    tmp_path: Path, num_processes: int, changes: dict[str, Any]
) -> None:
    old = [agent(**changes), agent(seed=1, **changes)]
    for rank, learning in enumerate(old):
        World(rank).play(learning, 60)
        learning.save(tmp_path / str(rank))
    new = [
        agent(replay_capacity=300, **{k: v for k, v in changes.items() if k != "replay_capacity"})
        for _ in range(num_processes)
    ]
    for rank, learning in enumerate(new):
        learning.load_shares([tmp_path / "0", tmp_path / "1"], rank=rank, num_processes=num_processes)
        tensors = old[0].learner.tensors(), learning.learner.tensors()
        assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
        assert (learning.env_steps, learning.learner_steps) == (old[0].env_steps, old[0].learner_steps)
        assert learning._scheduled_updates == old[0]._scheduled_updates
    assert sorted(rewards(new)) == sorted(rewards(old)), "nothing of the experience is lost or doubled"
    sizes = [len(learning.replay) for learning in new]
    assert max(sizes) - min(sizes) < 40
    counts = sum(learning._statistics.count for learning in new)
    assert counts == sum(learning._statistics.count for learning in old)


def rewards(agents: list[DQNAgent]) -> list[float]:
    """Rewards of all that is stored."""
    return [float(r) for each in agents for r in each.replay.rows.records["reward"][each.replay.rows.live_slots()]]


def test_greedy_acting_does_not_depend_on_or_move_any_generator() -> None:
    learning = agent(noisy=True)
    World(0).play(learning, 30)
    obs, mask = World(1)._draw()
    state = json.dumps(learning.exploration.state_dict(), default=str)
    actions = [learning.act(obs, mask, explore=False).tolist() for _ in range(3)]
    assert actions[0] == actions[1] == actions[2]
    assert json.dumps(learning.exploration.state_dict(), default=str) == state
    assert torch.equal(torch.tensor(actions[0]), torch.tensor(greedy_actions(learning.q_values(obs), mask)))


@pytest.mark.parametrize("ratio", [0.25, 1.0, 3.0])
def test_updates_keep_to_the_replay_ratio(ratio: float) -> None:
    learning = agent(replay_ratio=ratio)
    World(0).play(learning, 100)
    assert learning.env_steps == 200
    assert learning.learner_steps == int((200 - 10) * ratio) + 1


def test_nothing_is_learned_before_learning_starts() -> None:
    learning = agent(learning_starts=50)
    trace = World(0).play(learning, 30)
    first = next(index for index, (_, metrics) in enumerate(trace) if metrics is not None)
    assert first == 24  # two environments: 50 steps after the 25th


def test_epsilon_moves_from_its_start_to_its_end() -> None:
    learning = agent(epsilon_start=0.8, epsilon_end=0.2, epsilon_decay_steps=100)
    seen = []
    for steps in (0, 50, 100, 1000):
        learning.env_steps = steps
        seen.append(learning.epsilon)
    np.testing.assert_allclose(seen, [0.8, 0.5, 0.2, 0.2])


def test_rewards_are_stored_as_they_are_and_learned_from_as_asked() -> None:
    learning = agent(reward_scale=10.0, reward_shift=-1.0, reward_clip=5.0, n_step=1, gamma=0.5)
    obs, ends = np.zeros((2, NUM_OBS), dtype=np.float32), np.array([True, True])
    learning.observe(obs, np.zeros(2, dtype=np.int64), np.array([0.3, 3.0]), ends, ~ends, obs)
    assert set(learning._sample().reward.tolist()) == {2.0, 5.0}
    plain = learning.replay.sample(50, np.random.default_rng(0), n_step=1, gamma=0.5).reward
    np.testing.assert_allclose(sorted(set(plain.tolist())), [0.3, 3.0], rtol=1e-6)


def test_the_default_action_is_left_only_for_something_clearly_better() -> None:
    q = np.array([[0.0, 0.5, 0.45], [0.0, 0.6, 0.4], [0.9, 0.6, 0.4]], dtype=np.float32)
    assert greedy_actions(q, default_action=2, margin=0.1).tolist() == [2, 1, 0]
    assert greedy_actions(q, default_action=2).tolist() == [1, 1, 0]
    masked = np.array([[True, True, False]] * 3)
    assert greedy_actions(q, masked, default_action=2, margin=10.0).tolist() == [1, 1, 0]


def test_ties_go_to_the_default_action() -> None:
    assert greedy_actions(np.zeros((1, 3), dtype=np.float32), default_action=2).tolist() == [2]


def test_every_action_can_have_a_margin_of_its_own():
    q = np.array([[0.5, 0.3, 0.0], [0.9, 0.3, 0.0], [0.5, 0.1, 0.0], [0.9, 0.95, 0.1]], dtype=np.float32)
    margins = (0.6, 0.2, 0.0)
    assert greedy_actions(q, default_action=2, margin=margins).tolist() == [1, 0, 2, 1]
    assert greedy_actions(q, default_action=2, margin=(0.2, 0.2, 0.0)).tolist() == [
        *greedy_actions(q, default_action=2, margin=0.2)
    ]
    without = np.array([[True, False, True]] * 4)
    assert greedy_actions(q, without, default_action=2, margin=margins).tolist() == [2, 0, 2, 0]
    no_default = np.array([[True, True, False]])
    assert greedy_actions(q[:1], no_default, default_action=2, margin=margins).tolist() == [1]


@pytest.mark.parametrize(
    "changes",
    [
        {"default_action": 1, "default_action_margin": (0.1, 0.2, 0.3)},
        {"default_action": None, "default_action_margin": (0.1, 0.0, 0.3)},
        {"default_action": 1, "default_action_margin": (0.1, 0.0, -0.3)},
        {"default_action": 1, "default_action_margin": -1.0},
    ],
    ids=str,
)
def test_margins_that_mean_nothing_are_refused(changes):
    with pytest.raises(ValueError, match="default_action_margin"):
        DQNConfig(**changes)
    with pytest.raises(ValueError, match="default_action_margin"):
        DQNConfig(default_action=1, default_action_margin=(0.1, 0.0)).network((4,), 3)


@pytest.mark.parametrize("changes", VARIANTS)
def test_before_learning_the_default_action_is_greedy(changes: dict[str, Any]) -> None:
    learning = agent(**{**changes, "default_action": 1, "default_action_margin": 0.0})
    obs = np.random.default_rng(0).normal(size=(100, NUM_OBS)).astype(np.float32)
    mask = np.ones((100, NUM_ACTIONS), dtype=np.bool_)
    assert (learning.act(obs, mask, explore=False) == 1).all()


def test_random_actions_are_uniform_over_what_is_available() -> None:
    mask = np.tile([True, False, True, True], (30_000, 1))
    counts = np.bincount(random_actions(mask, np.random.default_rng(0)), minlength=4)
    assert counts[1] == 0
    np.testing.assert_allclose(counts[[0, 2, 3]] / 30_000, 1 / 3, atol=0.01)


@pytest.mark.parametrize("changes", VARIANTS)
def test_an_exported_network_acts_as_the_agent_does(tmp_path: Path, changes: dict[str, Any]) -> None:
    learning = agent(**changes)
    World(0).play(learning, 60)
    learning.export_network(tmp_path / "network.safetensors")
    network = load_network(tmp_path / "network.safetensors")
    obs, mask = World(2)._draw()
    q = network.values(network(torch.from_numpy(obs))).detach().numpy()
    config = network.config
    chosen = greedy_actions(q, mask, default_action=config.default_action, margin=config.default_action_margin)
    assert chosen.tolist() == learning.act(obs, mask, explore=False).tolist()


def logged_experience(num_steps: int = 400) -> DQNAgent:
    """Experience of a random agent in a problem of one step: action 1 earns 1, action 3 is never taken."""
    behaviour = agent(replay_capacity=2000, learning_starts=2000)
    rng, ends = np.random.default_rng(0), np.ones(2, dtype=np.bool_)
    obs = np.ones((2, NUM_OBS), dtype=np.float32)
    for _ in range(num_steps):
        action = rng.integers(3, size=2)
        behaviour.observe(obs, action, (action == 1).astype(float), ends, ~ends, obs)
    return behaviour


def test_learning_from_a_log_needs_no_environment(tmp_path: Path) -> None:
    log = logged_experience()
    log.save(tmp_path)
    learning = agent(replay_capacity=2000, learning_starts=2000, conservative_weight=0.5, learning_rate=1e-2)
    learning.replay.restore(tmp_path / "replay")
    for metrics in learning.learn_from_log(300):
        assert np.isfinite(metrics["loss"])
    obs = np.ones((2, NUM_OBS), dtype=np.float32)
    q = learning.q_values(obs)[0]
    assert q.argmax() == 1
    assert q[3] < q[:3].min(), "the conservative term holds down the action that the log does not hold"
    assert (learning.learner_steps, learning.env_steps) == (300, 0)


def test_learning_from_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        list(agent().learn_from_log(1))


def test_wrong_shapes_and_numbers_are_refused() -> None:
    learning = agent()
    mask = np.ones((2, NUM_ACTIONS), dtype=np.bool_)
    with pytest.raises(ValueError, match=r"obs: expected shape \[E, 3\], got \(2, 5\)"):
        learning.act(np.zeros((2, 5), dtype=np.float32), mask, explore=False)
    with pytest.raises(ValueError, match=r"mask: expected shape \(2, 4\), got \(2, 3\)"):
        learning.act(np.zeros((2, 3), dtype=np.float32), mask[:, :3], explore=False)
    with pytest.raises(ValueError, match="expected finite"):
        learning.act(np.full((2, 3), np.nan, dtype=np.float32), mask, explore=False)


def test_damaged_checkpoints_say_what_was_expected(tmp_path: Path) -> None:
    learning = agent()
    with pytest.raises(ValueError, match="expected the JSON state of an agent"):
        learning.load(tmp_path)
    World(0).play(learning, 10)
    learning.save(tmp_path)
    state = json.loads((tmp_path / "agent.json").read_text())
    for change, message in (
        ({"format_version": 99}, "expected format_version 1, got 99"),
        ({"agent": "tabular"}, "expected the state of a 'dqn' agent, got 'tabular'"),
    ):
        (tmp_path / "agent.json").write_text(json.dumps({**state, **change}))
        with pytest.raises(ValueError, match=message):
            agent().load(tmp_path)
    (tmp_path / "agent.json").write_text(json.dumps(state))
    path = tmp_path / "learner.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="expected a safetensors file"):
        agent().load(tmp_path)


@pytest.mark.parametrize("key", ["counters", "env_steps", "scheduled_updates", "exploration", "sample_rng"])
def test_a_state_that_lacks_something_is_refused(tmp_path: Path, key: str) -> None:
    learning = agent()
    World(0).play(learning, 10)
    learning.save(tmp_path)
    state = json.loads((tmp_path / "agent.json").read_text())
    del state[key]
    (tmp_path / "agent.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=f"expected the whole state of an agent, got KeyError\\('{key}'"):
        agent().load(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("generator", None, "expected the whole state of an agent, got KeyError"),
        ("generator", torch.zeros(3, dtype=torch.uint8), "expected the whole state of an agent, got RuntimeError"),
        ("statistics.mean", None, "expected the whole state of an agent, got KeyError"),
        ("online.head.layer.bias", None, "network weights: expected"),
        ("online.head.layer.bias", torch.zeros(99), r"expected \[5\] torch.float32, got \[99\] torch.float32"),
        ("optimizer.exp_avg", None, "state of the optimizer: expected"),
        ("optimizer.exp_avg", torch.zeros(7), "state of the optimizer: expected"),
        ("surplus", torch.zeros(7), "learner state: expected online, target, optimizer and generator, got"),
    ],
)
def test_tensors_that_are_not_the_agents_are_refused(
    tmp_path: Path, name: str, value: torch.Tensor | None, message: str
) -> None:
    learning = agent()
    World(0).play(learning, 10)
    learning.save(tmp_path)
    tensors = load_file(tmp_path / "learner.safetensors")
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    save_file(tensors, tmp_path / "learner.safetensors")
    with pytest.raises(ValueError, match=message):
        agent().load(tmp_path)


def test_a_file_of_the_first_version_without_acting_noise_loads(tmp_path: Path) -> None:
    learning = agent()
    World(0).play(learning, 20)
    learning.save(tmp_path)
    tensors = load_file(tmp_path / "learner.safetensors")
    del tensors["acting_noise"]
    save_file(tensors, tmp_path / "learner.safetensors")
    resumed = agent(seed=7)
    resumed.load(tmp_path)
    assert World(1).play(resumed, 20) == World(1).play(learning, 20)


def test_images_are_learned_from() -> None:
    config = DQNConfig(**{**FAST, "torso": "cnn", "hidden_sizes": (8,), "n_step": 2, "learning_starts": 4})
    learning = DQNAgent(config, num_envs=1, obs_shape=(2, 36, 36), num_actions=3, obs_dtype=np.uint8)
    rng = np.random.default_rng(0)
    frames = rng.integers(256, size=(12, 36, 36), dtype=np.uint8)
    mask, end = np.ones((1, 3), dtype=np.bool_), np.zeros(1, dtype=np.bool_)
    for step in range(10):
        obs, next_obs = frames[None, step : step + 2], frames[None, step + 1 : step + 3]
        action = learning.act(obs, mask, explore=True)
        learning.observe(obs, action, np.ones(1), end, end, next_obs)
        metrics = learning.learn()
    assert metrics is not None
    assert np.isfinite(metrics["loss"])


@pytest.mark.slow
def test_cart_pole_is_learned() -> None:
    config = DQNConfig(learning_rate=5e-4, n_step=5, batch_size=64, epsilon_decay_steps=3000, seed=1)
    env = gymnasium.make("CartPole-v1")
    learning = DQNAgent(config, num_envs=1, obs_shape=(4,), num_actions=2)
    mask, lengths, length = np.ones((1, 2), dtype=np.bool_), [], 0
    obs, _ = env.reset(seed=1)
    for _ in range(12_000):
        action = learning.act(obs[None], mask, explore=True)
        next_obs, reward, terminated, truncated, _ = env.step(int(action[0]))
        ends = np.array([terminated]), np.array([truncated])
        learning.observe(obs[None], action, np.array([float(reward)]), *ends, next_obs[None])
        learning.learn()
        length += 1
        obs = next_obs
        if terminated or truncated:
            obs, _ = env.reset()
            lengths.append(length)
            length = 0
    assert np.mean(lengths[-10:]) > 150


def test_a_network_is_blind_to_ignored_entries_before_and_after_learning() -> None:
    learning = agent(normalize_obs=True, ignored_obs=(1,))
    obs = np.random.default_rng(0).normal(size=(20, NUM_OBS)).astype(np.float32)
    changed, seen = obs.copy(), obs.copy()
    changed[:, 1], seen[:, 2] = 100.0, 5.0
    for _ in range(2):
        for part in (slice(0, 1), slice(None)):  # few at once go through NumPy
            np.testing.assert_array_equal(learning.q_values(obs[part]), learning.q_values(changed[part]))
            assert not np.allclose(learning.q_values(obs[part]), learning.q_values(seen[part]))
        World().play(learning, 40)


@pytest.mark.parametrize(("changes", "told"), [({}, "normalize_obs"), ({"normalize_obs": True}, "positions in obs")])
def test_entries_that_cannot_be_ignored_are_told(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        agent(ignored_obs=(NUM_OBS,), **changes)
