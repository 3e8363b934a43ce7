"""Schedules: what actions make of a learning rate, alone and for many jobs side by side."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmrl_envs.errors import UserError
from llmrl_envs.interface.action import ACTION_TABLES, DEFAULT_RELATIVE_UPDATE, UpdateChoice, action_table
from llmrl_envs.interface.base_schedule import base_factor, decision_intervals
from llmrl_envs.interface.job_scale import LORA_LEVEL_SCALE, leaning_scale
from llmrl_envs.interface.schedule import QUASI_HYPERBOLIC_SHARE, TIGHT_CLIPPING, Schedule
from llmrl_envs.interface.schedule_settings import ScheduleSettings
from llmrl_envs.interface.statistics import TuningMode


def build(actions="moves", *, total_steps=100, given_rate=1e-3, norms=(2.0, 8.0), **changes):
    """One job whose ||u|| and ||theta|| are known."""
    capabilities = changes.pop("capabilities", frozenset(UpdateChoice))
    made = Schedule(
        action_table(actions),
        np.array([total_steps]),
        np.array([given_rate]),
        ScheduleSettings(**changes),
        capabilities,
    )
    if norms is not None:
        made.observe_norms(np.array([norms[0]]), np.array([norms[1]]))
    return made


def do(schedule, *names):
    for name in names:
        schedule.apply(np.array([schedule.table.names.index(name)]))


def at(schedule, step):
    schedule.advance(np.array([step]))


def available(schedule):
    return {name for name, allowed in zip(schedule.table.names, schedule.mask()[0], strict=True) if allowed}


def rate(schedule, step):
    return float(schedule.learning_rate(np.array([step]))[0])


# -- base schedules -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        # T = 12, warm-up 2: 1/3, 2/3, then 10 steps of decay
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0]),
        ("wsd", [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0.5, 0]),
        ("wsd_40", [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]),
        ("cosine", [1 / 3, 2 / 3, 1, 0.97553, 0.90451, 0.79389, 0.65451, 0.5, 0.34549, 0.20611, 0.09549, 0.02447, 0]),
    ],
)  # fmt: skip
def test_base_factors_by_hand(base, expected):
    found = base_factor(base, np.arange(13), np.array(12), np.array(2))
    assert found == pytest.approx(np.array(expected), abs=1e-5)


def test_without_warmup_the_first_step_is_at_the_peak():
    assert base_factor("linear", np.arange(3), np.array(4), np.array(0)).tolist() == [1.0, 0.75, 0.5]


def test_settings_out_of_range_are_refused_by_name():
    bad = {
        "base": "linaer", "warmup_fraction": 1.0, "start": "gvien", "rollbacks": -1, "cooldown_progress": 1.5,
        "smoothing": 0.0, "earliest_cooldown": 1.5, "earliest_move": -0.1, "latest_move": 1.1,
        "decisions_per_job": 0,
    }  # fmt: skip
    for name, value in bad.items():
        with pytest.raises(UserError, match=name if name != "base" else "base schedule"):
            ScheduleSettings(**{name: value})


# -- decisions ------------------------------------------------------------------------------------------------------


def test_intervals_fill_every_budget_exactly_and_are_dense_at_first():
    for total_steps in range(1, 3001):
        intervals = decision_intervals(total_steps)
        usual = max(4, round(total_steps / 40))
        assert sum(intervals) == total_steps
        assert min(intervals) > 0
        assert len(intervals) <= 50
        assert all(length <= usual + usual // 2 for length in intervals)
        if total_steps >= 60:
            assert list(intervals[:-1]) == sorted(intervals[:-1])
            assert intervals[0] < intervals[4] <= intervals[7] == usual


def test_intervals_of_a_budget_known_by_heart():
    assert decision_intervals(1) == (1,)
    assert decision_intervals(400) == (2, 2, 2, 2, 5, 5, 5) + (10,) * 37 + (7,)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        decision_intervals(0)


def test_intervals_of_another_number_of_decisions():
    for num_decisions in (1, 3, 20, 200):
        for early in (False, True):
            for total_steps in (1, 7, 60, 401, 3000):
                intervals = decision_intervals(total_steps, num_decisions, early=early)
                usual = max(4, round(total_steps / num_decisions))
                assert sum(intervals) == total_steps
                assert max(intervals) <= usual + usual // 2
                assert len(intervals) <= num_decisions * 9 // 8 + (9 if early else 2)
                assert early or set(intervals[:-1]) <= {usual}


def test_settings_tell_when_decisions_come():
    assert ScheduleSettings().intervals(400) == decision_intervals(400)
    assert ScheduleSettings(decisions_per_job=4, early_decisions=False).intervals(400) == (100,) * 4
    assert "decisions_per_job" not in ScheduleSettings().identity()
    assert ScheduleSettings(decisions_per_job=4).identity() != ScheduleSettings().identity()


# -- levels and rates -----------------------------------------------------------------------------------------------


def test_the_relative_update_of_a_step_is_the_level_times_the_base():
    schedule = build(norms=(3.0, 60.0), warmup_fraction=0.1)
    do(schedule, "two_up")
    level = 2.5e-3 * 1.7**2
    for step in (0, 5, 10, 50, 99):
        base = base_factor("linear", np.array(step), np.array(100), np.array(10))
        assert rate(schedule, step) * 3.0 / 60.0 == pytest.approx(level * base, rel=1e-12)


@pytest.mark.parametrize("start", ["default", "given"])
def test_a_level_means_more_for_adapters_but_a_given_rate_is_a_given_rate(start):
    schedule = build(norms=None, start=start, warmup_fraction=0.0, given_rate=1e-3)
    schedule.observe_job(np.array([TuningMode.LORA]))
    schedule.observe_norms(np.array([2.0]), np.array([8.0]))
    expected = 1e-3 if start == "given" else LORA_LEVEL_SCALE * 2.5e-3 * 4.0
    assert rate(schedule, 0) == pytest.approx(expected, rel=1e-12)
    schedule.reset(np.array([0]), np.array([100]), np.array([1e-3]))
    schedule.observe_norms(np.array([2.0]), np.array([8.0]))
    assert rate(schedule, 0) == pytest.approx(1e-3 if start == "given" else 2.5e-3 * 4.0, rel=1e-12)


def test_a_state_of_version_0_2_loads():
    schedule = build(norms=(2.0, 8.0))
    schedule.observe_job(np.array([TuningMode.LORA]))
    state = schedule.state_dict()
    state["mode_scale"] = state.pop("job_scale")
    other = build(norms=None)
    other.load_state_dict(state)
    assert rate(other, 0) == rate(schedule, 0)


def test_rates_are_unknown_until_norms_are():
    schedule = build(norms=None)
    assert np.isnan(rate(schedule, 0))
    for bad in ((0.0, 1.0), (np.nan, 1.0), (np.inf, 1.0), (1.0, 0.0)):
        schedule.observe_norms(np.array([bad[0]]), np.array([bad[1]]))
        assert np.isnan(rate(schedule, 0))
    schedule.observe_norms(np.array([1.0]), np.array([2.0]))
    assert rate(schedule, 50) > 0.0


def test_early_norms_count_at_once_and_later_ones_are_smoothed_in_log_space():
    schedule = build(norms=(1.0, 1.0), smoothing=0.25, base="constant", warmup_fraction=0.0)
    for ratio in (2.0, 3.0, 5.0, 7.0):
        schedule.observe_norms(np.array([1.0]), np.array([ratio]))
        assert rate(schedule, 0) == pytest.approx(2.5e-3 * ratio)
    schedule.observe_norms(np.array([1.0]), np.array([7.0 * 16.0]))
    assert rate(schedule, 0) == pytest.approx(2.5e-3 * 7.0 * 2.0)  # 16 ** 0.25
    schedule.observe_norms(np.array([np.nan]), np.array([1.0]))
    assert rate(schedule, 0) == pytest.approx(2.5e-3 * 7.0 * 2.0)


@pytest.mark.parametrize("given_rate", [1e-6, 3e-4, 1e-3, 5.0])
def test_a_job_that_starts_as_given_has_exactly_that_rate_at_the_peak(given_rate):
    schedule = build(given_rate=given_rate, start="given", warmup_fraction=0.0)
    assert rate(schedule, 0) == pytest.approx(given_rate, rel=1e-12)


def test_a_good_given_rate_outlasts_the_filling_of_the_moments():
    """Adam's update shrinks to a fifth while its moments fill; the level follows, the rate stays."""
    schedule = build(given_rate=1e-3, start="given", warmup_fraction=0.0, base="constant", norms=(100.0, 40.0))
    for update_norm in (95.0, 70.0, 40.0, 20.0):
        schedule.observe_norms(np.array([update_norm]), np.array([40.0]))
        assert rate(schedule, 0) == pytest.approx(1e-3, rel=1e-12)
    level = action_table("moves").levels[int(schedule.level[0])] * schedule.grid_shift[0]
    assert level == pytest.approx(1e-3 * 20.0 / 40.0)
    assert 1.7**-0.5 <= schedule.grid_shift[0] <= 1.7**0.5
    do(schedule, "one_up")
    assert rate(schedule, 0) == pytest.approx(1.7e-3)
    schedule.observe_norms(np.array([10.0]), np.array([40.0]))
    assert rate(schedule, 0) > 2e-3  # from here on the level is held, not the rate


