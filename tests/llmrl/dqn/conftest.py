"""What several files of replay tests need: buffers, and steps to fill them with."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from llmrl.dqn.replay import ReplayBuffer

IMAGE = (4, 6, 5)


def make(sampling="uniform", **changes):
    settings = {"capacity": 60, "num_envs": 3, "obs_shape": (2,), "num_actions": 4, "sampling": sampling}
    return ReplayBuffer(**{**settings, **changes})


def make_images(**changes):
    return make(obs_shape=IMAGE, obs_dtype=np.uint8, **changes)


def play(replay, num_steps, rng):
    """Random steps in random lanes; in images frames slide. The reward is the number of the step."""
    num_envs = replay.num_envs
    obs = observations(replay, rng)
    for _ in range(num_steps):
        fresh = observations(replay, rng)
        next_obs = np.concatenate([obs[:, 1:], fresh[:, :1]], axis=1)
        mask, next_mask = rng.random((2, num_envs, replay.spec.num_actions)) < 0.5
        mask[:, 1] = next_mask[:, 0] = True
        terminated, truncated = rng.random((2, num_envs)) < 0.1
        valid = rng.random(num_envs) < (0.8 if num_envs > 1 else 1.0)
        number = replay.rows.next_generation + valid.cumsum() - 1
        action = np.ones(num_envs, dtype=int)
        replay.add(obs, action, number, terminated, truncated, next_obs, mask, next_mask, valid=valid)
        if replay.sampling != "uniform" and len(replay):
            batch = replay.sample(4, rng, n_step=1, gamma=1.0)
            replay.update_priorities(batch.index, batch.generation, rng.random(4) * 5)
        ended = (terminated | truncated).reshape(-1, *[1] * len(replay.spec.obs_shape))
        obs = np.where(ended, observations(replay, rng), next_obs)


def observations(replay, rng):
    shape = (replay.num_envs, *replay.spec.obs_shape)
    if replay.spec.obs_dtype == np.uint8:
        return rng.integers(0, 255, shape, dtype=np.uint8)
    return rng.normal(size=shape).astype(np.float32)


def assert_draw_the_same(one, other):
    for seed in range(3):
        batches = [
            replay.sample(100, np.random.default_rng(seed), n_step=3, gamma=0.9, beta=0.5) for replay in (one, other)
        ]
        for name in batches[0].__dataclass_fields__:
            assert np.array_equal(getattr(batches[0], name), getattr(batches[1], name)), name


def stored_rewards(replay):
    """Rewards of all transitions, which name them."""
    batch = replay.sample(60 * len(replay), np.random.default_rng(0), n_step=1, gamma=1.0)
    return sorted(set(batch.reward.astype(int).tolist()))


@pytest.fixture
def replays():
    """The functions above, for test files that cannot import this one."""
    functions = (make, make_images, play, assert_draw_the_same, stored_rewards)
    return SimpleNamespace(**{function.__name__: function for function in functions})
