"""What the rows of a method add up to, in every regime and at every starting rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np

from llmrl.compare.methods import LINEAR
from llmrl.compare.regimes import ALL_ROWS, DEFAULT_RATE, REGIMES, WRONG_RATE
from llmrl.compare.rows import Row, number
from llmrl.compare.statistics import Floats, estimate, interquartile_mean, mean, wins

Start: TypeAlias = tuple[str, str, float, int]


def rows_in(rows: Iterable[Row], regime: str) -> list[Row]:
    """The rows of a regime; "all" takes every row."""
    return [row for row in rows if regime in (ALL_ROWS, row["regime"])]


def regimes_of(rows: Sequence[Row]) -> list[str]:
    """The regimes that have rows, in the order of tables."""
    return [regime for regime in REGIMES if rows_in(rows, regime)]


def by_regime(own: Sequence[Row], rows: Sequence[Row]) -> dict[str, Any]:
    """Statistics of one method's rows in each regime that has any."""
    return {regime: aggregate_rows(rows_in(own, regime), rows) for regime in regimes_of(own)}


def by_factor(own: Sequence[Row], rows: Sequence[Row], factors: Iterable[float]) -> dict[str, Any]:
    """Statistics of one method's rows at each starting rate, the tuned rate and stress left out."""
    started = [row for row in own if row["regime"] in (DEFAULT_RATE, WRONG_RATE)]
    return {
        f"{factor:g}": aggregate_rows([row for row in started if row["learning_rate_factor"] == factor], rows)
        for factor in sorted(factors)
    }


def aggregate_rows(own: Sequence[Row], rows: Sequence[Row]) -> dict[str, Any]:
    """Statistics of one method in one regime.

    Args:
        own: Its rows.
        rows: All rows; the linear decay from the same start is looked up among them.

    Returns:
        iqm with its intervals over the rows that have a score; probability_of_improvement: share of starts from which
        the test loss is lower than that of linear decay, ties counted half; failures: runs that diverged;
        target_reached: share of runs that reach the validation loss of the sweep's best, None where none was measured;
        cost: mean compute of a start, in linear decays, and score_per_cost, the iqm over it.
        An interval is None with a single seed (over tasks: with a single task), the probability without a linear decay
        from any of the same starts.
    """
    scored = [row for row in own if row["score"] is not None]
    score = estimate(strata(scored, lambda row: float(row["score"])), interquartile_mean)
    won = _won_against_linear(own, rows)
    cost = _mean_of([row["cost"] for row in own])
    return {
        **score.named("iqm"),
        "num_runs": len(own),
        "num_scored": len(scored),
        **estimate(won, mean).named("probability_of_improvement", "improvement_"),
        "failures": sum(row["diverged"] for row in own),
        "accuracy": _mean_of([row["accuracy_test"] for row in own]),
        "target_reached": _mean_of([row["target_reached"] for row in own]),
        "cost": cost,
        "score_per_cost": score.value / cost if score.value is not None and cost else None,
    }


def _mean_of(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def strata(rows: Iterable[Row], value: Callable[[Row], float]) -> list[Floats]:
    """Values by task, float64[U, F]: a line for each seed, its starting rates side by side, NaN behind the last."""
    by_task: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        by_task.setdefault(row["task"], {}).setdefault(row["seed"], []).append(value(row))
    return [_padded(list(by_seed.values())) for by_seed in by_task.values()]


def _padded(lines: Sequence[Sequence[float]]) -> Floats:
    values = np.full((len(lines), max(map(len, lines))), np.nan)
    for line, given in zip(values, lines, strict=True):
        line[: len(given)] = given
    return values


def _won_against_linear(own: Sequence[Row], rows: Sequence[Row]) -> list[Floats]:
    linear = {start_of(row): number(row["loss_test"]) for row in rows if row["method"] == LINEAR}
    comparable = [row for row in own if start_of(row) in linear]
    return strata(
        comparable, lambda row: float(wins(np.array(number(row["loss_test"])), np.array(linear[start_of(row)])))
    )


def start_of(row: Row) -> Start:
    """What two methods must share so that their rows are a pair."""
    return row["task"], row["regime"], row["learning_rate_factor"], row["seed"]
