"""Images in the replay: every frame once, and every stack as it was."""

from __future__ import annotations

import numpy as np
import pytest

from llmrl.dqn.replay import ReplayBuffer


def draw(replay, batch_size, **changes):
    return replay.sample(batch_size, np.random.default_rng(0), **{"n_step": 1, "gamma": 0.9, **changes})


def play_images(replay, num_steps, *, episode_length, seed=0, slides=True):
    """Episodes of stacked frames; returns {number of the step: (obs, next_obs)}, numbered through the reward."""
    rng = np.random.default_rng(seed)
    num_envs, stack = replay.num_envs, replay.spec.obs_shape[0]
    facts = {}
    for t in range(num_steps):
        if t % episode_length == 0:
            first = rng.integers(0, 255, (num_envs, 1, 6, 5), dtype=np.uint8)
            obs = np.repeat(first, stack, axis=1)
        new = rng.integers(0, 255, (num_envs, 1, 6, 5), dtype=np.uint8)
        next_obs = np.concatenate([obs[:, 1:], new], axis=1)
        if not slides:
            next_obs = rng.integers(0, 255, next_obs.shape, dtype=np.uint8)
        number = t * num_envs + np.arange(num_envs)
        ended = np.full(num_envs, t % episode_length == episode_length - 1)
        replay.add(obs, np.zeros(num_envs, dtype=int), number, ended, np.zeros(num_envs, dtype=bool), next_obs)
        facts |= {int(number[e]): (obs[e], next_obs[e]) for e in range(num_envs)}
        obs = next_obs
    return facts


@pytest.mark.parametrize("slides", [True, False])
@pytest.mark.parametrize("episode_length", [2, 9, 50])
@pytest.mark.parametrize("num_envs", [1, 3])
def test_images_come_back_as_they_were(num_envs, episode_length, slides):
    replay = ReplayBuffer(90, num_envs, (4, 6, 5), 2, obs_dtype=np.uint8)
    facts = play_images(replay, 200, episode_length=episode_length, slides=slides)
    batch = draw(replay, 1000)
    assert batch.obs.dtype == np.uint8
    for b in range(1000):
        obs, next_obs = facts[int(batch.reward[b])]
        assert np.array_equal(batch.obs[b], obs)
        assert np.array_equal(batch.next_obs[b], next_obs)
    assert len(set(batch.reward.tolist())) == len(replay)


def test_frames_are_stored_once():
    replay = ReplayBuffer(10_000, 1, (4, 84, 84), 4, obs_dtype=np.uint8)
    assert replay.num_bytes < 1.2 * 10_000 * 84 * 84


def test_a_buffer_of_images_holds_its_capacity_where_episodes_are_not_very_short():
    replay = ReplayBuffer(90, 1, (4, 6, 5), 2, obs_dtype=np.uint8)
    play_images(replay, 300, episode_length=10)
    assert len(replay) == 90


def test_transitions_whose_frames_are_gone_are_not_drawn_by_priority():
    replay = ReplayBuffer(90, 1, (4, 6, 5), 2, obs_dtype=np.uint8, sampling="prioritized")
    facts = play_images(replay, 300, episode_length=2, slides=False)  # eight new frames in every step
    assert 0 < len(replay) < 90
    batch = draw(replay, 500)
    assert len(set(batch.reward.tolist())) == len(replay)
    assert all(np.array_equal(batch.obs[b], facts[int(batch.reward[b])][0]) for b in range(500))


def test_colour_images_are_stored_whole():
    replay = ReplayBuffer(10, 1, (20, 20, 3), 2, obs_dtype=np.uint8)
    image = np.random.default_rng(0).integers(0, 255, (1, 20, 20, 3), dtype=np.uint8)
    replay.add(image, [0], [0.0], [False], [False], image[:, ::-1])
    batch = draw(replay, 1)
    assert np.array_equal(batch.obs, image)
    assert np.array_equal(batch.next_obs, image[:, ::-1])