def test_a_move_while_the_moments_fill_multiplies_the_given_rate():
    schedule = build(given_rate=1e-3, start="given", warmup_fraction=0.0, norms=(100.0, 40.0))
    do(schedule, "one_down")
    schedule.observe_norms(np.array([30.0]), np.array([40.0]))
    assert rate(schedule, 0) == pytest.approx(1e-3 / 1.7)
    assert schedule.highest_level[0] == schedule.level[0] + 1


def test_factors_multiply_the_given_rate_and_need_no_norms():
    schedule = build("factors", given_rate=2e-3, norms=None, warmup_fraction=0.0)
    assert rate(schedule, 0) == 2e-3
    do(schedule, "quadruple", "double", "down_sqrt2")
    assert rate(schedule, 50) == pytest.approx(2e-3 * 8 / 2**0.5 * 0.5)


def test_levels_are_chosen_whatever_the_present_one():
    schedule = build("levels", warmup_fraction=0.0)
    schedule.apply(np.array([8]))
    assert rate(schedule, 0) == pytest.approx(2.5e-3 * 1.7**4 * 4.0)
    do(schedule, "hold")
    assert rate(schedule, 0) == pytest.approx(2.5e-3 * 4.0)


# -- masks ----------------------------------------------------------------------------------------------------------


