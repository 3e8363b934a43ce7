"""Steering: schedule, observation and guard kept in step, and taken over when the policy fails."""

import numpy as np
import pytest
from llmrl_envs.interface.action import action_table
from llmrl_envs.interface.observation import ObservationSpec
from llmrl_envs.interface.schedule import Schedule
from llmrl_envs.interface.steering import Steering

MOVES = action_table("moves")
FIVE, TWENTY = np.array([5.0]), np.array([20.0])


def new_steering(actions="moves", *, guarded=True, lanes=1):
    table = action_table(actions)
    schedule = Schedule(table, np.full(lanes, 100), np.full(lanes, 1e-3))
    return Steering(ObservationSpec(table), schedule, guarded=guarded)


def begin(steering, make_statistics):
    return steering.begin(make_statistics(np.zeros((1, 0)), step=np.array([0])), FIVE, TWENTY)


def run(steering, make_statistics, levels, action="hold"):
    updates = []
    for level in levels:
        steering.apply(np.array([steering.schedule.table.names.index(action)]))
        step = steering.schedule.step + 6
        updates.append(steering.observe(make_statistics([level] * 6, step=step)))
    return updates


def test_the_first_observation_knows_the_rate_and_no_losses(make_statistics):
    steering = new_steering()
    observation = begin(steering, make_statistics)
    assert observation.shape == (1, steering.spec.size)
    assert observation[0, steering.spec.names.index("has_loss")] == 0.0
    assert steering.schedule.peak_rate()[0] == 2.5e-3 * 4.0


def test_an_interval_moves_the_clock_the_norms_and_the_observation(make_statistics):
    steering = new_steering()
    begin(steering, make_statistics)
    steering.apply(np.array([MOVES.names.index("one_up")]))
    statistics = make_statistics([2.0] * 6, step=np.array([6]), update_norm=np.array([2.5]))
    observation = dict(zip(steering.spec.names, steering.observe(statistics).observation[0].tolist(), strict=True))
    assert steering.schedule.step[0] == 6
    assert steering.schedule.peak_rate()[0] == pytest.approx(2.5e-3 * 1.7 * 8.0)
    assert observation["progress"] == pytest.approx(0.06)
    assert observation["last_one_up"] == 1.0


def test_a_job_at_its_best_is_worth_a_snapshot_while_it_may_roll_back(make_statistics):
    steering = new_steering()
    begin(steering, make_statistics)
    updates = run(steering, make_statistics, [3.0, 2.0, 2.5, 1.0])
    assert [bool(update.at_best[0]) for update in updates] == [True, True, False, True]
    steering.schedule.rollbacks_left[:] = 0
    assert not run(steering, make_statistics, [0.5])[0].at_best[0]


def test_a_table_without_rollback_asks_for_no_snapshots(make_statistics):
    steering = new_steering("moves_only")
    begin(steering, make_statistics)
    assert not any(update.at_best[0] for update in run(steering, make_statistics, [3.0, 2.0, 1.0]))


def test_a_failing_policy_is_overruled_once_and_for_good(make_statistics):
    steering = new_steering()
    begin(steering, make_statistics)
    updates = run(steering, make_statistics, [3.0, 2.0, 1.0, 2.5, 2.5, 2.5, 2.5, 2.5])
    assert [bool(update.fell_back[0]) for update in updates] == [False] * 5 + [True] + [False] * 2
    rates = [float(steering.schedule.learning_rate(np.array([step]))[0]) for step in (50, 75, 100)]
    assert rates[1] == pytest.approx(rates[0] / 2)
    assert rates[2] == 0.0
    assert steering.schedule.mask()[0].sum() == 1


def test_an_unguarded_job_is_left_to_the_policy(make_statistics):
    steering = new_steering(guarded=False)
    begin(steering, make_statistics)
    updates = run(steering, make_statistics, [3.0, 2.0, 1.0] + [2.5] * 6)
    assert not any(update.fell_back[0] for update in updates)
    assert not steering.schedule.fallen_back[0]


