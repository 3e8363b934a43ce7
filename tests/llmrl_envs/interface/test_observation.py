"""Observations: bounded whatever happens, free of scales, and recognisable by their hash."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmrl_envs.interface.action import ACTION_TABLES, action_table
from llmrl_envs.interface.observation import GROUPS, FeatureGroup, ObservationEncoder, ObservationSpec
from llmrl_envs.interface.schedule import Schedule
from llmrl_envs.interface.statistics import TrainingStatistics, TuningMode, empty_statistics

MOVES = action_table("moves")
ANYTHING = st.one_of(
    st.floats(-1e30, 1e30), st.sampled_from([np.nan, np.inf, -np.inf, 0.0, 1e-300, 1e30, 1.0])
)  # fmt: skip


def new_schedule(lanes=1, table=MOVES, total_steps=100):
    schedule = Schedule(table, np.full(lanes, total_steps), np.full(lanes, 1e-3))
    schedule.observe_norms(np.full(lanes, 5.0), np.full(lanes, 20.0))
    return schedule


def named(spec, observation):
    return dict(zip(spec.names, observation.tolist(), strict=True))


def group_columns(spec, group):
    """Places of a group's features, and of its flag."""
    features = spec.features
    return [i for i, f in enumerate(features) if f.group == group], spec.names.index(f"has_{group}")


def random_interval(rng, make_statistics, lanes=1, count=6, **changes):
    loss = np.exp(rng.normal(0.0, 0.2, (lanes, count)))
    norm = np.exp(rng.normal(0.0, 0.3, (lanes, count)))
    return make_statistics(loss, norm, **{"validation_loss": rng.uniform(1.0, 2.0, lanes), **changes})


# -- the layout -----------------------------------------------------------------------------------------------------


def test_the_layout_is_the_job_then_the_latest_decisions_newest_first():
    spec = ObservationSpec(MOVES, stack=2)
    count = len(spec.decision_features)
    assert spec.size == len(spec.names) == len(set(spec.names)) == len(spec.job_features) + 2 * count
    own, earlier = spec.names[-2 * count : -count], spec.names[-count:]
    assert earlier == tuple(f"{name}@1" for name in own)
    assert [name for name in own if name.startswith("last_")] == [f"last_{name}" for name in MOVES.names]


def test_no_feature_is_an_absolute_loss_rate_or_step():
    spec = ObservationSpec(MOVES)
    low, high = spec.bounds()
    assert low.dtype == high.dtype == np.float32
    assert np.all(low < high)
    assert np.all(np.abs(low) <= 10.0)
    assert np.all(high <= 10.0)


def test_the_hash_names_table_stack_and_version(monkeypatch):
    specs = [ObservationSpec(table, stack) for table in ACTION_TABLES.values() for stack in (1, 2, 3)]
    assert len({spec.hash for spec in specs}) == len(specs)
    assert ObservationSpec(MOVES).hash == ObservationSpec(action_table("moves")).hash
    assert json.loads(json.dumps(ObservationSpec(MOVES).to_dict()))["names"] == list(ObservationSpec(MOVES).names)
    before = ObservationSpec(MOVES).hash
    monkeypatch.setattr("llmrl_envs.interface.observation.OBSERVATION_VERSION", 99)
    assert ObservationSpec(MOVES).hash != before


def test_a_spec_of_no_decisions_is_refused():
    with pytest.raises(ValueError, match="stack: expected at least 1, got 0"):
        ObservationSpec(MOVES, stack=0)


# -- values ---------------------------------------------------------------------------------------------------------


def test_before_the_first_step_only_the_job_is_known():
    spec = ObservationSpec(MOVES)
    statistics = empty_statistics(np.array([1000]), np.array([TuningMode.LORA]), np.array([0.01]))
    found = named(spec, ObservationEncoder(spec).encode(statistics, new_schedule())[0])
    known = {name: value for name, value in found.items() if value != 0.0 and not name.startswith("progress_tanh")}
    assert known == pytest.approx(
        {"mode_lora": 1.0, "log10_trainable_fraction": -2.0, "log10_total_steps": 0.75, "rollbacks_left": 1.0}
    )
    assert found["progress_tanh_0.1"] == pytest.approx(np.tanh(-1.0))


