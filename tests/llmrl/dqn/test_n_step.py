"""n-step batches against brute force: a list of steps per lane, and a loop that walks it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrl.dqn.n_step import n_step_returns, window_slots
from llmrl.dqn.replay import ReplayBuffer

NUM_ACTIONS = 3


class NaiveReplay:
    """Remembers every step of every lane, and walks forward from one of them."""

    def __init__(self, num_envs: int, rows_per_lane: int) -> None:
        self.lanes = [[] for _ in range(num_envs)]
        self.rows_per_lane = rows_per_lane

    def add(self, lane, step):
        self.lanes[lane].append(step)

    def live(self):
        return {(lane, t) for lane, steps in enumerate(self.lanes) for t in range(len(steps))[-self.rows_per_lane :]}

    def n_step(self, lane, t, n, gamma):
        """Reward, discount and last step of the window that starts at step t."""
        steps = self.lanes[lane]
        reward, discount = 0.0, 1.0
        for k in range(n):
            step = steps[t + k]
            reward += discount * step["reward"]
            discount *= gamma
            ended = step["terminated"] or step["truncated"]
            if ended or t + k + 1 == len(steps):
                break
        return reward, 0.0 if step["terminated"] else discount, step


def play(num_envs, capacity, num_steps, end_probability, seed, sampling="uniform", valid_probability=1.0):
    """Random episodes in a buffer and in its twin; observation [lane, t] names a step."""
    rng = np.random.default_rng(seed)
    replay = ReplayBuffer(capacity, num_envs, (2,), NUM_ACTIONS, sampling=sampling)
    naive = NaiveReplay(num_envs, capacity // num_envs)
    lanes = np.arange(num_envs)
    time = np.zeros(num_envs)
    for _ in range(num_steps):
        valid = rng.random(num_envs) < valid_probability
        terminated, truncated = rng.random((2, num_envs)) < end_probability / 2
        action, reward = rng.integers(0, NUM_ACTIONS, num_envs), rng.normal(size=num_envs).astype(np.float32)
        mask, next_mask = rng.random((2, num_envs, NUM_ACTIONS)) < 0.5
        mask[lanes, action] = True
        next_mask[:, 0] |= ~next_mask.any(axis=1)
        obs, next_obs = np.stack([lanes, time], 1), np.stack([lanes, time + 0.5], 1)
        replay.add(obs, action, reward, terminated, truncated, next_obs, mask, next_mask, valid=valid)
        for lane in lanes[valid]:
            naive.add(
                lane,
                {
                    "reward": float(reward[lane]),
                    "terminated": terminated[lane],
                    "truncated": truncated[lane],
                    "action": action[lane],
                    "next_obs": next_obs[lane],
                    "mask": mask[lane],
                    "next_mask": next_mask[lane] | terminated[lane],
                },
            )
        time += valid
    return replay, naive


def assert_same(replay, naive, n, gamma, seed, batch_size=400):
    batch = replay.sample(batch_size, np.random.default_rng(seed), n_step=n, gamma=gamma)
    for b in range(batch_size):
        lane, t = batch.obs[b].astype(int)
        start = naive.lanes[lane][t]
        reward, discount, last = naive.n_step(lane, t, n, gamma)
        assert batch.reward[b] == pytest.approx(reward, abs=1e-5)
        assert batch.discount[b] == pytest.approx(discount, abs=1e-6)
        assert batch.next_obs[b].tolist() == last["next_obs"].tolist()
        assert batch.action[b] == start["action"]
        assert batch.mask[b].tolist() == start["mask"].tolist()
        assert batch.next_mask[b].tolist() == last["next_mask"].tolist()
    return {(int(lane), int(t)) for lane, t in batch.obs}


@pytest.mark.parametrize("n", [1, 2, 3, 5, 10])
@pytest.mark.parametrize("num_steps", [7, 20, 100])  # partly full, just full, several times around
@pytest.mark.parametrize(("num_envs", "capacity"), [(1, 20), (3, 60), (4, 83)])
def test_agrees_with_brute_force(n, num_steps, num_envs, capacity):
    replay, naive = play(num_envs, capacity, num_steps, end_probability=0.2, seed=n)
    drawn = assert_same(replay, naive, n, 0.9, seed=1, batch_size=1500)
    assert drawn == naive.live()  # every stored step can be drawn, the starts of episodes among them


@settings(max_examples=40, deadline=None)
@given(
    num_envs=st.integers(1, 4),
    rows=st.integers(1, 12),
    num_steps=st.integers(1, 40),
    end_probability=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    valid_probability=st.sampled_from([0.5, 1.0]),
    n=st.integers(1, 10),
    gamma=st.sampled_from([0.0, 0.5, 1.0]),
    sampling=st.sampled_from(["uniform", "prioritized", "lap"]),
    seed=st.integers(0, 1000),
)
def test_agrees_with_brute_force_on_any_program(
    num_envs, rows, num_steps, end_probability, valid_probability, n, gamma, sampling, seed
):
    replay, naive = play(num_envs, num_envs * rows, num_steps, end_probability, seed, sampling, valid_probability)
    assert len(replay) == len(naive.live())
    if len(replay):
        assert_same(replay, naive, n, gamma, seed, batch_size=60)


def add_steps(replay, steps):
    """Adds (t, reward, terminated, truncated) to a buffer of one lane; t names the observation."""
    for t, reward, terminated, truncated in steps:
        replay.add([[t]], [0], [reward], [terminated], [truncated], [[t + 0.5]])


def drawn_at(replay, t, n, gamma=0.5):
    """What is drawn for the step named t: reward, discount, next observation."""
    batch = replay.sample(500, np.random.default_rng(0), n_step=n, gamma=gamma)
    b = int(np.flatnonzero(batch.obs[:, 0] == t)[0])
    return float(batch.reward[b]), float(batch.discount[b]), float(batch.next_obs[b, 0])


@pytest.fixture
def line():
    """Steps 0..4 with rewards 1, 2, 4, 8, 16; nothing ends."""
    replay = ReplayBuffer(10, 1, (1,), 1)
    add_steps(replay, [(t, 2.0**t, False, False) for t in range(5)])
    return replay


def test_a_whole_window(line):
    assert drawn_at(line, 0, n=3) == (1 + 0.5 * 2 + 0.25 * 4, 0.125, 2.5)


def test_the_write_head_shortens_the_window(line):
    assert drawn_at(line, 3, n=3) == (8 + 0.5 * 16, 0.25, 4.5)
    assert drawn_at(line, 4, n=3) == (16, 0.5, 4.5)


def test_a_window_grows_as_its_steps_arrive(line):
    add_steps(line, [(5, 32.0, False, False)])
    assert drawn_at(line, 4, n=3) == (16 + 0.5 * 32, 0.25, 5.5)


def test_termination_ends_the_window_and_the_bootstrap():
    replay = ReplayBuffer(10, 1, (1,), 1)
    add_steps(replay, [(0, 1.0, False, False), (1, 2.0, True, False), (2, 4.0, False, False)])
    assert drawn_at(replay, 0, n=5) == (2.0, 0.0, 1.5)


def test_truncation_ends_the_window_and_bootstraps_from_its_final_observation():
    replay = ReplayBuffer(10, 1, (1,), 1)
    add_steps(replay, [(0, 1.0, False, False), (1, 2.0, False, True), (2, 4.0, False, False)])
    assert drawn_at(replay, 0, n=5) == (2.0, 0.25, 1.5)
    assert drawn_at(replay, 1, n=5) == (2.0, 0.5, 1.5)


def test_terminated_and_truncated_at_once_is_a_termination():
    replay = ReplayBuffer(10, 1, (1,), 1)
    add_steps(replay, [(0, 1.0, True, True)])
    assert drawn_at(replay, 0, n=1) == (1.0, 0.0, 0.5)


def test_a_full_ring_does_not_run_from_its_newest_into_its_oldest_step():
    replay = ReplayBuffer(4, 1, (1,), 1)
    add_steps(replay, [(t, 2.0**t, False, False) for t in range(6)])  # holds 2, 3, 4, 5
    assert drawn_at(replay, 5, n=3) == (32.0, 0.5, 5.5)
    assert drawn_at(replay, 3, n=3) == (8 + 16 / 2 + 32 / 4, 0.125, 5.5)


def test_an_interrupted_episode_is_not_joined_to_the_next(line):
    line.end_episodes()
    add_steps(line, [(5, 32.0, False, False)])
    assert drawn_at(line, 4, n=3) == (16.0, 0.5, 4.5)


def test_a_new_episode_number_ends_the_window():
    replay = ReplayBuffer(10, 1, (1,), 1)
    for t, episode in enumerate([7, 7, 8]):
        replay.add([[t]], [0], [2.0**t], [False], [False], [[t + 0.5]], episode=[episode])
    assert drawn_at(replay, 0, n=3) == (2.0, 0.25, 1.5)


def test_rewards_are_transformed_before_they_are_summed(line):
    batch = line.sample(200, np.random.default_rng(0), n_step=2, gamma=1.0, reward_transform=lambda r: r.clip(0, 3))
    assert batch.reward[batch.obs[:, 0] == 1].tolist()[0] == 2 + 3


def test_windows_stay_in_their_lane():
    assert window_slots(np.array([1, 5]), 3, num_envs=2, num_slots=6).tolist() == [[1, 3, 5], [5, 1, 3]]


def test_returns_of_hand_made_windows():
    stop = np.array([False, True, False, False])
    windows = np.array([[0, 1, 2], [2, 3, 0]])
    reward = np.array([[1.0, 10.0, 100.0], [1.0, 10.0, 100.0]])
    returns = n_step_returns(stop, reward, windows, 0.5)
    assert returns.reward.tolist() == [6.0, 31.0]
    assert returns.discount.tolist() == [0.25, 0.125]
    assert returns.last.tolist() == [1, 0]
