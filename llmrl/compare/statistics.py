"""Robust statistics over few runs: interquartile mean, and bootstraps over seeds and over tasks.

Agarwal et al. 2021, Deep Reinforcement Learning at the Edge of the Statistical Precipice,
https://arxiv.org/abs/2108.13264

Scores come in strata, one a task: float64[U, F], with U units that were drawn independently (seeds) and F values that
belong to one unit (starting rates); NaN where a unit lacks one. The bootstrap draws units, never single values: rates
share weights and data order of their seed, and may even share the run, so that treating them as independent would make
intervals too narrow.

The stratified bootstrap keeps the tasks and draws units within each: it answers how sure the figure is for *these*
tasks. The hierarchical one draws tasks first and units within every task drawn: it answers for tasks like these, and
its intervals are wider.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


def hierarchical_bootstrap(
    strata: Sequence[Floats],  # each [U, F]
    statistic: Statistic,
    rng: np.random.Generator,
    num_resamples: int = NUM_RESAMPLES,
) -> Floats:  # [R]
    """The statistic of data resampled twice: as many strata as there are, and in each drawn one as many of its units.

    Args:
        strata: Values of each stratum.
        statistic: Maps float64[R, N], all values of a resample in a row, to float64[R]; NaN does not count.
        rng: Draws the strata, then a uniform number for every unit.
        num_resamples: R.
    """
    padded, num_units = _pad(strata)  # [T, U, F], [T]
    num_strata, most_units = padded.shape[:2]
    drawn = rng.integers(num_strata, size=(num_resamples, num_strata))  # [R, T]
    uniform = rng.random((num_resamples, num_strata, most_units))  # [R, T, U]
    units = (uniform * num_units[drawn][..., None]).astype(np.int64)
    absent = np.arange(most_units) >= num_units[drawn][..., None]
    batch = max(1, _BATCH_VALUES // max(padded.size, 1))
    found = []
    for start in range(0, num_resamples, batch):
        rows = slice(start, start + batch)
        values = padded[drawn[rows][..., None], units[rows]]  # [R, T, U, F]
        values[absent[rows]] = np.nan
        found.append(statistic(values.reshape(len(values), -1)))
    return np.concatenate(found)


def _pad(strata: Sequence[Floats]) -> tuple[Floats, NDArray[np.int64]]:
    """All strata in one array, NaN where one has fewer units or values, and the number of units of each."""
    num_units = np.array([len(values) for values in strata])
    padded = np.full((len(strata), num_units.max(), max(values.shape[1] for values in strata)), np.nan)
    for place, values in zip(padded, strata, strict=True):
        place[: len(values), : values.shape[1]] = values
    return padded, num_units


def bootstrap_means(
    strata: Sequence[Floats],  # each [U, F, K]
    rng: np.random.Generator,
    num_resamples: int = NUM_RESAMPLES,
) -> Floats:  # [R, K]
    """Means of K quantities over the same resamples as `stratified_bootstrap` draws, by one matrix product a stratum.

    Args:
        strata: Values of each stratum; NaN does not count.
        rng: Draws the units, one stratum after the other.
        num_resamples: R.
    """
    num_quantities = strata[0].shape[2]
    totals, counts = np.zeros((num_resamples, num_quantities)), np.zeros((num_resamples, num_quantities))
    for values in strata:
        times = np.zeros((num_resamples, len(values)))
        for drawn in rng.integers(len(values), size=(num_resamples, len(values))).T:
            times[np.arange(num_resamples), drawn] += 1.0
        there = ~np.isnan(values)
        totals += times @ np.where(there, values, 0.0).sum(axis=1)
        counts += times @ there.sum(axis=1)
    with np.errstate(invalid="ignore"):
        return totals / counts


def hierarchical_means(
    strata: Sequence[Floats],  # each [U, F, K]
    rng: np.random.Generator,
    num_resamples: int = NUM_RESAMPLES,
) -> Floats:  # [R, K]
    """Means of K quantities where tasks are drawn first and then seeds within every task drawn.

    Args:
        strata: Values of each task; NaN does not count.
        rng: Draws the tasks and the seeds.
        num_resamples: R.
    """
    num_quantities = strata[0].shape[2]
    totals, counts = np.zeros((num_resamples, num_quantities)), np.zeros((num_resamples, num_quantities))
    there = [~np.isnan(values) for values in strata]
    sums = [np.where(known, values, 0.0).sum(axis=1) for known, values in zip(there, strata, strict=True)]
    for _ in strata:
        drawn = rng.integers(len(strata), size=num_resamples)
        for task, values in enumerate(strata):
            rows = np.flatnonzero(drawn == task)
            times = rng.multinomial(len(values), np.full(len(values), 1.0 / len(values)), size=len(rows))
            totals[rows] += times @ sums[task]
            counts[rows] += times @ there[task].sum(axis=1)
    with np.errstate(invalid="ignore"):
        return totals / counts


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
    return percentile_interval(found)


def hierarchical_interval(
    strata: Sequence[Floats],
    statistic: Statistic,
    *,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> tuple[float, float] | None:
    """Percentile interval of 95 % over tasks and seeds; None with one task, which says nothing of others."""
    if len(strata) < 2:
        return None
    found = hierarchical_bootstrap(strata, statistic, np.random.default_rng(seed), num_resamples)
    return percentile_interval(found)


def percentile_interval(found: Floats) -> tuple[float, float]:  # [R]
    """The middle 95 % of resampled statistics."""
    tail = (1.0 - CONFIDENCE) / 2.0
    low, high = np.quantile(found, [tail, 1.0 - tail]).tolist()
    return low, high


@dataclass(frozen=True)
class Estimate:
    """A statistic with its intervals; None where there is none.

    Attributes:
        value: Of all values together.
        interval: Over seeds, of these tasks.
        task_interval: Over tasks and seeds.
    """

    value: float | None = None
    interval: tuple[float, float] | None = None
    task_interval: tuple[float, float] | None = None

    def named(self, value: str, prefix: str = "") -> dict[str, float | None]:
        """As entries of `results.json`: `value`, `PREFIXci_low`, `PREFIXci_high`, `PREFIXtask_ci_low`, ..."""
        low, high = self.interval or (None, None)
        task_low, task_high = self.task_interval or (None, None)
        return {
            value: self.value,
            f"{prefix}ci_low": low,
            f"{prefix}ci_high": high,
            f"{prefix}task_ci_low": task_low,
            f"{prefix}task_ci_high": task_high,
        }


def estimate(strata: Sequence[Floats], statistic: Statistic) -> Estimate:
    """The statistic of all values together, and both intervals; strata that hold nothing but NaN are left out."""
    strata = [values for values in strata if not np.isnan(values).all()]
    if not strata:
        return Estimate()
    value = float(statistic(np.concatenate([values.ravel() for values in strata])))
    return Estimate(value, bootstrap_interval(strata, statistic), hierarchical_interval(strata, statistic))


def wins(loss: Floats, reference: Floats) -> Floats:
    """1 where a loss is lower than its paired reference, 0.5 where they tie, 0 otherwise.

    A loss that is not finite loses against every finite one and ties with its like.
    """
    own = np.where(np.isfinite(loss), loss, np.inf)
    other = np.where(np.isfinite(reference), reference, np.inf)
    return np.where(own < other, 1.0, np.where(own == other, 0.5, 0.0))
