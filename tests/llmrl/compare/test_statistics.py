import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from llmrl.compare.statistics import (
    bootstrap_interval,
    bootstrap_means,
    estimate,
    hierarchical_bootstrap,
    hierarchical_interval,
    hierarchical_means,
    interquartile_mean,
    mean,
    stratified_bootstrap,
    wins,
)

VALUES = st.floats(-5, 5, allow_nan=False)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([7.0], 7.0),
        ([1.0, 2.0, 6.0], 3.0),
        ([100.0, 0.0, 2.0, 1.0], 1.5),
        # Eight values: two fall on either side.
        ([-9.0, 9.0, 1.0, 2.0, 3.0, 4.0, -8.0, 8.0], 2.5),
        # Seven values: floor(7 / 4) = 1 on either side.
        ([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 60.0], 3.0),
    ],
)
def test_interquartile_mean_by_hand(values: list[float], expected: float) -> None:
    assert float(interquartile_mean(np.array(values))) == pytest.approx(expected)


def test_nothing_has_no_interquartile_mean() -> None:
    with pytest.raises(ValueError, match="at least one"):
        interquartile_mean(np.zeros((3, 0)))


def slow_interquartile_mean(values: list[float]) -> float:
    ordered = sorted(values)
    kept = ordered[len(ordered) // 4 : len(ordered) - len(ordered) // 4]
    return sum(kept) / len(kept)


@given(arrays.arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 13)), elements=VALUES))
def test_interquartile_mean_equals_its_slow_twin(values: np.ndarray) -> None:
    expected = [slow_interquartile_mean(row.tolist()) for row in values]
    np.testing.assert_allclose(interquartile_mean(values), expected, atol=1e-12)


def slow_bootstrap(strata: list[np.ndarray], seed: int, num_resamples: int) -> list[float]:
    """One resample at a time, value by value."""
    rng = np.random.default_rng(seed)
    draws = [rng.integers(len(values), size=(num_resamples, len(values))) for values in strata]
    found = []
    for number in range(num_resamples):
        pooled: list[float] = []
        for values, drawn in zip(strata, draws, strict=True):
            for unit in drawn[number]:
                pooled.extend(values[unit].tolist())
        found.append(slow_interquartile_mean(pooled))
    return found


@given(
    st.lists(arrays.arrays(np.float64, st.tuples(st.integers(1, 5), st.integers(1, 3)), elements=VALUES), min_size=1,
             max_size=4),
    st.integers(0, 99),
)  # fmt: skip
def test_bootstrap_equals_its_slow_twin(strata: list[np.ndarray], seed: int) -> None:
    fast = stratified_bootstrap(strata, interquartile_mean, np.random.default_rng(seed), 30)
    np.testing.assert_allclose(fast, slow_bootstrap(strata, seed, 30), atol=1e-12)


def test_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    strata = [np.arange(6.0).reshape(3, 2), np.arange(4.0).reshape(4, 1)]
    whole = stratified_bootstrap(strata, mean, np.random.default_rng(3), 100)
    monkeypatch.setattr("llmrl.compare.statistics._BATCH_VALUES", 70)
    np.testing.assert_array_equal(stratified_bootstrap(strata, mean, np.random.default_rng(3), 100), whole)


def test_interval_by_hand() -> None:
    # Two coins, 0 and 1: their mean is 0 or 1 in a quarter of the resamples each, so the interval spans both.
    assert bootstrap_interval([np.array([[0.0], [1.0]])], mean) == (0.0, 1.0)


def test_resampling_stays_within_the_strata() -> None:
    # Both tasks always count equally, so that the mean cannot leave the middle.
    assert bootstrap_interval([np.zeros((4, 1)), np.ones((4, 1))], mean) == (0.5, 0.5)


def test_interval_of_a_mean_is_near_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(size=(400, 1))
    interval = bootstrap_interval([values], mean)
    assert interval is not None
    error = float(values.std() / 20)
    assert interval[0] == pytest.approx(float(values.mean()) - 1.96 * error, abs=0.25 * error)
    assert interval[1] == pytest.approx(float(values.mean()) + 1.96 * error, abs=0.25 * error)


def test_copies_of_a_run_do_not_narrow_the_interval() -> None:
    seeds = np.random.default_rng(1).normal(size=(6, 1))
    assert bootstrap_interval([np.repeat(seeds, 5, axis=1)], mean) == pytest.approx(bootstrap_interval([seeds], mean))


def test_one_seed_has_no_interval() -> None:
    assert bootstrap_interval([np.array([[0.1, 0.9]]), np.array([[0.5, 0.6]])], mean) is None


def test_wins_by_hand() -> None:
    own = np.array([1.0, 2.0, 3.0, np.nan, np.nan, 1.0])
    other = np.array([2.0, 2.0, 2.0, 2.0, np.inf, np.nan])
    np.testing.assert_array_equal(wins(own, other), [1.0, 0.5, 0.0, 0.0, 0.5, 1.0])


@given(st.lists(st.lists(st.floats(-5, 5), min_size=1, max_size=9), min_size=1, max_size=4))
def test_values_that_are_not_there_do_not_count(lines: list[list[float]]) -> None:
    padded = np.full((len(lines), 9), np.nan)
    for row, line in zip(padded, lines, strict=True):
        row[: len(line)] = line
    for statistic in (interquartile_mean, mean):
        expected = [float(statistic(np.array(line))) for line in lines]
        np.testing.assert_allclose(statistic(padded), expected, atol=1e-12)


