"""Bad input to the replay: refused with what was expected and what came."""

from __future__ import annotations

import numpy as np
import pytest

from llmrl.dqn.replay import ReplayBuffer


def draw(replay, batch_size, **changes):
    return replay.sample(batch_size, np.random.default_rng(0), **{"n_step": 1, "gamma": 0.9, **changes})


def filled(num_steps, **settings):
    replay = ReplayBuffer(num_steps, 1, (1,), 1, **settings)
    for t in range(num_steps):
        replay.add([[t]], [0], [0.0], [False], [False], [[t + 1]])
    return replay


def good_step(**changes):
    step = {
        "obs": np.zeros((2, 3), dtype=np.float32),
        "action": np.array([0, 1]),
        "reward": np.array([0.0, 1.0]),
        "terminated": np.array([False, False]),
        "truncated": np.array([False, False]),
        "next_obs": np.zeros((2, 3), dtype=np.float32),
        "mask": np.ones((2, 4), dtype=bool),
        "next_mask": np.ones((2, 4), dtype=bool),
    }
    return {**step, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"obs": np.zeros((2, 4))}, r"obs: expected shape \(2, 3\), got \(2, 4\)"),
        ({"next_obs": np.zeros((3, 3))}, r"next_obs: expected shape \(2, 3\), got \(3, 3\)"),
        ({"obs": np.full((2, 3), "a")}, "obs: expected dtype float32, got <U1"),
        ({"obs": np.full((2, 3), np.nan)}, "obs: expected finite numbers, got nan"),
        ({"next_obs": np.full((2, 3), np.inf)}, "next_obs: expected finite numbers, got inf"),
        ({"obs": np.full((2, 3), 1e300)}, "obs: expected finite numbers, got inf"),
        ({"reward": np.array([0.0, np.nan])}, "reward: expected finite numbers, got nan"),
        ({"reward": np.array([0.0, 1e300])}, "reward: expected finite numbers, got inf"),
        ({"reward": np.zeros(3)}, r"reward: expected shape \(2,\), got \(3,\)"),
        ({"action": np.array([0, 4])}, r"action: expected 0 to 3, got \[0, 4\]"),
        ({"action": np.array([0, -1])}, r"action: expected 0 to 3, got \[0, -1\]"),
        ({"action": np.array([0.0, 1.0])}, "action: expected dtype integer, got float64"),
        ({"terminated": np.array([0, 1])}, "terminated: expected dtype bool, got int64"),
        ({"truncated": np.array([0.0, 1.0])}, "truncated: expected dtype bool, got float64"),
        ({"mask": np.ones((2, 3), dtype=bool)}, r"mask: expected shape \(2, 4\), got \(2, 3\)"),
        ({"mask": np.ones((2, 4))}, "mask: expected dtype bool, got float64"),
        ({"mask": np.zeros((2, 4), dtype=bool)}, "mask: expected at least one available action"),
        ({"next_mask": np.zeros((2, 4), dtype=bool)}, "next_mask: expected at least one available action"),
        ({"mask": np.array([[True] * 4, [True, False, True, True]])}, "action: expected an available one, got"),
        ({"valid": np.array([1, 0])}, "valid: expected dtype bool, got int64"),
        ({"episode": np.array([0.5, 1.0])}, "episode: expected dtype integer, got float64"),
    ],
)
def test_a_bad_step_is_refused_and_leaves_the_buffer_as_it_was(changes, message):
    replay = ReplayBuffer(10, 2, (3,), 4, sampling="prioritized")
    replay.add(**good_step())
    before = replay.rows.state_dict()
    with pytest.raises(ValueError, match=message):
        replay.add(**good_step(**changes))
    assert replay.rows.state_dict() == before


