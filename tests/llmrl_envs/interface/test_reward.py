"""Rewards: they add up to the final improvement, and divergence is the worst that can happen."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmrl_envs.errors import UserError
from llmrl_envs.interface.account import EpisodeAccount
from llmrl_envs.interface.reward import RewardSpec, interval_reward

LOG_LOSSES = st.lists(st.floats(-3.0, 3.0), min_size=2, max_size=30)


def episode_return(spec, losses, scale, reference=None, choices=None):
    """Return of an episode of equal intervals that never diverged."""
    count = len(losses) - 1
    reference = reference or [0.0] * (count + 1)
    return sum(
        interval_reward(
            spec,
            before=losses[k],
            after=losses[k + 1],
            scale=scale,
            reference_drop=reference[k] - reference[k + 1],
            switched=bool(choices and choices[k] & 1),
            rolled_back=bool(choices and choices[k] & 2),
            budget_share=1 / count,
        )
        for k in range(count)
    )


def test_one_reward_by_hand():
    spec = RewardSpec(switch_cost=0.01, rollback_cost=0.1, time_cost=0.5)
    costs = {"switched": True, "rolled_back": True, "budget_share": 0.2}
    assert interval_reward(spec, before=1.0, after=0.7, scale=0.2, **costs) == pytest.approx(1.5 - 0.01 - 0.1 - 0.1)
    spec = RewardSpec(baseline="reference")
    assert interval_reward(spec, before=1.0, after=0.7, scale=0.2, reference_drop=0.1) == pytest.approx(1.0)


@given(losses=LOG_LOSSES, reference_end=st.floats(-3.0, 3.0))
def test_the_return_is_the_final_improvement_in_units_of_the_references(losses, reference_end):
    spec = RewardSpec()
    scale = spec.scale(losses[0], reference_end)
    assert scale >= 0.02
    assert episode_return(spec, losses, scale) == pytest.approx((losses[0] - losses[-1]) / scale, abs=1e-9)


def test_a_return_of_one_means_as_good_as_the_reference():
    spec = RewardSpec()
    scale = spec.scale(2.0, 1.4)
    assert episode_return(spec, [2.0, 1.9, 1.4], scale) == pytest.approx(1.0)
    against = RewardSpec(baseline="reference")
    assert episode_return(against, [2.0, 1.9, 1.4], scale, [2.0, 1.5, 1.4]) == pytest.approx(0.0)


@settings(max_examples=200)
@given(
    spec=st.builds(
        RewardSpec,
        baseline=st.sampled_from(["none", "reference"]),
        switch_cost=st.floats(0.0, 2.0),
        rollback_cost=st.floats(0.0, 2.0),
        time_cost=st.floats(0.0, 2.0),
        minimum_scale=st.floats(1e-3, 1.0),
        divergence_margin=st.floats(1e-3, 5.0),
    ),
    initial=st.floats(-3.0, 3.0),
    reference=st.lists(st.floats(-5.0, 5.0), min_size=2, max_size=20),
    heights=st.lists(st.floats(0.0, 1.0), min_size=19, max_size=19),
    choices=st.lists(st.integers(0, 3), min_size=19, max_size=19),
)
def test_divergence_is_below_every_episode_that_did_not_diverge(spec, initial, reference, heights, choices):
    reference = [initial, *reference[1:]]
    scale = spec.scale(initial, reference[-1])
    rise = spec.divergence_rise(scale)
    # Losses anywhere up to the very limit, and the worst of costs.
    losses = [initial, *(initial + rise * (2 * height - 1) for height in heights[: len(reference) - 2]), initial + rise]
    count = len(losses) - 1
    assert spec.floor(scale, count) < episode_return(spec, losses, scale, reference, choices)


def test_a_loss_that_is_a_little_worse_than_at_first_is_no_divergence():
    spec = RewardSpec()
    assert spec.divergence_rise(0.02) == 0.5
    assert spec.divergence_rise(1.0) == 2.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("average_intervals", 1.5),
        ("average_intervals", math.nan),
        ("switch_cost", -0.1),
        ("time_cost", -1.0),
        ("minimum_scale", 0.0),
        ("divergence_margin", -1.0),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(UserError, match=f"reward.{name}"):
        RewardSpec(**{name: value})


def test_rewards_are_plain_floats():
    assert type(interval_reward(RewardSpec(), before=1.0, after=np.e, scale=1.0)) is float


def test_holding_is_subtracted_and_a_divergence_stays_below():
    spec = RewardSpec(baseline="hold", measured="end")
    reference = [1.0, 1.0, 1.0, 0.5]
    returns = []
    for final in (0.4, 0.5, 1.0 + spec.divergence_rise(0.5), 9.0):
        account = EpisodeAccount(spec, reference, (2, 2, 2))
        for _ in range(2):
            account.settle(1.0, switched=False, rolled_back=False, baseline_drop=0.0)
        account.settle(final, switched=False, rolled_back=False, baseline_drop=0.5)
        returns.append(account.episode_return)
    assert returns[:2] == [pytest.approx(0.2), pytest.approx(0.0)]
    assert returns[3] < returns[2]


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"baseline": "hold"}, "measured"),
        ({"baseline": "best"}, "baseline"),
        ({"measured": "never"}, "measured"),
        ({"measured": "end", "average_intervals": 0.5}, "average_intervals"),
    ],
)
def test_choices_that_do_not_go_together_are_refused_by_name(settings, where):
    with pytest.raises(UserError, match=f"reward.{where}"):
        RewardSpec(**settings)