def test_at_first_there_is_nothing_to_roll_back_to_and_no_reason_to_cool_down():
    assert available(build()) == set(action_table("moves").names) - {"rollback", "cooldown"}


def test_moves_off_the_grid_are_unavailable():
    schedule = build()
    do(schedule, "two_up", "one_up")
    assert {"one_up", "two_down"} <= available(schedule)
    assert "two_up" not in available(schedule)
    do(schedule, "one_up")
    assert "one_up" not in available(schedule)
    for _ in range(4):
        do(schedule, "two_down")
    assert {"two_down", "one_down"} & available(schedule) == set()


def test_a_rollback_needs_a_snapshot_and_uses_one_up():
    schedule = build(rollbacks=1)
    assert "rollback" not in available(schedule)
    schedule.has_snapshot[:] = True
    assert "rollback" in available(schedule)
    level = schedule.level[0]
    carried_out, now = schedule.apply(np.array([schedule.table.names.index("rollback")]))
    assert now.tolist() == [True]
    assert schedule.table.names[carried_out[0]] == "rollback"
    assert schedule.level[0] == level - 1
    assert "rollback" not in available(schedule)
    assert not schedule.may_roll_back[0]


@pytest.mark.parametrize("choice", [c for c in UpdateChoice if c is not UpdateChoice.NONE])
def test_what_the_host_cannot_do_is_unavailable(choice):
    schedule = build(capabilities=frozenset(UpdateChoice) - {choice})
    schedule.has_snapshot[:] = True
    at(schedule, 50)
    assert available(schedule) == set(schedule.table.names) - {choice.value}
    assert schedule.may_roll_back[0] == (choice is not UpdateChoice.ROLLBACK)


