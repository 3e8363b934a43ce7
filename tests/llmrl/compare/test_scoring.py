import math

import pytest

from llmrl.compare.scoring import SCORE_FLOOR, choose_oracle, score_run

NAN = math.nan


def test_the_oracle_is_the_rate_of_the_best_mean_and_keeps_each_seed() -> None:
    # Seed 0 alone would choose 1e-2, the mean chooses 1e-3.
    oracle = choose_oracle({1e-4: {0: 3.0, 1: 3.0}, 1e-3: {0: 2.0, 1: 2.0}, 1e-2: {0: 1.9, 1: 2.5}, 1e-1: {0: 9, 1: 9}})
    assert oracle.learning_rate == 1e-3
    assert oracle.losses == {0: 2.0, 1: 2.0}
    assert oracle.loss_test == 2.0
    assert not oracle.at_edge


@pytest.mark.parametrize("best", [1e-4, 1e-2])
def test_a_best_rate_on_the_edge_is_told(best: float) -> None:
    assert choose_oracle({rate: {0: 1.0 if rate == best else 2.0} for rate in (1e-3, 1e-2, 1e-4)}).at_edge


def test_a_grid_of_one_rate_has_only_edges() -> None:
    assert choose_oracle({1e-3: {0: 1.0}}).at_edge


def test_the_lower_of_two_equal_rates_is_taken() -> None:
    assert choose_oracle({1e-2: {0: 1.0}, 1e-3: {0: 1.0}, 1e-4: {0: 2.0}}).learning_rate == 1e-3


def test_a_rate_that_fails_for_one_seed_is_no_oracle() -> None:
    assert choose_oracle({1e-3: {0: 1.0, 1: NAN}, 1e-4: {0: 2.0, 1: 2.0}}).learning_rate == 1e-4
    nothing = choose_oracle({1e-3: {0: NAN}, 1e-4: {0: math.inf}})
    assert nothing.learning_rate is None
    assert math.isnan(nothing.loss_test)


@pytest.mark.parametrize(
    ("final", "expected"),
    [(3.0, 0.0), (2.0, 1.0), (1.5, 1.5), (3.5, -0.5), (9.0, SCORE_FLOOR), (NAN, SCORE_FLOOR), (math.inf, SCORE_FLOOR)],
)
def test_scores_by_hand(final: float, expected: float) -> None:
    score, note = score_run(3.0, final, 2.0)
    assert score == pytest.approx(expected)
    assert (note is None) == (expected != SCORE_FLOOR)


@pytest.mark.parametrize("oracle", [3.0, 3.1, 2.999, NAN, math.inf])
def test_without_a_yardstick_there_is_no_score(oracle: float) -> None:
    score, note = score_run(3.0, 2.5, oracle)
    assert score is None
    assert note is not None
    assert note.startswith("no score")