# -- tasks as well as seeds ---------------------------------------------------------------------------------------


def slow_hierarchical_bootstrap(strata: list[np.ndarray], seed: int, num_resamples: int) -> list[float]:
    """One resample at a time: tasks, then seeds of each task drawn, value by value."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(strata), size=(num_resamples, len(strata)))
    uniform = rng.random((num_resamples, len(strata), max(map(len, strata))))
    found = []
    for number in range(num_resamples):
        pooled: list[float] = []
        for place, task in enumerate(drawn[number]):
            units = strata[task]
            for unit in range(len(units)):
                pooled.extend(units[int(uniform[number, place, unit] * len(units))].tolist())
        found.append(slow_interquartile_mean(pooled))
    return found


@given(
    st.lists(arrays.arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 3)), elements=VALUES), min_size=1,
             max_size=4),
    st.integers(0, 99),
)  # fmt: skip
def test_hierarchical_bootstrap_equals_its_slow_twin(strata: list[np.ndarray], seed: int) -> None:
    fast = hierarchical_bootstrap(strata, interquartile_mean, np.random.default_rng(seed), 30)
    np.testing.assert_allclose(fast, slow_hierarchical_bootstrap(strata, seed, 30), atol=1e-12)


def test_batches_change_nothing_of_the_hierarchical_one(monkeypatch: pytest.MonkeyPatch) -> None:
    strata = [np.arange(6.0).reshape(3, 2), np.arange(4.0).reshape(4, 1)]
    whole = hierarchical_bootstrap(strata, mean, np.random.default_rng(3), 100)
    monkeypatch.setattr("llmrl.compare.statistics._BATCH_VALUES", 70)
    np.testing.assert_array_equal(hierarchical_bootstrap(strata, mean, np.random.default_rng(3), 100), whole)


def test_tasks_that_differ_widen_the_interval_over_tasks_only() -> None:
    strata = [np.zeros((4, 1)), np.ones((4, 1))]
    assert bootstrap_interval(strata, mean) == (0.5, 0.5)
    # Both tasks drawn alike in a quarter of the resamples each.
    assert hierarchical_interval(strata, mean) == (0.0, 1.0)


def test_interval_over_tasks_is_near_the_normal_one() -> None:
    rng = np.random.default_rng(0)
    tasks = rng.normal(size=(200, 1, 1)) + 0.1 * rng.normal(size=(200, 3, 1))
    interval = hierarchical_interval(list(tasks), mean)
    assert interval is not None
    error = float(tasks.mean(axis=(1, 2)).std() / np.sqrt(200))
    assert interval[1] - interval[0] == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_one_task_says_nothing_of_others_and_one_seed_of_many_tasks_does() -> None:
    assert hierarchical_interval([np.arange(5.0)[:, None]], mean) is None
    assert hierarchical_interval([np.array([[0.0]]), np.array([[1.0]])], mean) == (0.0, 1.0)


def test_an_estimate_leaves_tasks_without_values_out() -> None:
    empty = np.full((2, 2), np.nan)
    found = estimate([np.array([[1.0], [3.0]]), empty], mean)
    assert found.named("iqm") == {
        "iqm": 2.0, "ci_low": 1.0, "ci_high": 3.0, "task_ci_low": None, "task_ci_high": None
    }  # fmt: skip
    assert estimate([empty], mean).named("value", "x_")["x_ci_low"] is None


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=3),
    st.integers(0, 99),
)
def test_means_of_many_quantities_are_those_of_each(shapes: list[tuple[int, int]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    strata = [rng.normal(size=(*shape, 3)) for shape in shapes]
    # The bootstrap draws units, so that a hole may only be in some of a unit's values.
    for values in strata:
        values[:, 1:][rng.random(values[:, 1:].shape) < 0.3] = np.nan
    together = bootstrap_means(strata, np.random.default_rng(seed), 20)
    for quantity in range(3):
        alone = stratified_bootstrap([v[..., quantity] for v in strata], mean, np.random.default_rng(seed), 20)
        np.testing.assert_allclose(together[:, quantity], alone, atol=1e-12)


def test_means_over_tasks_spread_as_those_of_the_hierarchical_bootstrap() -> None:
    rng = np.random.default_rng(0)
    strata = [rng.normal(task, 1.0, size=(3, 2, 1)) for task in range(4)]
    together = hierarchical_means(strata, np.random.default_rng(1), 4000)[:, 0]
    alone = hierarchical_bootstrap([values[..., 0] for values in strata], mean, np.random.default_rng(2), 4000)
    levels = [0.025, 0.25, 0.5, 0.75, 0.975]
    np.testing.assert_allclose(np.quantile(together, levels), np.quantile(alone, levels), atol=0.1)


def test_means_over_tasks_of_one_seed_are_those_of_tasks_by_hand() -> None:
    found = hierarchical_means([np.full((1, 2, 1), value) for value in (0.0, 1.0)], np.random.default_rng(0), 2000)
    values, counts = np.unique(found, return_counts=True)
    assert values.tolist() == [0.0, 0.5, 1.0]
    np.testing.assert_allclose(counts / 2000, [0.25, 0.5, 0.25], atol=0.05)