def test_nothing_can_roll_back_where_no_action_does():
    assert not build("moves_only").may_roll_back[0]


def test_after_a_cooldown_only_holding_is_left_and_the_rate_falls_to_zero():
    schedule = build(warmup_fraction=0.0, base="constant")
    at(schedule, 24)
    assert "cooldown" not in available(schedule)
    at(schedule, 40)
    do(schedule, "one_up", "cooldown")
    assert available(schedule) == {"hold"}
    peak = 2.5e-3 * 1.7 * 4.0
    found = [rate(schedule, step) for step in (40, 55, 70, 85, 100)]
    assert found == pytest.approx([peak, 0.75 * peak, 0.5 * peak, 0.25 * peak, 0.0])
    do(schedule, "two_up", "freeze")
    assert rate(schedule, 70) == pytest.approx(0.5 * peak)
    assert not schedule.frozen[0]


def test_a_cooldown_may_begin_as_early_as_the_settings_say_but_not_within_the_warmup():
    schedule = build(base="wsd_40", warmup_fraction=0.1, earliest_cooldown=0.05)
    at(schedule, 9)
    assert "cooldown" not in available(schedule)
    at(schedule, 10)
    assert "cooldown" in available(schedule)
    do(schedule, "cooldown")
    linear = build(warmup_fraction=0.1)
    assert [rate(schedule, step) for step in (10, 40, 100)] == pytest.approx([rate(linear, s) for s in (10, 40, 100)])


@pytest.mark.parametrize("actions", ["moves", "levels"])
def test_the_level_stays_until_the_settings_let_it_move(actions):
    """What changes no level may be done all the same."""
    schedule = build(actions, earliest_move=0.2)
    moving = {a.name for a in schedule.table.actions if a.move or a.level is not None} - {"hold"}
    at(schedule, 19)
    assert not moving & available(schedule)
    assert {"hold", "freeze"} <= available(schedule) or actions == "levels"
    at(schedule, 20)
    assert moving & available(schedule)


def test_the_level_stays_once_it_is_too_late_to_move_it():
    schedule = build("moves", latest_move=0.2)
    at(schedule, 20)
    assert {"one_up", "two_down"} <= available(schedule)
    at(schedule, 21)
    assert available(schedule) >= {"hold", "freeze"}
    assert not {"one_up", "two_down"} & available(schedule)


def test_a_level_that_may_rise_by_one_place_rises_once_and_guards_go_below_the_default():
    schedule = build("rise")
    assert "one_up" in available(schedule)
    do(schedule, "one_up")
    assert schedule.level_value()[0] == pytest.approx(1.7 * DEFAULT_RELATIVE_UPDATE)
    assert "one_up" not in available(schedule)
    schedule.fall_back(np.array([True]))
    assert schedule.level_value()[0] == pytest.approx(DEFAULT_RELATIVE_UPDATE / 1.7)


def test_settings_that_earlier_versions_lack_change_an_identity_only_where_they_are_set():
    assert not {"earliest_cooldown", "earliest_move", "latest_move"} & set(ScheduleSettings().identity())
    assert ScheduleSettings(earliest_cooldown=0.05).identity()["earliest_cooldown"] == 0.05
    assert ScheduleSettings().identity() == {
        "base": "linear", "warmup_fraction": 0.05, "start": "default", "rollbacks": 2, "cooldown_progress": 0.9,
        "smoothing": 0.5,
    }  # fmt: skip


def test_a_cooldown_goes_on_from_where_the_base_stood():
    schedule = build(warmup_fraction=0.0, base="cosine")
    at(schedule, 40)
    before = rate(schedule, 40)
    do(schedule, "cooldown")
    assert rate(schedule, 40) == pytest.approx(before)
    assert rate(schedule, 70) == pytest.approx(before / 2)


def test_late_in_the_budget_the_level_is_final():
    schedule = build(cooldown_progress=0.9)
    schedule.has_snapshot[:] = True
    at(schedule, 89)
    assert len(available(schedule)) == 9
    at(schedule, 90)
    assert available(schedule) == {"hold"}
    assert not schedule.may_roll_back[0]


