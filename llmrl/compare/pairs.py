"""Methods against each other, start by start: same task, starting rate, seed, initial weights and data order.

The probability that X improves on Y is the share of starts from which X ends with the lower test loss, ties counted
half. Agarwal et al. 2021 compare every run of X with every run of Y on a task, because theirs share nothing; here the
two runs of a start share all but the method, and pairing them takes that noise away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llmrl.compare.aggregate import start_of
from llmrl.compare.rows import Row
from llmrl.compare.significance import holm, signed_rank_p_value
from llmrl.compare.statistics import (
    Estimate,
    Floats,
    bootstrap_means,
    estimate,
    hierarchical_means,
    interquartile_mean,
    mean,
    percentile_interval,
    wins,
)


def aligned(rows: Sequence[Row], methods: Sequence[str], column: str, lost: float) -> list[Floats]:
    """A column of the rows by task, float64[M, U, F]: method, seed, start; NaN where a method has no such row.

    Args:
        rows: Of one regime.
        methods: M names, in this order.
        column: "loss_test" or "score".
        lost: What stands for None; NaN leaves the row out.
    """
    values = {(row["method"], start_of(row)): lost if row[column] is None else float(row[column]) for row in rows}
    found = []
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in rows if row["task"] == task]
        seeds = sorted({row["seed"] for row in of_task})
        starts = sorted({(row["regime"], row["learning_rate_factor"]) for row in of_task})
        lines = [
            [[values.get((method, (task, *start, seed)), np.nan) for start in starts] for seed in seeds]
            for method in methods
        ]
        found.append(np.array(lines, dtype=np.float64).reshape(len(methods), len(seeds), len(starts)))
    return found


# -- probability of improvement -----------------------------------------------------------------------------------


def improvement_matrix(rows: Sequence[Row], methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Probability that each method improves on each other one, in one regime.

    Args:
        rows: Of one regime.
        methods: Names, in the order of the matrix.

    Returns:
        By method and other method: probability, ci_low, ci_high (None where every task has one seed), task_ci_low,
        task_ci_high (None with one task), num_pairs. Two methods without a common start have no entry.
    """
    pairs = [(i, j) for i in range(len(methods)) for j in range(i + 1, len(methods))]
    matrix: dict[str, dict[str, Any]] = {name: {} for name in methods}
    if not pairs:
        return matrix
    won = [_wins_of_pairs(losses, pairs) for losses in aligned(rows, methods, "loss_test", np.inf)]
    several = any(values.shape[0] > 1 for values in won)
    by_seed = bootstrap_means(won, np.random.default_rng(0)) if several else None
    by_task = hierarchical_means(won, np.random.default_rng(0)) if len(won) > 1 else None
    for place, (i, j) in enumerate(pairs):
        counted = np.concatenate([values[..., place].ravel() for values in won])
        counted = counted[~np.isnan(counted)]
        if counted.size:
            intervals = [
                None if means is None else percentile_interval(_finite(means[:, place])) for means in (by_seed, by_task)
            ]
            value = Estimate(float(counted.mean()), *intervals)
            matrix[methods[i]][methods[j]] = {**value.named("probability"), "num_pairs": int(counted.size)}
            matrix[methods[j]][methods[i]] = {**_mirrored(value).named("probability"), "num_pairs": int(counted.size)}
    return matrix


def _wins_of_pairs(losses: Floats, pairs: Sequence[tuple[int, int]]) -> Floats:  # [M, U, F] -> [U, F, P]
    first, second = losses[[i for i, _ in pairs]], losses[[j for _, j in pairs]]
    won = np.where(np.isnan(first) | np.isnan(second), np.nan, wins(first, second))
    return np.moveaxis(won, 0, -1)


def _finite(values: Floats) -> Floats:
    """Resamples that drew none of the common starts say nothing."""
    return values[~np.isnan(values)]


def _mirrored(value: Estimate) -> Estimate:
    """The probability of the other one of a pair."""
    seeds, tasks = (
        None if bounds is None else (1.0 - bounds[1], 1.0 - bounds[0])
        for bounds in (value.interval, value.task_interval)
    )
    return Estimate(None if value.value is None else 1.0 - value.value, seeds, tasks)


# -- paired differences -------------------------------------------------------------------------------------------


def paired_differences(rows: Sequence[Row], methods: Sequence[str], reference: str) -> dict[str, dict[str, Any]]:
    """Score of the reference method minus that of every other one, start by start, in one regime.

    Args:
        rows: Of one regime.
        methods: Names.
        reference: Whose advantage is told.

    Returns:
        By method: num_pairs; num_units, seeds of all tasks; mean and iqm of the differences with intervals over seeds
        and over tasks; worst, the lowest difference; p_value of the signed-rank test over units (mean of each task and
        seed over its starts), and p_value_tasks over the means of tasks, each with its Holm correction for the number
        of methods. A method without a common scored start has no entry.
    """
    others = [name for name in methods if name != reference]
    scores = aligned(rows, [reference, *others], "score", np.nan)
    told = {}
    for place, name in enumerate(others, start=1):
        differences = [values[0] - values[place] for values in scores]  # [U, F]
        if not all(np.isnan(values).all() for values in differences):
            told[name] = _describe(differences)
    for key in ("p_value", "p_value_tasks"):
        corrected = holm({name: entry[key] for name, entry in told.items()})
        for name, value in corrected.items():
            told[name][f"{key}_holm"] = value
    return told


def _describe(differences: Sequence[Floats]) -> dict[str, Any]:
    there = [values[~np.isnan(values).all(axis=1)] for values in differences]
    kept = [values for values in there if values.size]
    units = [mean(values) for values in kept]
    pooled = np.concatenate([values.ravel() for values in kept])
    pooled = pooled[~np.isnan(pooled)]
    return {
        "num_pairs": int(pooled.size),
        "num_units": sum(len(values) for values in units),
        "num_tasks": len(units),
        "mean": estimate(kept, mean).named("value"),
        "iqm": estimate(kept, interquartile_mean).named("value"),
        "worst": float(pooled.min()),
        "p_value": signed_rank_p_value(np.concatenate(units)),
        "p_value_tasks": signed_rank_p_value(np.array([values.mean() for values in units])),
    }


def reference_method(methods: Sequence[str], policy: str, linear: str) -> str:
    """Whose advantage is told: the policy; without one the first method that is not linear decay."""
    if policy in methods:
        return policy
    return next((name for name in methods if name != linear), methods[0])
