"""Robust statistics over few runs: interquartile mean and stratified bootstrap.

Agarwal et al. 2021, Deep Reinforcement Learning at the Edge of the Statistical Precipice,
https://arxiv.org/abs/2108.13264

Scores come in strata, one a task: float64[U, F], with U units that were drawn independently (seeds) and F values that
belong to one unit (starting rates); NaN where a unit lacks one. The bootstrap draws units, never single values: rates
share weights and data order of their seed, and may even share the run, so that treating them as independent would make
intervals too narrow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Statistic: TypeAlias = Callable[[Floats], Floats]

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95
_BATCH_VALUES = 4_000_000


def interquartile_mean(values: Floats) -> Floats:
    """Mean of the middle half along the last axis, float64[..., N] -> float64[...].

    The floor(N / 4) lowest and as many highest values are left out; NaN stands for a value that is not there, and does
    not count into N.

    >>> float(interquartile_mean(np.array([0.0, 1.0, 2.0, 100.0])))
    1.5
    """
    num_values = values.shape[-1]
    if num_values == 0:
        raise ValueError("values: expected at least one, got none")
    ordered = np.sort(values, axis=-1)  # NaN last
    if not np.isnan(ordered[..., -1]).any():
        cut = num_values // 4
        return np.asarray(ordered[..., cut : num_values - cut].mean(axis=-1))
    counts = num_values - np.isnan(ordered).sum(axis=-1, keepdims=True)
    place = np.arange(num_values)
    middle = (place >= counts // 4) & (place < counts - counts // 4)
    return np.asarray(np.where(middle, ordered, 0.0).sum(axis=-1) / middle.sum(axis=-1))


def mean(values: Floats) -> Floats:
    """Mean along the last axis of what is not NaN."""
    there = ~np.isnan(values)
    return np.asarray(np.where(there, values, 0.0).sum(axis=-1) / there.sum(axis=-1))


def stratified_bootstrap(
    strata: Sequence[Floats],  # each [U, F]
    statistic: Statistic,
    rng: np.random.Generator,
    num_resamples: int = NUM_RESAMPLES,
) -> Floats:  # [R]
    """The statistic of resampled data: in every stratum as many units are drawn, with replacement, as it has.

    Args:
        strata: Values of each stratum.
        statistic: Maps float64[R, N], all values of a resample in a row, to float64[R].
        rng: Draws the units, one stratum after the other.
        num_resamples: R.
    """
    draws = [rng.integers(len(values), size=(num_resamples, len(values))) for values in strata]
    batch = max(1, _BATCH_VALUES // max(sum(values.size for values in strata), 1))
    found = []
    for start in range(0, num_resamples, batch):
        rows = slice(start, start + batch)
        parts = [values[drawn[rows]] for values, drawn in zip(strata, draws, strict=True)]
        found.append(statistic(np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)))
    return np.concatenate(found)


def bootstrap_interval(
    strata: Sequence[Floats],
    statistic: Statistic,
    *,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> tuple[float, float] | None:
    """Percentile interval of 95 %; None where no stratum has two units, because nothing varies then."""
    if not any(len(values) > 1 for values in strata):
        return None
    found = stratified_bootstrap(strata, statistic, np.random.default_rng(seed), num_resamples)
    tail = (1.0 - CONFIDENCE) / 2.0
    low, high = np.quantile(found, [tail, 1.0 - tail]).tolist()
    return low, high


def wins(loss: Floats, reference: Floats) -> Floats:
    """1 where a loss is lower than its paired reference, 0.5 where they tie, 0 otherwise.

    A loss that is not finite loses against every finite one and ties with its like.
    """
    own = np.where(np.isfinite(loss), loss, np.inf)
    other = np.where(np.isfinite(reference), reference, np.inf)
    return np.where(own < other, 1.0, np.where(own == other, 0.5, 0.0))