@pytest.mark.parametrize("name", ["two_up", "rollback", "cooldown"])
def test_an_unavailable_action_counts_as_holding(name):
    schedule, holding = build(), build()
    for each in (schedule, holding):
        do(each, "two_up", "two_up")
    carried_out, rollback = schedule.apply(np.array([schedule.table.names.index(name)]))
    do(holding, "hold")
    assert schedule.table.names[carried_out[0]] == "hold"
    assert not rollback[0]
    assert_same(schedule.state_dict(), holding.state_dict())


def test_toggles_switch_on_and_off():
    schedule = build()
    do(schedule, "freeze", "tighten")
    assert schedule.frozen[0]
    assert schedule.clipping_factor()[0] == TIGHT_CLIPPING
    do(schedule, "freeze", "tighten")
    assert not schedule.frozen[0]
    assert schedule.clipping_factor()[0] == 1.0


def test_decisions_since_a_change_are_counted():
    schedule = build()
    do(schedule, "hold", "hold")
    assert schedule.decisions_since_change[0] == 2
    do(schedule, "one_up")
    assert schedule.decisions_since_change[0] == 0
    do(schedule, "hold", "tighten")
    assert schedule.decisions_since_change[0] == 0


@pytest.mark.parametrize("actions", [[9], [-1], [0, 0], []])
def test_actions_that_do_not_exist_are_a_programming_error(actions):
    with pytest.raises(ValueError, match=r"actions: expected int64\[1\] in \[0, 9\)"):
        build().apply(np.array(actions))


# -- falling back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("moves", "power"), [((), -1), (("two_up",), -1), (("two_down",), -3)])
def test_falling_back_decays_linearly_from_one_level_below_the_present_or_default_one(moves, power):
    schedule = build(warmup_fraction=0.0, base="constant")
    do(schedule, *moves, "freeze")
    at(schedule, 20)
    schedule.fall_back(np.array([True]))
    start = 2.5e-3 * 1.7**power * 4.0
    assert [rate(schedule, s) for s in (20, 60, 100)] == pytest.approx([start, start / 2, 0.0])
    assert not schedule.frozen[0]
    assert available(schedule) == {"hold"}
    at(schedule, 60)
    schedule.fall_back(np.array([True]))
    assert rate(schedule, 60) == pytest.approx(start / 2)
    schedule.step_down(np.array([0]))
    assert rate(schedule, 60) == pytest.approx(start / 2)
    schedule.step_down(np.array([1]))
    assert rate(schedule, 60) == pytest.approx(start / 2 / 1.7)
    schedule.step_down(np.array([9]))
    assert schedule.level[0] == 0


# -- many lanes -----------------------------------------------------------------------------------------------------

LANES = 3
STEPS = st.tuples(
    st.lists(st.integers(0, 6), min_size=LANES, max_size=LANES),  # action
    st.lists(st.integers(0, 12), min_size=LANES, max_size=LANES),  # optimizer steps
    st.lists(st.sampled_from([0.5, 1.0, 3.0, np.nan, 0.0]), min_size=LANES, max_size=LANES),  # update norm
    st.integers(0, 2**LANES - 1),  # lanes with a snapshot
    st.sampled_from([0, 0, 0, 1, 5]),  # lanes that fall back
    st.sampled_from([None, None, None, 0, 2]),  # lane that starts anew
)


