from __future__ import annotations

import json
import math

import numpy as np
import pytest

from llmrl.dqn.exploration import GREEDY, EpsilonGreedy, ExponentialEpsilon, LadderEpsilon, LinearEpsilon


def constant(epsilon):
    return LinearEpsilon(epsilon, epsilon, 1)


def all_available(num_envs, num_actions=4):
    return np.ones((num_envs, num_actions), dtype=bool)


def choices(exploration, num_steps, mask=None):
    """[T, E] choices of successive decisions."""
    mask = all_available(exploration.num_envs) if mask is None else mask
    return np.stack([exploration.choose(mask, t) for t in range(num_steps)])


# -- epsilon ----------------------------------------------------------------------------------------------------------


def test_linear_epsilon_from_start_to_end():
    epsilon = LinearEpsilon(1.0, 0.1, decay_steps=1000)
    assert [epsilon(t) for t in (0, 1, 250, 500, 999, 1000, 10**9)] == pytest.approx(
        [1.0, 0.9991, 0.775, 0.55, 0.1009, 0.1, 0.1]
    )
    assert epsilon(1000) == 0.1


def test_exponential_epsilon_from_start_to_end():
    epsilon = ExponentialEpsilon(1.0, 0.01, decay_steps=1000)
    assert [epsilon(t) for t in (0, 250, 500, 1000, 10**9)] == pytest.approx([1.0, 10**-0.5, 0.1, 0.01, 0.01])
    assert epsilon(1000) == 0.01


def test_epsilon_never_rises_on_its_way_down():
    for epsilon in (LinearEpsilon(0.9, 0.05, 77), ExponentialEpsilon(0.9, 0.05, 77)):
        values = [epsilon(t) for t in range(120)]
        assert values == sorted(values, reverse=True)
        assert len(set(values)) == 78


def test_the_ladder_has_a_rung_for_every_environment():
    epsilon = LadderEpsilon(constant(0.4), exponent=7.0, num_envs=8)(0)
    assert epsilon == pytest.approx([0.4 ** (1 + 7 * i / 7) for i in range(8)])


def test_the_ladder_moves_with_its_schedule():
    ladder = LadderEpsilon(LinearEpsilon(1.0, 0.5, 10), exponent=1.0, num_envs=2)
    assert ladder(0).tolist() == [1.0, 1.0]
    assert ladder(10).tolist() == [0.5, 0.25]


def test_a_ladder_of_one_environment_is_its_schedule():
    assert LadderEpsilon(constant(0.3), exponent=7.0, num_envs=1)(0).tolist() == [0.3]


# -- choices ----------------------------------------------------------------------------------------------------------


def test_as_many_random_actions_as_epsilon_says():
    exploration = EpsilonGreedy(LinearEpsilon(1.0, 0.0, 1000), 50, np.random.default_rng(0))
    explored = choices(exploration, 1100) != GREEDY
    assert explored[:50].mean() == pytest.approx(0.975, abs=0.02)
    assert explored[475:525].mean() == pytest.approx(0.5, abs=0.05)
    assert explored[950:1000].mean() == pytest.approx(0.025, abs=0.02)
    assert not explored[1000:].any()


def test_every_environment_has_a_coin_of_its_own():
    exploration = EpsilonGreedy(constant(0.5), 8, np.random.default_rng(0))
    explored = choices(exploration, 4000) != GREEDY
    assert np.corrcoef(explored.T) == pytest.approx(np.eye(8), abs=0.08)
    # With one coin for all, every decision would explore in all environments or in none.
    assert explored.sum(axis=1).std() == pytest.approx(math.sqrt(8 * 0.25), rel=0.1)


def test_environments_draw_different_actions():
    drawn = choices(EpsilonGreedy(constant(1.0), 2, np.random.default_rng(0)), 4000)
    assert np.mean(drawn[:, 0] == drawn[:, 1]) == pytest.approx(0.25, abs=0.03)


def test_random_actions_are_uniform_over_the_available_ones():
    mask = np.array([[True, False, True, True], [False, False, False, True]])
    drawn = choices(EpsilonGreedy(constant(1.0), 2, np.random.default_rng(0)), 6000, mask)
    assert np.bincount(drawn[:, 0], minlength=4) == pytest.approx([2000, 0, 2000, 2000], abs=160)
    assert (drawn[:, 1] == 3).all()


def test_the_ladder_reaches_every_environment():
    exploration = EpsilonGreedy(LadderEpsilon(constant(0.5), 3.0, 4), 4, np.random.default_rng(0))
    assert (choices(exploration, 4000) != GREEDY).mean(axis=0) == pytest.approx([0.5, 0.25, 0.125, 0.0625], abs=0.03)


