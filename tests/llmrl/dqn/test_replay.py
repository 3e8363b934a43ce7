from __future__ import annotations

import math

import numpy as np
import pytest

from llmrl.dqn.replay import ReplayBuffer

NUM_ACTIONS = 3


def numbered(num_steps, *, capacity=None, num_envs=1, **settings):
    """A buffer whose observations are the numbers of its steps."""
    replay = ReplayBuffer(capacity or num_steps * num_envs, num_envs, (1,), NUM_ACTIONS, **settings)
    add_numbered(replay, 0, num_steps)
    return replay


def add_numbered(replay, start, stop):
    num_envs = replay.num_envs
    no = np.zeros(num_envs, dtype=bool)
    for t in range(start, stop):
        obs = t * num_envs + np.arange(num_envs)[:, None]
        replay.add(obs, np.zeros(num_envs, dtype=int), np.ones(num_envs), no, no, obs + 0.5)


def draw(replay, batch_size, seed=0, **changes):
    return replay.sample(batch_size, np.random.default_rng(seed), **{"n_step": 1, "gamma": 0.9, **changes})


def give_priorities(replay, priority_of):
    """Sets the priority of every stored transition to `priority_of(number of its step)`."""
    batch = draw(replay, 50 * len(replay))
    assert set(batch.index.tolist()) == set(range(len(replay)))
    replay.update_priorities(batch.index, batch.generation, priority_of(batch.obs[:, 0]))


