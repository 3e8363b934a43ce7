"""The fall-behind guard: patient with noise, firm with lost gains; and the guard against overfitting."""

import numpy as np
import pytest
from llmrl_envs.interface.guards import PATIENCE_DECISIONS, FallBehindGuard, OverfitGuard
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


# -- overfitting ----------------------------------------------------------------------------------------------------

BUDGET = np.array([120])


def validate(guard, losses, *, every=10, first=10):
    """Validation losses, one every so many steps; returns (at best, turned) of each."""
    found = []
    for index, loss in enumerate(losses):
        at_best, turned = guard.update(np.array([loss]), np.array([first + every * index]), BUDGET)
        found.append((bool(at_best[0]), bool(turned[0])))
    return found


def test_a_falling_validation_loss_never_turns():
    assert validate(OverfitGuard(1), [3.0, 2.0, 1.5, 1.4]) == [(True, False)] * 4


@pytest.mark.parametrize(
    ("losses", "turns"),
    [
        ([5.0, 1.0, 1.07], False),  # two per cent of the gain are 0.08
        ([5.0, 1.0, 1.09], True),
        ([2.1, 2.0, 2.015], False),  # one per cent of the loss is 0.02
        ([2.1, 2.0, 2.025], True),
        ([2.0, 2.01, 2.03], True),  # against the first, which is the lowest
    ],
)
def test_it_has_turned_when_it_stands_above_its_lowest_by_more_than_the_tolerance(losses, turns):
    assert validate(OverfitGuard(1), losses)[-1] == (False, turns)


@pytest.mark.parametrize(("num_targets", "turns"), [(64, False), (400, True), (np.inf, True)])
def test_of_few_targets_it_is_less_sure(num_targets, turns):
    guard = OverfitGuard(1)
    validate(guard, [0.7, 0.5])
    assert guard.update(np.array([0.55]), np.array([30]), BUDGET, np.array([num_targets]))[1][0] == turns


def test_a_job_may_turn_again_and_be_at_its_best_again():
    found = validate(OverfitGuard(1), [3.0, 2.0, 2.5, 2.5, 1.9, 2.5])
    assert [turned for _, turned in found] == [False, False, True, True, False, True]
    assert [at_best for at_best, _ in found] == [True, True, False, False, True, False]


def test_however_often_it_is_measured_a_twelfth_of_the_budget_passes_between_two_that_count():
    found = validate(OverfitGuard(1), [3.0, 2.9, 2.0, 2.5, 2.5, 2.6], every=5, first=5)
    assert found == [(True, False), (False, False), (True, False), (False, False), (False, True), (False, False)]


def test_the_first_loss_counts_before_the_first_step_too():
    guard = OverfitGuard(1)
    assert guard.due(np.array([0]), BUDGET)[0]
    assert validate(guard, [1.5, 1.6], first=0) == [(True, False), (False, True)]
    assert (guard.first[0], guard.best[0]) == (1.5, 1.5)


def test_turns_are_counted_until_the_loss_is_lower_than_ever():
    guard = OverfitGuard(1)
    counts = []
    for place, loss in enumerate([3.0, 2.0, 2.5, 2.01, 2.5, 1.9, 2.5]):
        validate(guard, [loss], first=10 * (place + 1))
        counts.append(int(guard.turns[0]))
    assert counts == [0, 0, 1, 1, 2, 0, 1]


def test_at_the_end_of_the_job_it_always_counts():
    guard = OverfitGuard(1)
    validate(guard, [3.0, 2.0])
    assert validate(guard, [2.0, 2.5], first=110)[-1] == (False, True)
    guard = OverfitGuard(1)
    guard.update(np.array([2.0]), np.array([118]), BUDGET)
    at_best, turned = guard.update(np.array([2.5]), BUDGET, BUDGET)
    assert (at_best[0], turned[0]) == (False, True)
    assert guard.update(np.array([1.0]), BUDGET, BUDGET)[0][0] == False  # noqa: E712 -- told twice


def test_a_loss_that_was_not_measured_says_nothing_and_one_that_is_infinite_turns():
    guard = OverfitGuard(1)
    assert validate(guard, [np.nan, 2.0, np.nan, np.inf]) == [
        (False, False), (True, False), (False, False), (False, True)
    ]  # fmt: skip
    assert validate(OverfitGuard(1), [np.inf, np.inf, 2.0, 3.0]) == [
        (False, False), (False, False), (True, False), (False, True)
    ]  # fmt: skip


def test_lanes_are_judged_and_forgotten_one_by_one():
    guard, steps, budgets = OverfitGuard(2), np.array([10, 10]), np.array([120, 1200])
    guard.update(np.array([3.0, np.nan]), steps, budgets)
    assert guard.knows.tolist() == [True, False]
    guard.update(np.array([4.0, 2.0]), steps * 2, budgets)
    assert (guard.knows.tolist(), guard.turns.tolist()) == ([True, True], [1, 0])
    guard.reset(np.array([0]))
    assert guard.turns.tolist() == [0, 0]
    at_best, turned = guard.update(np.array([2.5, 2.5]), steps * 40, budgets)
    assert at_best.tolist() == [True, False]
    assert turned.tolist() == [False, True]


def test_a_restored_guard_goes_on_and_one_without_a_state_begins():
    first, second = OverfitGuard(1), OverfitGuard(1)
    validate(first, [3.0, 2.0])
    second.load_state_dict(first.state_dict())
    second.load_state_dict({})
    assert validate(second, [2.5], first=30) == validate(first, [2.5], first=30) == [(False, True)]