# -- actions that go on -------------------------------------------------------------------------------------------


def runs_of(drawn):
    """Lengths of the runs of equal exploratory actions of one environment."""
    change = np.flatnonzero(np.diff(drawn)) + 1
    return [len(run) for run in np.split(drawn, change) if run[0] != GREEDY]


def test_exploratory_actions_last_for_a_random_number_of_decisions():
    exploration = EpsilonGreedy(constant(0.02), 1, np.random.default_rng(0), max_repeat=10)
    lengths = np.array(runs_of(choices(exploration, 60_000, all_available(1, 50))[:, 0]))
    weight = np.arange(1, 11) ** -2.0
    expected = weight / weight.sum()
    counts = np.bincount(lengths, minlength=11)[1:11] / len(lengths)
    assert counts == pytest.approx(expected, abs=0.04)
    assert lengths.max() <= 12  # two runs of one action may touch


def test_actions_do_not_go_on_unless_asked_to():
    lengths = runs_of(choices(EpsilonGreedy(constant(0.02), 1, np.random.default_rng(0)), 20_000)[:, 0])
    assert np.mean(np.array(lengths) == 1) > 0.97


def test_an_action_that_is_no_longer_available_is_dropped():
    exploration = EpsilonGreedy(constant(1.0), 1, np.random.default_rng(0), max_repeat=1000)
    for _ in range(300):
        action = int(exploration.choose(all_available(1), 0)[0])
        mask = all_available(1)
        mask[0, action] = False
        assert exploration.choose(mask, 0)[0] not in (action, GREEDY)


def test_an_action_does_not_go_on_into_the_next_episode():
    always_once = EpsilonGreedy(LinearEpsilon(1.0, 0.0, 1), 2, np.random.default_rng(3), max_repeat=1000)
    always_once.choose(all_available(2), 0)
    while (always_once.choose(all_available(2), 1) == GREEDY).any():  # until both are in the middle of a run
        always_once.choose(all_available(2), 0)
    always_once.end_episodes(np.array([True, False]))
    after = always_once.choose(all_available(2), 1)
    assert after[0] == GREEDY


def test_choices_go_on_from_a_saved_state():
    one = EpsilonGreedy(constant(0.3), 3, np.random.default_rng(0), max_repeat=8)
    choices(one, 100)
    state = json.loads(json.dumps(one.state_dict()))
    other = EpsilonGreedy(constant(0.3), 3, np.random.default_rng(99), max_repeat=8)
    other.load_state_dict(state)
    assert np.array_equal(choices(one, 200), choices(other, 200))


def test_choices_depend_on_the_generator_alone():
    np.random.default_rng(1).random(10)
    one, other = (choices(EpsilonGreedy(constant(0.5), 3, np.random.default_rng(4)), 50) for _ in range(2))
    assert np.array_equal(one, other)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LinearEpsilon(1.5, 0.0, 1), r"epsilon start: expected a number in \[0, 1\], got 1.5"),
        (lambda: LinearEpsilon(1.0, -0.1, 1), r"epsilon end: expected a number in \[0, 1\], got -0.1"),
        (lambda: LinearEpsilon(1.0, float("nan"), 1), r"epsilon end: expected a number in \[0, 1\], got nan"),
        (lambda: LinearEpsilon(1.0, 0.1, 0), "decay_steps: expected a positive number, got 0"),
        (lambda: ExponentialEpsilon(1.0, 0.0, 10), "expected both ends above 0, got 1.0 and 0.0"),
        (lambda: LadderEpsilon(constant(0.4), -1.0, 2), "expected exponent >= 0 and num_envs >= 1, got -1.0 and 2"),
        (lambda: EpsilonGreedy(constant(0.4), 0, np.random.default_rng(0)), "expected num_envs >= 1"),
        (
            lambda: EpsilonGreedy(constant(0.4), 1, np.random.default_rng(0), max_repeat=0),
            "max_repeat >= 1, got 1 and 0",
        ),
        (lambda: coin().choose(np.zeros((2, 3), dtype=bool), 0), "expected an available action in every environment"),
        (lambda: coin().choose(np.ones((3, 3), dtype=bool), 0), r"mask: expected shape \(2, A\), got \(3, 3\)"),
        (lambda: coin().load_state_dict({"action": [0], "remaining": [0]}), "expected 2 environments, got 1"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def coin():
    return EpsilonGreedy(constant(0.5), 2, np.random.default_rng(0))
