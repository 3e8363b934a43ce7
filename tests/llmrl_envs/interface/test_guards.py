"""The fall-behind guard: patient with noise, firm with lost gains."""

import numpy as np
from llmrl_envs.interface.guards import PATIENCE_DECISIONS, FallBehindGuard
from llmrl_envs.interface.loss_tracker import LossTracker


def run(make_statistics, levels, *, noise=0.0, steps=6):
    """Loss levels decision by decision; returns (at best, must fall back) of each."""
    rng = np.random.default_rng(0)
    tracker, guard = LossTracker(1), FallBehindGuard(1)
    found = []
    for level in levels:
        tracker.update(make_statistics(level * np.exp(rng.normal(0.0, noise, steps))))
        at_best, behind = guard.update(tracker)
        found.append((bool(at_best[0]), bool(behind[0])))
    return found


def test_a_falling_loss_is_always_at_its_best(make_statistics):
    assert run(make_statistics, [3.0, 2.5, 2.0, 1.5]) == [(True, False)] * 4


def test_a_job_that_lost_its_gain_must_fall_back_after_some_patience(make_statistics):
    found = run(make_statistics, [3.0, 2.0, 1.0] + [2.5] * 4)
    assert PATIENCE_DECISIONS == 3
    assert [behind for _, behind in found] == [False] * 5 + [True] * 2
    assert not any(at_best for at_best, _ in found[3:])


def test_a_short_setback_is_forgiven(make_statistics):
    found = run(make_statistics, [3.0, 1.0, 2.5, 2.5, 1.0, 2.5, 2.5, 1.0])
    assert not any(behind for _, behind in found)


def test_noise_is_no_reason_to_fall_back(make_statistics):
    found = run(make_statistics, [2.0] * 30, noise=0.3)
    assert not any(behind for _, behind in found)


def test_a_loss_that_was_never_finite_is_neither_best_nor_behind(make_statistics):
    assert run(make_statistics, [np.nan, np.inf, np.nan]) == [(False, False)] * 3


def test_only_the_lanes_that_start_anew_are_forgotten(make_statistics):
    tracker, guard = LossTracker(2), FallBehindGuard(2)
    for level in (3.0, 1.0, 2.5, 2.5):
        tracker.update(make_statistics(np.full((2, 6), level)))
        guard.update(tracker)
    tracker.reset(np.array([1]))
    guard.reset(np.array([1]))
    tracker.update(make_statistics(np.full((2, 6), 2.5)))
    at_best, behind = guard.update(tracker)
    assert at_best.tolist() == [False, True]
    assert behind.tolist() == [True, False]


def test_a_restored_guard_goes_on_counting(make_statistics):
    tracker, first, second = LossTracker(1), FallBehindGuard(1), FallBehindGuard(1)
    for level in (3.0, 1.0, 2.5, 2.5):
        tracker.update(make_statistics([level] * 6))
        first.update(tracker)
    second.load_state_dict(first.state_dict())
    tracker.update(make_statistics([2.5] * 6))
    assert second.update(tracker)[1].tolist() == first.update(tracker)[1].tolist() == [True]


def test_a_job_that_skips_every_step_must_fall_back_too(make_statistics):
    """Its tracker knows nothing new, and the last loss that it knew may have been the best."""
    tracker, guard = LossTracker(1), FallBehindGuard(1)
    found = []
    for level in (3.0, 2.0, np.nan, np.nan, np.nan):
        statistics = make_statistics([level] * 4)
        tracker.update(statistics)
        found.append([bool(lanes[0]) for lanes in guard.update(tracker, statistics.stuck)])
    assert found == [[True, False], [True, False], [False, False], [False, False], [False, True]]


def test_one_finite_step_is_enough_not_to_be_stuck(make_statistics):
    assert make_statistics([[np.nan, np.nan], [np.nan, 2.0]]).stuck.tolist() == [True, False]
