"""Methods against each other, on rows that are made up."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrl.compare.aggregate import start_of
from llmrl.compare.pairs import improvement_matrix, paired_differences, reference_method
from llmrl.compare.profiles import profile, profile_taus
from llmrl.compare.significance import signed_rank_p_value


def row(method: str, value: float | None, *, task: str = "a", seed: int = 0, factor: float = 1.0) -> dict[str, Any]:
    """The score is the loss below 3."""
    score = None if value is None else 3.0 - value
    start = {"task": task, "regime": "default" if factor == 1.0 else "wrong", "learning_rate_factor": factor}
    return {**start, "seed": seed, "method": method, "loss_test": value, "score": score}


# Two tasks, two seeds; x beats y from three of four starts, and z is not there for the second task.
ROWS = [
    *(row("x", loss, task=task, seed=seed) for task, seed, loss in
      (("a", 0, 1.0), ("a", 1, 2.0), ("b", 0, 1.5), ("b", 1, 1.0))),
    *(row("y", loss, task=task, seed=seed) for task, seed, loss in
      (("a", 0, 2.0), ("a", 1, 2.5), ("b", 0, 1.0), ("b", 1, 1.1))),
    *(row("z", loss, seed=seed) for seed, loss in ((0, 1.0), (1, None))),
]  # fmt: skip


def test_probabilities_by_hand() -> None:
    matrix = improvement_matrix(ROWS, ["x", "y", "z"])
    assert matrix["x"]["y"]["probability"] == 0.75
    assert matrix["y"]["x"]["probability"] == 0.25
    assert matrix["x"]["y"]["num_pairs"] == 4
    # x ties with z once, and a lost run loses.
    assert matrix["x"]["z"] == {
        "probability": 0.75, "ci_low": 0.5, "ci_high": 1.0, "task_ci_low": 0.5, "task_ci_high": 1.0, "num_pairs": 2
    }  # fmt: skip
    assert set(matrix["x"]) == {"y", "z"}
    # Task b draws a win of x zero, once or twice out of two; task a always wins twice.
    assert (matrix["x"]["y"]["ci_low"], matrix["x"]["y"]["ci_high"]) == (0.5, 1.0)
    assert (matrix["y"]["x"]["ci_low"], matrix["y"]["x"]["ci_high"]) == (0.0, 0.5)


def test_methods_without_a_common_start_are_not_compared() -> None:
    matrix = improvement_matrix([row("x", 1.0), row("y", 1.0, seed=1)], ["x", "y"])
    assert matrix == {"x": {}, "y": {}}
    assert improvement_matrix([row("x", 1.0)], ["x"]) == {"x": {}}


def test_one_seed_has_probabilities_without_intervals() -> None:
    matrix = improvement_matrix([row("x", 1.0), row("y", 2.0)], ["x", "y"])
    assert matrix["x"]["y"] == {
        "probability": 1.0, "ci_low": None, "ci_high": None, "task_ci_low": None, "task_ci_high": None, "num_pairs": 1
    }  # fmt: skip


def test_one_seed_of_several_tasks_has_intervals_over_tasks() -> None:
    losses = {"a": (1.0, 2.0), "b": (1.0, 2.0), "c": (2.0, 1.0)}
    rows = [row(name, loss, task=task) for task, pair in losses.items() for name, loss in zip("xy", pair, strict=True)]
    found = improvement_matrix(rows, ["x", "y"])["x"]["y"]
    assert (found["ci_low"], found["task_ci_low"], found["task_ci_high"]) == (None, 0.0, 1.0)


LOSSES = st.sampled_from([None, 1.0, 1.5, 2.0])
TABLES = st.dictionaries(
    st.tuples(st.sampled_from("xyz"), st.sampled_from("ab"), st.integers(0, 2), st.sampled_from([0.1, 1.0])), LOSSES,
    min_size=1, max_size=30,
)  # fmt: skip


@given(TABLES)
def test_probabilities_equal_their_slow_twin(table: dict[Any, float | None]) -> None:
    rows = [row(method, loss, task=task, seed=seed, factor=factor)
            for (method, task, seed, factor), loss in table.items()]  # fmt: skip
    matrix = improvement_matrix(rows, ["x", "y", "z"])
    for first, second in itertools.permutations("xyz", 2):
        points = []
        for one, other in itertools.product(rows, rows):
            if (one["method"], other["method"]) == (first, second) and start_of(one) == start_of(other):
                losses = [math.inf if r["loss_test"] is None else r["loss_test"] for r in (one, other)]
                points.append(0.5 if losses[0] == losses[1] else float(losses[0] < losses[1]))
        entry = matrix[first].get(second)
        assert (entry is None) == (not points)
        if entry is not None:
            assert (entry["probability"], entry["num_pairs"]) == (pytest.approx(np.mean(points)), len(points))


def test_differences_by_hand() -> None:
    told = paired_differences(ROWS, ["x", "y", "z"], "x")
    y = told["y"]
    # Scores of x minus those of y: task a: 1.0, 0.5; task b: -0.5, 0.1.
    assert y["mean"]["value"] == pytest.approx((1.0 + 0.5 - 0.5 + 0.1) / 4)
    assert y["iqm"]["value"] == pytest.approx((0.5 + 0.1) / 2)
    assert y["worst"] == pytest.approx(-0.5)
    assert (y["num_pairs"], y["num_units"], y["num_tasks"]) == (4, 4, 2)
    # Sizes 1.0, 0.5, 0.5, 0.1: ranks 4, 2.5, 2.5, 1.
    assert y["p_value"] == signed_rank_p_value(np.array([1.0, 0.5, -0.5, 0.1]))
    assert y["p_value_tasks"] == signed_rank_p_value(np.array([0.75, -0.2])) == 1.0
    # The means of both seeds: task a lies within 0.5 .. 1, task b within -0.5 .. 0.1.
    assert y["mean"]["ci_low"] == pytest.approx(0.0)
    assert y["mean"]["ci_high"] == pytest.approx(0.55)
    assert y["mean"]["task_ci_low"] < y["mean"]["ci_low"]
    assert y["mean"]["task_ci_high"] > y["mean"]["ci_high"]
    # z has one scored run; Holm: two methods, the smaller p twice.
    z = told["z"]
    assert (z["num_pairs"], z["mean"]["value"], z["mean"]["ci_low"]) == (1, 0.0, None)
    assert y["p_value_holm"] == pytest.approx(min(1.0, 2 * y["p_value"]))


def test_starting_rates_of_a_seed_are_one_unit() -> None:
    """A run that stands for ten rates must not make ten pairs of evidence."""
    rates = [0.1 * 2**k for k in range(10)]
    rows = [row(m, loss + 0.01 * s, seed=s, factor=f) for m, loss in (("x", 1.0), ("y", 1.1)) for s in range(3)
            for f in rates]  # fmt: skip
    entry = paired_differences(rows, ["x", "y"], "x")["y"]
    assert (entry["num_pairs"], entry["num_units"]) == (30, 3)
    assert entry["p_value"] == 0.25


def test_whose_advantage_is_told() -> None:
    assert reference_method(["linear", "hold", "policy"], "policy", "linear") == "policy"
    assert reference_method(["linear", "hold"], "policy", "linear") == "hold"
    assert reference_method(["linear"], "policy", "linear") == "linear"


# -- profiles -----------------------------------------------------------------------------------------------------


def test_a_profile_by_hand() -> None:
    rows = [row("x", 3.0 - score, seed=seed) for seed, score in enumerate((0.25, 0.5, 0.875))]
    told = profile([*rows, row("x", None, seed=3)], np.array([-1.0, 0.25, 0.3, 0.875]))
    assert told is not None
    # Above, not at: the run that scores 0.25 is not above 0.25. A row without a score is left out.
    assert told["share"] == pytest.approx([1.0, 2 / 3, 2 / 3, 0.0])
    assert (told["ci_low"][0], told["ci_high"][0]) == (1.0, 1.0)
    assert (told["ci_low"][1], told["ci_high"][1]) == (0.0, 1.0)


def test_a_profile_needs_scores_and_its_band_seeds() -> None:
    taus = np.array([0.0])
    assert profile([row("x", None)], taus) is None
    assert profile([row("x", 1.0)], taus) == {"share": [1.0], "ci_low": None, "ci_high": None}


def test_profiles_fall_over_the_whole_range() -> None:
    rows = [row("x", 1.9), row("y", 3.5)]
    taus = profile_taus(rows)
    assert (taus[0], taus[-1]) == (-1.0, pytest.approx(1.2))
    assert profile_taus([row("x", -9.0)])[-1] == 1.5, "a single high score does not flatten the others"
    told = profile(rows, taus)
    assert told is not None
    assert told["share"] == sorted(told["share"], reverse=True)