def test_features_by_hand(make_statistics):
    spec, schedule = ObservationSpec(MOVES), new_schedule()
    schedule.apply(np.array([MOVES.names.index("one_up")]))
    schedule.apply(np.array([MOVES.names.index("two_down")]))
    schedule.apply(np.array([MOVES.names.index("freeze")]))
    schedule.apply(np.array([MOVES.hold]))
    statistics = make_statistics(
        [2.0] * 4,
        [1.0] * 4,
        step=np.array([25]),
        step_size=np.array([2e-3]),
        validation_loss=np.array([3.0]),
        clipped=np.array([[True, False, False, False]]),
        momentum_cosine=np.array([-0.3]),
        signal_to_noise=np.array([0.01]),
        trainable_fraction=np.array([0.1]),
    )
    found = named(spec, ObservationEncoder(spec).encode(statistics, schedule)[0])
    expected = {
        "progress": 0.25, "progress_tanh_0.2": np.tanh(0.5), "mode_full": 1.0, "mode_lora": 0.0,
        "log10_trainable_fraction": -1.0, "log10_total_steps": 0.5, "rollbacks_left": 1.0,
        "level": -0.25, "level_below_highest": -2 * np.log2(1.7) / 4, "decisions_since_change": np.tanh(1 / 5),
        "frozen": 1.0, "tight_clipping": 0.0, "final": 0.0, "last_hold": 1.0, "last_freeze": 0.0,
        "log10_step_size": np.log10(2e-3) + 4, "loss_slope": 0.0, "clipped_share": 0.25, "skipped_share": 0.0,
        "momentum_cosine": -0.3, "log10_signal_to_noise": -2.0, "generalisation_gap": np.log(1.5),
        "validation_above_best": 0.0, "has_loss": 1.0, "has_validation": 1.0,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_a_validation_loss_above_its_best_is_told_in_units_of_the_noise(make_statistics):
    rng = np.random.default_rng(0)
    spec, schedule = ObservationSpec(MOVES), new_schedule()
    encoder = ObservationEncoder(spec)
    for validation in (2.0, 1.8, 1.9):
        statistics = random_interval(rng, make_statistics, count=50, validation_loss=np.array([validation]))
        found = named(spec, encoder.encode(statistics, schedule)[0])
    assert found["validation_above_best"] == pytest.approx(np.log(1.9 / 1.8) / encoder.losses.noise()[0], rel=1e-5)


def test_earlier_decisions_move_down_the_stack(make_statistics):
    rng = np.random.default_rng(0)
    spec, schedule = ObservationSpec(MOVES, stack=3), new_schedule()
    encoder = ObservationEncoder(spec)
    seen = []
    for action in (3, 4, 1, 2):
        schedule.apply(np.array([action]))
        seen.append(encoder.encode(random_interval(rng, make_statistics), schedule)[0])
    job, count = len(spec.job_features), len(spec.decision_features)
    for age in range(3):
        np.testing.assert_array_equal(seen[3][job + age * count : job + (age + 1) * count], seen[3 - age][job:][:count])
    assert np.all(seen[0][job + count :] == 0.0)


@settings(max_examples=60, deadline=None)
@given(
    numbers=st.lists(ANYTHING, min_size=30, max_size=30),
    counts=st.lists(st.integers(0, 4), min_size=3, max_size=3),
    flags=st.integers(0, 2**8 - 1),
    actions=st.lists(st.integers(0, 8), min_size=3, max_size=3),
    fraction=st.floats(0.0, 1.0),
)
def test_every_feature_stays_in_its_range_whatever_a_job_shows(numbers, counts, flags, actions, fraction):
    spec, schedule = ObservationSpec(MOVES), new_schedule()
    encoder = ObservationEncoder(spec)
    low, high = spec.bounds()
    for interval, (count, action) in enumerate(zip(counts, actions, strict=True)):
        some = iter(numbers[interval * 10 :] + numbers)
        statistics = TrainingStatistics(
            step=np.array([interval * 40]),
            total_steps=np.array([100]),
            num_steps=np.array([count]),
            loss=np.array([[next(some) for _ in range(count)]]).reshape(1, count),
            gradient_norm=np.array([[abs(next(some)) for _ in range(count)]]).reshape(1, count),
            clipped=np.array([[bool(flags >> i & 1) for i in range(count)]], np.bool_).reshape(1, count),
            skipped=np.array([[bool(flags >> i & 2) for i in range(count)]], np.bool_).reshape(1, count),
            update_norm=np.array([next(some)]),
            weight_norm=np.array([next(some)]),
            step_size=np.array([next(some)]),
            momentum_cosine=np.array([next(some)]),
            signal_to_noise=np.array([next(some)]),
            validation_loss=np.array([next(some)]),
            mode=np.array([flags % 3]),
            trainable_fraction=np.array([fraction]),
        )
        schedule.apply(np.array([action]))
        schedule.observe_norms(statistics.update_norm, statistics.weight_norm)
        observation = encoder.encode(statistics, schedule)
        assert observation.shape == (1, spec.size)
        assert observation.dtype == np.float32
        assert np.all((observation >= low) & (observation <= high))


@pytest.mark.parametrize("scale", [1e-4, 0.3, 50.0])
def test_the_scale_of_losses_and_gradients_does_not_show(make_statistics, scale):
    rng = np.random.default_rng(0)
    spec, schedule = ObservationSpec(MOVES), new_schedule()
    plain, scaled = ObservationEncoder(spec), ObservationEncoder(spec)
    for _ in range(5):
        statistics = random_interval(rng, make_statistics)
        other = replace(
            statistics,
            loss=statistics.loss * scale,
            validation_loss=statistics.validation_loss * scale,
            gradient_norm=statistics.gradient_norm * scale**2,
        )
        np.testing.assert_allclose(plain.encode(statistics, schedule), scaled.encode(other, schedule), atol=1e-5)


# -- what a host lacks ----------------------------------------------------------------------------------------------

MISSING = {
    FeatureGroup.LOSS: {"loss": np.full((1, 6), np.nan)},
    FeatureGroup.GRADIENT: {"gradient_norm": np.full((1, 6), np.nan), "skipped": np.zeros((1, 6), np.bool_)},
    FeatureGroup.UPDATE: {"step_size": np.array([np.nan])},
    FeatureGroup.DIRECTION: {"momentum_cosine": np.array([np.nan]), "signal_to_noise": np.array([np.nan])},
    FeatureGroup.VALIDATION: {"validation_loss": np.array([np.nan])},
}


def assert_withheld(spec, group, found, complete):
    """The group is zero and flagged; everything else is as in the complete observation."""
    columns, flag = group_columns(spec, group)
    assert np.any(complete[columns] != 0.0)
    assert np.all(found[columns] == 0.0)
    assert (found[flag], complete[flag]) == (0.0, 1.0)
    others = np.setdiff1d(np.arange(spec.size), [*columns, flag])
    if group is FeatureGroup.LOSS:  # the gap between train and validation loss needs both
        others = np.setdiff1d(others, group_columns(spec, FeatureGroup.VALIDATION)[0])
    np.testing.assert_array_equal(found[others], complete[others])


@pytest.mark.parametrize("group", GROUPS)
def test_what_a_job_cannot_supply_is_zero_and_flagged(make_statistics, group):
    rng = np.random.default_rng(0)
    spec, schedule = ObservationSpec(MOVES), new_schedule()
    complete, lacking = ObservationEncoder(spec), ObservationEncoder(spec)
    for _ in range(3):
        statistics = random_interval(rng, make_statistics)
        first = complete.encode(statistics, schedule)[0]
        second = lacking.encode(replace(statistics, **MISSING[group]), schedule)[0]
    assert_withheld(spec, group, second, first)


@pytest.mark.parametrize("group", GROUPS)
def test_a_hidden_group_is_zero_and_flagged_until_the_next_job(make_statistics, group):
    rng = np.random.default_rng(0)
    spec, schedule = ObservationSpec(MOVES), new_schedule()
    complete, hiding = ObservationEncoder(spec), ObservationEncoder(spec)
    hiding.reset(np.array([0]), hidden=np.array([[g is group for g in GROUPS]]))
    for _ in range(3):
        statistics = random_interval(rng, make_statistics)
        first, second = complete.encode(statistics, schedule)[0], hiding.encode(statistics, schedule)[0]
        columns, flag = group_columns(spec, group)
        assert np.all(second[columns] == 0.0)
        assert second[flag] == 0.0
        others = np.setdiff1d(np.arange(spec.size), [*columns, flag])
        np.testing.assert_array_equal(second[others], first[others])
    hiding.reset(np.array([0]))
    assert hiding.encode(statistics, schedule)[0][flag] == 1.0


# -- lanes and state ------------------------------------------------------------------------------------------------


def test_lanes_side_by_side_equal_lanes_alone(make_statistics):
    rng = np.random.default_rng(0)
    spec = ObservationSpec(MOVES)
    together, alone = ObservationEncoder(spec, 3), [ObservationEncoder(spec) for _ in range(3)]
    schedule, schedules = new_schedule(3), [new_schedule() for _ in range(3)]
    for _ in range(4):
        actions = rng.integers(0, MOVES.num_actions, 3)
        statistics = random_interval(rng, make_statistics, lanes=3)
        schedule.apply(actions)
        observation = together.encode(statistics, schedule)
        for lane in range(3):
            schedules[lane].apply(actions[[lane]])
            own = TrainingStatistics(**{name: value[[lane]] for name, value in vars(statistics).items()})
            np.testing.assert_allclose(observation[[lane]], alone[lane].encode(own, schedules[lane]), rtol=1e-6)


def test_encoding_some_lanes_leaves_the_memory_of_the_others(make_statistics):
    rng = np.random.default_rng(0)
    spec, schedule = ObservationSpec(MOVES), new_schedule(2)
    encoder, twin = ObservationEncoder(spec, 2), ObservationEncoder(spec, 2)
    first, second, third = (random_interval(rng, make_statistics, lanes=2) for _ in range(3))
    for each in (encoder, twin):
        each.encode(first, schedule)
    partial = encoder.encode_lanes(np.array([False, True]), second, schedule)
    np.testing.assert_array_equal(partial[1], twin.encode(second, schedule)[1])
    # Lane 0 never saw the second interval.
    skipping = ObservationEncoder(spec, 2)
    skipping.encode(first, schedule)
    last = encoder.encode(third, schedule)
    np.testing.assert_array_equal(last[0], skipping.encode(third, schedule)[0])
    np.testing.assert_array_equal(last[1], twin.encode(third, schedule)[1])


def test_only_the_lanes_that_start_anew_are_forgotten(make_statistics):
    rng = np.random.default_rng(0)
    spec, schedule = ObservationSpec(MOVES), new_schedule(2)
    encoder, twin, fresh = (ObservationEncoder(spec, 2) for _ in range(3))
    for _ in range(3):
        statistics = random_interval(rng, make_statistics, lanes=2, validation_loss=np.array([0.5, 0.5]))
        encoder.encode(statistics, schedule)
        twin.encode(statistics, schedule)
    encoder.reset(np.array([1]))
    statistics = random_interval(rng, make_statistics, lanes=2)
    found = encoder.encode(statistics, schedule)
    np.testing.assert_array_equal(found[0], twin.encode(statistics, schedule)[0])
    np.testing.assert_array_equal(found[1], fresh.encode(statistics, schedule)[1])


def test_a_restored_encoder_goes_on_as_if_never_interrupted(make_statistics):
    rng = np.random.default_rng(0)
    spec, schedule = ObservationSpec(MOVES), new_schedule(2)
    first, second = ObservationEncoder(spec, 2), ObservationEncoder(spec, 2)
    first.reset(np.arange(2), hidden=rng.random((2, len(GROUPS))) < 0.5)
    for _ in range(3):
        first.encode(random_interval(rng, make_statistics, lanes=2), schedule)
    second.load_state_dict(first.state_dict())
    statistics = random_interval(rng, make_statistics, lanes=2)
    np.testing.assert_array_equal(first.encode(statistics, schedule), second.encode(statistics, schedule))