def test_a_restored_steering_goes_on_as_if_never_interrupted(make_statistics):
    first, second = new_steering(), new_steering()
    begin(first, make_statistics)
    run(first, make_statistics, [3.0, 1.0, 2.5, 2.5], action="one_up")
    second.load_state_dict(first.state_dict())
    updates = [run(each, make_statistics, [2.5, 2.4, 0.5], action="one_down") for each in (first, second)]
    for one, other in zip(*updates, strict=True):
        np.testing.assert_array_equal(one.observation, other.observation)
        assert (one.at_best[0], one.fell_back[0]) == (other.at_best[0], other.fell_back[0])
    assert updates[0][0].fell_back[0]
    for name, value in first.state_dict().items():
        np.testing.assert_array_equal(value, second.state_dict()[name], err_msg=name)


# -- validation losses ----------------------------------------------------------------------------------------------


def run_validated(steering, make_statistics, losses):
    """Intervals of twenty steps with a validation loss after each; returns (at best, turned) of each."""
    found = []
    for loss in losses:
        steering.apply(np.array([steering.schedule.table.hold]))
        update = steering.observe(make_statistics([1.0] * 20, step=steering.schedule.step + 20))
        verdict = steering.validated(np.array([loss]))
        found.append((bool(verdict.at_best[0]), bool(verdict.turned[0]), update))
    return found


def test_a_job_whose_validation_loss_turns_goes_on_lower_and_may_go_lower_still(make_statistics):
    steering = new_steering()
    begin(steering, make_statistics)
    level = steering.schedule.level[0]
    found = run_validated(steering, make_statistics, [3.0, 2.0, 2.5, 2.5])
    assert [turned for _, turned, _ in found] == [False, False, True, True]
    assert [at_best for at_best, _, _ in found] == [True, True, False, False]
    assert steering.schedule.level[0] == level - 3  # by one, and then by two
    assert steering.schedule.fallen_back[0]
    assert steering.schedule.cooldown_start[0] == 60


def test_a_job_that_was_at_its_best_again_goes_down_by_one_level_again(make_statistics):
    steering = new_steering()
    begin(steering, make_statistics)
    level = steering.schedule.level[0]
    run_validated(steering, make_statistics, [3.0, 2.0, 2.5, 1.9, 2.5])
    assert steering.schedule.level[0] == level - 2


def test_a_job_that_never_was_better_than_before_its_first_step_is_taken_back_to_it(make_statistics):
    steering = new_steering()
    begin(steering, make_statistics)
    assert steering.wants_validation[0]
    assert steering.validated(np.array([1.5])).at_best[0]
    found = run_validated(steering, make_statistics, [1.6, 1.7, 1.4])
    assert [(at_best, turned) for at_best, turned, _ in found] == [(False, True), (False, True), (True, False)]


def test_a_job_that_validates_says_by_that_loss_alone_which_state_is_best(make_statistics):
    steering = new_steering()
    begin(steering, make_statistics)
    updates = [update for _, _, update in run_validated(steering, make_statistics, [3.0, 2.0, 1.0])]
    assert [bool(update.at_best[0]) for update in updates] == [True, False, False]


def test_no_policy_sees_what_the_guard_is_told(make_statistics):
    told, not_told = (new_steering("moves_only") for _ in range(2))
    observations = []
    for steering, losses in ((told, [3.0, 2.0]), (not_told, [np.nan, np.nan])):
        begin(steering, make_statistics)
        found = run_validated(steering, make_statistics, losses)
        observations.append([update.observation.tolist() for _, _, update in found])
    assert observations[0] == observations[1]


def test_without_guards_a_validation_loss_changes_nothing(make_statistics):
    steering = new_steering(guarded=False)
    begin(steering, make_statistics)
    assert not steering.wants_validation[0]
    found = run_validated(steering, make_statistics, [3.0, 2.0, 9.0])
    assert not any(at_best or turned for at_best, turned, _ in found)
    assert not steering.schedule.fallen_back[0]


def test_a_new_job_in_a_lane_knows_no_validation_loss_of_the_old_one(make_statistics):
    steering = new_steering(lanes=2)
    zeros = make_statistics(np.zeros((2, 0)), step=np.zeros(2, np.int64))
    steering.begin(zeros, np.repeat(FIVE, 2), np.repeat(TWENTY, 2))
    steering.schedule.advance(np.array([30, 30]))
    steering.validated(np.array([2.0, 2.0]))
    fresh = Schedule(MOVES, np.array([100]), np.array([1e-3]))
    steering.begin_lanes(
        np.array([1]), fresh, make_statistics(np.zeros((1, 0)), step=np.array([0])), FIVE, TWENTY
    )  # fmt: skip
    assert steering.overfit.knows.tolist() == [True, False]
