import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrl.compare.significance import holm, signed_rank_p_value

# Few sizes, so that ties and zeros are common.
DIFFERENCES = st.lists(st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0]), min_size=1, max_size=9)


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        # All positive: 2 of the 2^N signs are as extreme.
        ([1.0], 1.0),
        ([0.1, 0.2, 0.3], 2 / 8),
        ([0.1] * 6, 2 / 64),
        # Ranks 1 2 3 4, the smallest negative: W = 9 of 10; 9 or more: {9, 10}, so 2 of 16 on either side.
        ([-0.1, 0.2, 0.3, 0.4], 4 / 16),
        # Balanced: nothing is further out.
        ([-1.0, 1.0], 1.0),
        # Zeros are no evidence.
        ([0.0, 0.0], 1.0),
        ([0.0, 0.1, 0.2, 0.3], 2 / 8),
    ],
)
def test_signed_rank_by_hand(differences: list[float], expected: float) -> None:
    assert signed_rank_p_value(np.array(differences)) == pytest.approx(expected)


def test_signed_rank_at_a_value_of_the_published_table() -> None:
    # N = 10: W = 8 is the largest sum with a two-sided p below 0.05, and its p is 0.0488.
    differences = np.array([-1.0, 2, -3, -4, 5, 6, 7, 8, 9, 10])
    assert signed_rank_p_value(differences) == pytest.approx(0.0488, abs=5e-5)


def slow_signed_rank(differences: list[float]) -> float:
    """All signs, one by one."""
    sizes = [abs(value) for value in differences if value]
    if not sizes:
        return 1.0
    ranks = [sum(other < size for other in sizes) + (sizes.count(size) + 1) / 2 for size in sizes]
    positive = [value > 0 for value in differences if value]
    observed = sum(rank for rank, up in zip(ranks, positive, strict=True) if up)
    sums = [sum(itertools.compress(ranks, signs)) for signs in itertools.product([0, 1], repeat=len(ranks))]
    below, above = sum(value <= observed for value in sums), sum(value >= observed for value in sums)
    return min(1.0, 2 * min(below, above) / len(sums))


@given(DIFFERENCES)
def test_signed_rank_equals_its_slow_twin(differences: list[float]) -> None:
    assert signed_rank_p_value(np.array(differences)) == pytest.approx(slow_signed_rank(differences))


def test_signed_rank_rejects_a_true_null_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    found = [signed_rank_p_value(rng.normal(size=20)) for _ in range(500)]
    assert 0.02 < np.mean(np.array(found) < 0.05) < 0.08


def test_what_is_not_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        signed_rank_p_value(np.array([0.1, np.nan]))


def test_holm_by_hand() -> None:
    corrected = holm({"a": 0.04, "b": 0.01, "c": 0.03, "d": 0.5})
    # Ordered: 0.01 x 4, 0.03 x 3, 0.04 x 2 = 0.08 (raised to 0.09), 0.5 x 1.
    assert corrected == pytest.approx({"a": 0.09, "b": 0.04, "c": 0.09, "d": 0.5})
    assert list(corrected) == ["a", "b", "c", "d"]
    assert holm({}) == {}
    assert holm({"a": 0.7, "b": 0.6}) == {"a": 1.0, "b": 1.0}


@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1), max_size=6))
def test_holm_equals_its_slow_twin(p_values: dict[str, float]) -> None:
    ordered = sorted(p_values.values())
    for name, corrected in holm(p_values).items():
        lower = [p for p in ordered if p <= p_values[name]]
        expected = max(min(1.0, (len(ordered) - place) * p) for place, p in enumerate(lower))
        assert corrected == pytest.approx(expected)