def frequencies(replay, num_draws, **changes):
    """How often each step was drawn, in rounds of half the buffer."""
    rng = np.random.default_rng(0)
    drawn = [
        replay.sample(len(replay), rng, n_step=1, gamma=0.9, **changes).obs[:, 0].astype(int)
        for _ in range(num_draws // len(replay))
    ]
    return np.bincount(np.concatenate(drawn), minlength=len(replay))


def chi_square_limit(num_cells):
    """Mean of a chi-square statistic plus four standard deviations."""
    return num_cells - 1 + 4 * math.sqrt(2 * (num_cells - 1))


# -- which transitions are drawn --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_envs", "capacity"), [(1, 100), (4, 100), (4, 300)])  # full, full, partly full
def test_uniform_draws_are_uniform(num_envs, capacity):
    replay = numbered(100 // num_envs, capacity=capacity, num_envs=num_envs)
    counts = frequencies(replay, 50_000)
    assert ((counts - 500) ** 2 / 500).sum() < chi_square_limit(100)


def test_uniform_draws_are_uniform_over_lanes_of_different_length():
    replay = ReplayBuffer(400, 2, (1,), 1)
    for t in range(90):
        number = [[t], [90 + t // 9]]
        replay.add(number, [0, 0], [0.0, 0.0], [False] * 2, [False] * 2, number, valid=[True, t % 9 == 0])
    counts = frequencies(replay, 50_000)
    assert ((counts - 500) ** 2 / 500).sum() < chi_square_limit(100)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_prioritized_draws_are_in_proportion_to_priority_to_the_alpha(alpha):
    replay = numbered(64, sampling="prioritized", alpha=alpha)
    give_priorities(replay, lambda number: 1.0 + number)
    counts = frequencies(replay, 128_000)
    probability = (1.0 + np.arange(64)) ** alpha
    expected = counts.sum() * probability / probability.sum()
    assert ((counts - expected) ** 2 / expected).sum() < chi_square_limit(64)
    # Stratified draws hardly vary, so that a wrong exponent shows clearly: alpha applied twice would give these ratios.
    assert counts[63] / counts[0] == pytest.approx(64**alpha, rel=0.15)


def test_lap_draws_errors_below_one_alike():
    replay = numbered(64, sampling="lap", alpha=0.4)
    give_priorities(replay, lambda number: number / 8)
    probability = np.maximum(np.arange(64) / 8, 1.0) ** 0.4
    counts = frequencies(replay, 128_000)
    expected = counts.sum() * probability / probability.sum()
    assert ((counts - expected) ** 2 / expected).sum() < chi_square_limit(64)


def test_new_transitions_get_the_highest_priority_so_far():
    replay = numbered(10, capacity=20, sampling="prioritized", alpha=1.0)
    give_priorities(replay, lambda number: np.where(number == 3, 8.0, 1.0))
    add_numbered(replay, 10, 11)
    batch = draw(replay, 25_000)
    assert np.mean(batch.obs[:, 0] == 10) == pytest.approx(8 / 25, abs=0.01)


def test_a_priority_of_zero_can_still_be_drawn():
    replay = numbered(2, sampling="prioritized", alpha=0.5)
    give_priorities(replay, lambda number: np.where(number == 0, 0.0, 1.0))
    assert 0 in draw(replay, 5000).obs[:, 0]


def test_draws_depend_on_the_generator_alone():
    one, other = numbered(50), numbered(50)
    np.random.default_rng(5).random(100)
    assert draw(one, 32, seed=7).index.tolist() == draw(other, 32, seed=7).index.tolist()
    assert draw(one, 32, seed=7).index.tolist() != draw(one, 32, seed=8).index.tolist()


# -- importance weights -----------------------------------------------------------------------------------------------


def test_importance_weighted_means_are_unbiased():
    replay = numbered(100, sampling="prioritized", alpha=0.7, normalize_weights=False)
    give_priorities(replay, lambda number: 0.01 + number**2)
    value = np.sqrt(np.arange(100.0))
    rng = np.random.default_rng(0)
    means = []
    for _ in range(400):
        batch = replay.sample(256, rng, n_step=1, gamma=0.9, beta=1.0)
        means.append(np.mean(batch.weight * value[batch.obs[:, 0].astype(int)]))
    error = np.std(means) / math.sqrt(len(means))
    assert np.mean(means) == pytest.approx(value.mean(), abs=4 * error)
    unweighted = np.mean(value[draw(replay, 10_000).obs[:, 0].astype(int)])
    assert abs(unweighted - value.mean()) > 20 * error  # without weights it would show


def test_importance_weights_by_hand():
    replay = numbered(2, sampling="prioritized", alpha=1.0)
    give_priorities(replay, lambda number: np.where(number == 0, 1.0, 3.0))  # probabilities 1/4 and 3/4
    batch = draw(replay, 100, beta=0.5)
    weight = dict(zip(batch.obs[:, 0].tolist(), batch.weight.tolist(), strict=True))
    assert weight[0.0] == 1.0
    assert weight[1.0] == pytest.approx(math.sqrt(1 / 3), rel=1e-5)


@pytest.mark.parametrize("sampling", ["uniform", "lap"])
def test_no_weights_where_sampling_needs_none(sampling):
    replay = numbered(10, sampling=sampling)
    replay.update_priorities(np.arange(10), np.arange(10), np.arange(10.0))
    assert draw(replay, 50, beta=1.0).weight.tolist() == [1.0] * 50


# -- priorities of transitions that are gone ------------------------------------------------------------------------


def test_a_stale_priority_does_not_reach_the_transition_that_took_the_slot():
    replay = numbered(4, sampling="prioritized", alpha=1.0)
    batch = draw(replay, 40)
    add_numbered(replay, 4, 6)  # overwrites steps 0 and 1
    num_old = int((batch.obs[:, 0] < 2).sum())
    num_set = replay.update_priorities(batch.index, batch.generation, np.where(batch.obs[:, 0] < 2, 1e6, 1.0))
    assert (num_set, replay.num_stale_updates) == (40 - num_old, num_old)
    assert replay.max_priority == 1.0
    counts = np.bincount(draw(replay, 4000).obs[:, 0].astype(int), minlength=6)
    assert counts[2:] == pytest.approx([1000] * 4, rel=0.01)


def test_uniform_sampling_ignores_priorities():
    replay = numbered(4)
    assert replay.update_priorities(np.arange(4), np.arange(4), np.ones(4)) == 0


# -- what is stored ---------------------------------------------------------------------------------------------------


def test_dtypes_of_a_batch():
    batch = draw(numbered(5), 7)
    dtypes = {name: getattr(batch, name).dtype for name in batch.__dataclass_fields__}
    assert dtypes == {
        "obs": np.float32,
        "action": np.int64,
        "reward": np.float32,
        "discount": np.float32,
        "next_obs": np.float32,
        "mask": np.bool_,
        "next_mask": np.bool_,
        "weight": np.float32,
        "index": np.int64,
        "generation": np.int64,
    }
    assert all(getattr(batch, name).flags.c_contiguous for name in dtypes)
    assert batch.obs.shape == (7, 1)
    assert batch.mask.shape == (7, NUM_ACTIONS)


def test_a_batch_does_not_change_when_the_buffer_does():
    replay = numbered(4)
    batch = draw(replay, 4)
    before = batch.obs.copy()
    add_numbered(replay, 4, 8)
    assert np.array_equal(batch.obs, before)


def test_what_is_added_is_copied():
    replay = ReplayBuffer(4, 1, (2,), 1)
    obs = np.ones((1, 2), dtype=np.float32)
    replay.add(obs, [0], [0.0], [False], [False], obs)
    obs[:] = 7
    assert draw(replay, 1).obs.tolist() == [[1.0, 1.0]]


def test_capacity_is_shared_by_the_lanes_and_rounded_down():
    replay = numbered(10, capacity=11, num_envs=3)
    assert (replay.capacity, len(replay)) == (9, 9)
    assert set(draw(replay, 500).obs[:, 0].tolist()) == set(range(21, 30))


def test_lanes_that_are_not_valid_are_left_out():
    replay = ReplayBuffer(10, 2, (1,), NUM_ACTIONS)
    garbage = [[1.0], [float("nan")]]
    replay.add(garbage, [0, 99], [1.0, float("nan")], [False] * 2, [False] * 2, garbage, valid=[True, False])
    replay.add(garbage, [0, 99], [1.0, float("nan")], [False] * 2, [False] * 2, garbage, valid=[False, False])
    assert len(replay) == 1
    assert set(draw(replay, 10).obs[:, 0].tolist()) == {1.0}


def test_without_masks_every_action_is_available():
    batch = draw(numbered(5), 5)
    assert batch.mask.all()
    assert batch.next_mask.all()


def test_after_termination_the_mask_allows_everything_so_that_no_maximum_is_over_nothing():
    replay = ReplayBuffer(4, 1, (1,), 2)
    nothing = np.zeros((1, 2), dtype=bool)
    replay.add([[0]], [0], [0.0], [True], [False], [[1]], next_mask=nothing)
    assert draw(replay, 1).next_mask.tolist() == [[True, True]]


@pytest.mark.parametrize("sampling", ["uniform", "prioritized"])
@pytest.mark.parametrize(("obs_shape", "num_envs"), [((4,), 1), ((40,), 8)])
def test_memory_is_at_most_twice_the_raw_columns(sampling, obs_shape, num_envs):
    replay = ReplayBuffer(100_000, num_envs, obs_shape, 9, sampling=sampling)
    raw_row = 2 * 4 * obs_shape[0] + 4 + 4 + 1 + 1 + 9 + 9  # observations, action, reward, two flags, two masks
    assert replay.num_bytes <= 2 * 100_000 * raw_row


@pytest.mark.parametrize("num_steps", [5, 19, 20, 47])
def test_lanes_in_step_are_written_as_any_lanes_are(replays, num_steps):
    quick, plain = replays.make(), replays.make()
    plain.rows.in_step = False
    for replay in (quick, plain):
        rng = np.random.default_rng(0)
        for number in range(num_steps):
            obs, next_obs = rng.normal(size=(2, 3, 2)).astype(np.float32)
            terminated, truncated = rng.random((2, 3)) < 0.2
            replay.add(obs, rng.integers(4, size=3), np.full(3, number), terminated, truncated, next_obs)
    assert quick.rows.in_step
    assert not plain.rows.in_step
    assert np.array_equal(quick.rows.records, plain.rows.records)
    for name in ("stop", "head", "count", "open", "episode"):
        assert np.array_equal(getattr(quick.rows, name), getattr(plain.rows, name)), name
    numbers = np.arange(len(quick))
    assert sorted(quick.rows.slots_of(numbers)) == sorted(plain.rows.slots_of(numbers))