def test_images_must_be_bytes():
    replay = ReplayBuffer(100, 1, (4, 6, 5), 2, obs_dtype=np.uint8)
    with pytest.raises(ValueError, match="obs: expected dtype uint8, got float64"):
        replay.add(np.zeros((1, 4, 6, 5)), [0], [0.0], [False], [False], np.zeros((1, 4, 6, 5)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"capacity": 0}, "capacity: expected a positive number, got 0"),
        ({"capacity": 1}, "capacity: expected at least num_envs=2, got 1"),
        ({"num_envs": 0}, "num_envs: expected a positive number, got 0"),
        ({"num_actions": 0}, "num_actions: expected a positive number, got 0"),
        ({"sampling": "ranked"}, "sampling: expected 'uniform', 'prioritized' or 'lap', got 'ranked'"),
        ({"obs_dtype": np.float64}, "obs_dtype: expected numpy.float32 or numpy.uint8, got"),
        ({"alpha": -1.0}, "alpha: expected a number >= 0, got -1.0"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ReplayBuffer(**{"capacity": 10, "num_envs": 2, "obs_shape": (3,), "num_actions": 2, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected a positive number, got 0"),
        ({"n_step": 0}, "n_step: expected a positive number, got 0"),
        ({"gamma": 1.5}, r"gamma: expected a number in \[0, 1\], got 1.5"),
    ],
)
def test_bad_draws_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        draw(filled(5), **{"batch_size": 4, **changes})


def test_an_empty_buffer_cannot_be_drawn_from():
    with pytest.raises(ValueError, match="expected at least one transition, got an empty buffer"):
        draw(ReplayBuffer(10, 1, (1,), 1), 4)


@pytest.mark.parametrize(
    ("priority", "message"),
    [
        (np.array([1.0, np.nan]), "priority: expected finite numbers >= 0, got nan"),
        (np.array([1.0, -1.0]), "priority: expected finite numbers >= 0, got -1.0"),
        (np.array([1.0]), "expected one shape, got"),
    ],
)
def test_bad_priorities_are_refused(priority, message):
    replay = filled(5, sampling="prioritized")
    batch = draw(replay, 2)
    with pytest.raises(ValueError, match=message):
        replay.update_priorities(batch.index, batch.generation, priority)


@pytest.mark.parametrize("index", [[0, 5], [-1, 0]])
def test_priorities_of_slots_that_are_not_there_are_refused(index):
    replay = filled(5, sampling="prioritized")
    with pytest.raises(ValueError, match="index: expected 0 to 4, got"):
        replay.update_priorities(np.array(index), np.array([0, 0]), np.ones(2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"obs": np.array([[np.nan]])}, "obs: expected finite numbers, got nan"),
        ({"obs": np.array([[0.0]]), "next_obs": np.array([[-np.inf]])}, "next_obs: expected finite numbers, got -inf"),
        ({"reward": np.array([np.inf])}, "reward: expected finite numbers, got inf"),
        ({"action": np.array([2])}, r"action: expected 0 to 1, got \[2\]"),
        ({"next_mask": np.array([[False, False]])}, "next_mask: expected at least one available action"),
    ],
)
def test_a_single_lane_is_looked_at_like_many(changes, message):
    replay = ReplayBuffer(4, 1, (1,), 2)
    end = np.array([False])
    step = {"obs": np.ones((1, 1)), "action": np.array([0]), "reward": np.array([1.0]), "next_obs": np.ones((1, 1))}
    replay.add(**step, terminated=end, truncated=end)
    with pytest.raises(ValueError, match=message):
        replay.add(**{**step, **changes}, terminated=end, truncated=end)
    assert len(replay) == 1


def test_what_is_large_and_finite_is_taken():
    replay = ReplayBuffer(4, 1, (2,), 2)
    large = np.full((1, 2), 3e38, dtype=np.float32)
    replay.add(large, [0], [3e38], [False], [False], -large)
    batch = draw(replay, 1)
    assert batch.obs.tolist() == large.tolist()
    assert batch.reward.tolist() == [np.float32(3e38)]
