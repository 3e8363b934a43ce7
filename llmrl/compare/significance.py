"""Could paired differences this large be chance? Wilcoxon's signed-rank test, exact, and Holm's correction."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from llmrl.compare.statistics import Floats


def signed_rank_p_value(differences: Floats) -> float:  # [N]
    """Two-sided p-value of Wilcoxon's signed-rank test, exact for every N and with ties.

    Under the null hypothesis every difference is as likely with the other sign. The statistic is the sum of the ranks
    of positive differences, ranked by size, equal sizes sharing their mean rank; zeros are left out. Its distribution
    over the 2^N signs is built up rank by rank.

    Wilcoxon 1945, Individual Comparisons by Ranking Methods, https://doi.org/10.2307/3001968

    >>> signed_rank_p_value(np.array([0.1, 0.2, 0.3]))  # 2 of the 8 signs are as far from the middle
    0.25
    """
    if np.isnan(differences).any():
        raise ValueError("differences: expected numbers, got NaN")
    nonzero = differences[differences != 0.0]
    if nonzero.size == 0:
        return 1.0
    ranks = _doubled_ranks(np.abs(nonzero))
    distribution = _sum_distribution(ranks)
    observed = int(ranks[nonzero > 0.0].sum())
    tail = min(distribution[: observed + 1].sum(), distribution[observed:].sum())
    return min(1.0, 2.0 * float(tail))


def _doubled_ranks(sizes: Floats) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Twice the mean rank of each size, so that ties have whole numbers too: first + last rank of the equal ones."""
    ordered = np.sort(sizes)
    first = np.searchsorted(ordered, sizes, side="left") + 1
    last = np.searchsorted(ordered, sizes, side="right")
    return np.asarray(first + last, dtype=np.int64)


def _sum_distribution(ranks: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Floats:
    """Probability of every sum of a random half of the ranks, float64[sum(ranks) + 1]."""
    distribution = np.zeros(int(ranks.sum()) + 1)
    distribution[0] = 1.0
    reached = 0
    for rank in ranks.tolist():
        without = 0.5 * distribution[: reached + 1]
        distribution[: reached + 1] = without
        distribution[rank : rank + reached + 1] += without
        reached += rank
    return distribution


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P-values corrected for how many there are: each below alpha keeps the chance of any false alarm below alpha.

    The k-th smallest of m is multiplied by m - k + 1, and none is below a smaller one.

    Holm 1979, A Simple Sequentially Rejective Multiple Test Procedure, https://www.jstor.org/stable/4615733

    >>> holm({"a": 0.01, "b": 0.5, "c": 0.02})
    {'a': 0.03, 'b': 0.5, 'c': 0.04}
    """
    corrected: dict[str, float] = {}
    highest = 0.0
    for place, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[name]))
        corrected[name] = highest
    return {name: corrected[name] for name in p_values}