def bits(number):
    return np.array([bool(number >> lane & 1) for lane in range(LANES)])


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def run_program(schedules, rows, program):
    """Carries out a program on schedules whose lanes are `rows` of it."""
    for actions, steps, norms, snapshots, falling, fresh in program:
        for schedule, lanes in zip(schedules, rows, strict=True):
            schedule.apply(np.array(actions)[lanes] % schedule.table.num_actions)
            schedule.advance(np.minimum(schedule.step + np.array(steps)[lanes], schedule.total_steps))
            schedule.observe_norms(np.array(norms)[lanes], np.full(len(lanes), 4.0))
            schedule.has_snapshot |= bits(snapshots)[lanes]
            schedule.fall_back(bits(falling)[lanes])
            if fresh in lanes:
                here = np.array([list(lanes).index(fresh)])
                schedule.reset(here, np.array([70]), np.array([3e-3]))


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(ACTION_TABLES)),
    start=st.sampled_from(["default", "given"]),
    program=st.lists(STEPS, max_size=12),
)
def test_lanes_side_by_side_equal_lanes_alone(name, start, program):
    table, options = action_table(name), ScheduleSettings(start=start, base="cosine")
    totals, rates = np.array([20, 50, 90]), np.array([1e-4, 1e-3, 1e-2])
    together = Schedule(table, totals, rates, options)
    alone = [Schedule(table, totals[[i]], rates[[i]], options) for i in range(LANES)]
    run_program([together], [np.arange(LANES)], program)
    run_program(alone, [np.array([i]) for i in range(LANES)], program)
    for lane, schedule in enumerate(alone):
        assert_same({k: v[[lane]] for k, v in together.state_dict().items()}, schedule.state_dict())
        np.testing.assert_array_equal(together.mask()[[lane]], schedule.mask())
        np.testing.assert_array_equal(
            together.learning_rate(together.step)[[lane]], schedule.learning_rate(schedule.step)
        )
        assert np.all((schedule.level >= 0) & (schedule.level < len(table.levels)))
        assert schedule.mask()[0, table.hold]


@settings(max_examples=15, deadline=None)
@given(program=st.lists(STEPS, min_size=1, max_size=8))
def test_a_restored_schedule_goes_on_as_if_never_interrupted(program):
    made = [
        Schedule(action_table("moves"), np.array([20, 50, 90]), np.full(LANES, 1e-3), ScheduleSettings(start="given"))
        for _ in range(2)
    ]
    run_program(made[:1], [np.arange(LANES)], program)
    state = made[0].state_dict()
    made[1].load_state_dict(state)
    run_program(made, [np.arange(LANES)] * 2, program)
    assert_same(made[0].state_dict(), made[1].state_dict())
    assert_same(state, {name: value.copy() for name, value in state.items()})


# -- steps that lean on their own gradient ----------------------------------------------------------------------------


def test_leaning_lasts_until_a_guard_takes_over_and_only_then_may_the_level_rise():
    schedule = build("lean")
    at(schedule, 30)
    assert available(schedule) == {"hold", "cooldown", "lean"}
    assert schedule.momentum_share() == pytest.approx(1.0)
    do(schedule, "one_up", "lean")
    assert schedule.level_value() == pytest.approx(2.5e-3)
    assert available(schedule) == {"hold", "cooldown", "one_up"}
    do(schedule, "lean", "one_up", "cooldown")
    assert schedule.level_value() == pytest.approx(2.5e-3 * 1.7)
    assert schedule.momentum_share() == pytest.approx(QUASI_HYPERBOLIC_SHARE)
    schedule.fall_back(np.array([True]))
    assert schedule.momentum_share() == pytest.approx(1.0)
    schedule.reset(np.array([0]), np.array([100]), np.array([1e-3]))
    assert "lean" in available(schedule)


def test_a_classifier_of_few_classes_leans_at_a_lower_rate_and_a_guard_takes_that_back():
    schedule = build("lean")
    nats = np.log([2.0])
    schedule.observe_job(np.array([int(TuningMode.FULL)]), nats)
    at(schedule, 30)
    before = schedule.peak_rate()
    do(schedule, "lean")
    np.testing.assert_allclose(schedule.peak_rate(), before * leaning_scale(nats))
    schedule.step_down(np.array([1]))
    np.testing.assert_allclose(schedule.peak_rate(), before * schedule.table.levels[3] / schedule.table.levels[4])


def test_the_state_of_a_version_that_could_not_lean_is_still_read():
    schedule, other = build(), build()
    state = schedule.state_dict()
    del state["leaning"], state["leaning_scale"]
    state["capable"] = state["capable"][:, :-1]
    other.load_state_dict(state)
    assert not other.leaning[0]
    assert available(other) == available(schedule)
    assert other.capable.shape == schedule.capable.shape
