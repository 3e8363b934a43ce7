"""The rows of a comparison and what they add up to: the content of `results.json`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmrl.compare.cache import RunResult
from llmrl.compare.methods import LINEAR
from llmrl.compare.plan import Cell, Plan
from llmrl.compare.scoring import SCORE_FLOOR, Oracle, choose_oracle, score_run
from llmrl.compare.statistics import (
    CONFIDENCE,
    NUM_RESAMPLES,
    Floats,
    Statistic,
    bootstrap_interval,
    interquartile_mean,
    mean,
    wins,
)
from llmrl.config import CompareConfig

Row = dict[str, Any]
Start = tuple[str, float, int]
DEFAULT_RATE, WRONG_RATE, ALL_RATES = "default", "wrong", "all"
REGIMES = (DEFAULT_RATE, WRONG_RATE, ALL_RATES)


@dataclass(frozen=True)
class ComparisonShape:
    """What a comparison spans.

    Attributes:
        tasks: Names, in the order that cells count them.
        factors: Starting rates, as factors on each task's default rate.
        seeds: Seeds.
    """

    tasks: tuple[str, ...]
    factors: tuple[float, ...]
    seeds: tuple[int, ...]

    @classmethod
    def of(cls, config: CompareConfig) -> ComparisonShape:
        """The shape that a configuration asks for."""
        return cls(tuple(task.name for task in config.tasks), config.learning_rate_factors, config.seeds)


def make_results(
    shape: ComparisonShape, plan: Plan, found: Mapping[str, RunResult], methods: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Everything that `results.json` holds.

    Args:
        shape: What it spans.
        plan: Its rows and sweep.
        found: Result of every run, by key.
        methods: What is said about each method, by name, in the order of tables.
    """
    names = shape.tasks
    oracles = {name: _oracle(plan, index, found) for index, name in enumerate(names)}
    rows = [_row(cell, names[cell.task], found[cell.key], oracles[names[cell.task]]) for cell in plan.rows]
    return {
        "rows": rows,
        "aggregate": {name: _by_regime(_of_method(rows, name), rows) for name in methods},
        "by_factor": {name: _by_factor(_of_method(rows, name), rows, shape) for name in methods},
        "oracle": {name: _oracle_entry(oracle) for name, oracle in oracles.items()},
        "oracle_at_edge": any(oracle.at_edge for oracle in oracles.values()),
        "compute": _compute(shape, plan, found, list(methods)),
        "methods": dict(methods),
        "statistics": {
            "score_floor": SCORE_FLOOR,
            "confidence": CONFIDENCE,
            "num_resamples": NUM_RESAMPLES,
            "strata": "tasks",
            "units": "seeds",
        },
        "warnings": _warnings(rows, oracles, shape),
    }


# -- rows ---------------------------------------------------------------------------------------------------------


def _row(cell: Cell, task: str, result: RunResult, oracle: Oracle) -> Row:
    initial, final = _number(result.loss_initial), _number(result.loss_test)
    score, note = score_run(initial, final, oracle.losses.get(cell.seed, math.nan))
    return {
        "task": task,
        "method": cell.method,
        "regime": DEFAULT_RATE if cell.factor == 1.0 else WRONG_RATE,
        "seed": cell.seed,
        "learning_rate": cell.learning_rate,
        "learning_rate_factor": cell.factor,
        "loss_initial": result.loss_initial,
        "loss_test": result.loss_test,
        "accuracy_test": result.accuracy_test,
        "score": score,
        "diverged": result.diverged,
        "seconds": result.seconds,
        "tokens_trained": result.tokens_trained,
        "tokens_evaluated": result.tokens_evaluated,
        "reused": cell.reused,
        "note": note,
    }


def _oracle(plan: Plan, task: int, found: Mapping[str, RunResult]) -> Oracle:
    sweep: dict[float, dict[int, float]] = {}
    for cell in plan.sweep:
        if cell.task == task:
            sweep.setdefault(cell.learning_rate, {})[cell.seed] = _number(found[cell.key].loss_test)
    return choose_oracle(sweep)


def _oracle_entry(oracle: Oracle) -> dict[str, Any]:
    loss = oracle.loss_test
    return {
        "learning_rate": oracle.learning_rate,
        "loss_test": loss if math.isfinite(loss) else None,
        "at_edge": oracle.at_edge,
    }


def _number(value: float | None) -> float:
    return math.nan if value is None else value


# -- what they add up to ------------------------------------------------------------------------------------------


def _of_method(rows: Sequence[Row], method: str) -> list[Row]:
    return [row for row in rows if row["method"] == method]


def _by_regime(own: Sequence[Row], rows: Sequence[Row]) -> dict[str, Any]:
    groups = {name: [row for row in own if name in (ALL_RATES, row["regime"])] for name in REGIMES}
    return {name: aggregate_rows(group, rows) for name, group in groups.items() if group}


def _by_factor(own: Sequence[Row], rows: Sequence[Row], shape: ComparisonShape) -> dict[str, Any]:
    return {
        f"{factor:g}": aggregate_rows([row for row in own if row["learning_rate_factor"] == factor], rows)
        for factor in sorted(shape.factors)
    }


def aggregate_rows(own: Sequence[Row], rows: Sequence[Row]) -> dict[str, Any]:
    """Statistics of one method in one regime.

    Args:
        own: Its rows.
        rows: All rows; the linear decay from the same start is looked up among them.

    Returns:
        iqm with its interval over the rows that have a score; probability_of_improvement: share of starts from which
        the test loss is lower than that of linear decay, ties counted half; failures: runs that diverged. An interval
        is None with a single seed, the probability without a linear decay from any of the same starts.
    """
    scored = [row for row in own if row["score"] is not None]
    scores = _strata(scored, lambda row: float(row["score"]))
    won = _won_against_linear(own, rows)
    iqm = _estimate(scores, interquartile_mean)
    improvement = _estimate(won, mean)
    return {
        "iqm": iqm[0],
        "ci_low": iqm[1],
        "ci_high": iqm[2],
        "num_runs": len(own),
        "num_scored": len(scored),
        "probability_of_improvement": improvement[0],
        "improvement_ci_low": improvement[1],
        "improvement_ci_high": improvement[2],
        "failures": sum(row["diverged"] for row in own),
    }


def _estimate(strata: Sequence[Floats], statistic: Statistic) -> tuple[float | None, float | None, float | None]:
    """The statistic of all values together and its interval."""
    if not strata:
        return None, None, None
    value = float(statistic(np.concatenate([values.ravel() for values in strata])))
    interval = bootstrap_interval(strata, statistic)
    return (value, None, None) if interval is None else (value, *interval)


def _strata(rows: Iterable[Row], value: Callable[[Row], float]) -> list[Floats]:
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
    linear = {_start(row): _number(row["loss_test"]) for row in rows if row["method"] == LINEAR}
    comparable = [row for row in own if _start(row) in linear]
    return _strata(
        comparable, lambda row: float(wins(np.array(_number(row["loss_test"])), np.array(linear[_start(row)])))
    )


def _start(row: Row) -> Start:
    return row["task"], row["learning_rate_factor"], row["seed"]


# -- compute ------------------------------------------------------------------------------------------------------


def _compute(
    shape: ComparisonShape, plan: Plan, found: Mapping[str, RunResult], methods: Sequence[str]
) -> dict[str, Any]:
    """What each method costs. A job of the sweep is all its rates; a run counts once in each entry."""
    entries = {name: _cost([cell for cell in plan.rows if cell.method == name], found) for name in methods}
    num_jobs = len(shape.tasks) * len(shape.seeds)
    return {**entries, "sweep": _cost(plan.sweep, found, num_jobs)}


def _cost(cells: Sequence[Cell], found: Mapping[str, RunResult], num_jobs: int | None = None) -> dict[str, Any]:
    runs = [found[key] for key in dict.fromkeys(cell.key for cell in cells)]
    jobs = [found[cell.key] for cell in cells]
    num_jobs = num_jobs or len(jobs)
    return {
        "num_jobs": num_jobs,
        "num_runs": len(runs),
        "tokens_trained": sum(run.tokens_trained for run in runs),
        "tokens_evaluated": sum(run.tokens_evaluated for run in runs),
        "seconds": sum(run.seconds for run in runs),
        "tokens_trained_per_job": sum(job.tokens_trained for job in jobs) / num_jobs,
        "tokens_evaluated_per_job": sum(job.tokens_evaluated for job in jobs) / num_jobs,
    }


# -- warnings -----------------------------------------------------------------------------------------------------


def _warnings(rows: Sequence[Row], oracles: Mapping[str, Oracle], shape: ComparisonShape) -> list[str]:
    told = [
        f"{task}: the best rate of the sweep, {oracle.learning_rate:.3g}, is at the edge of the grid; a wider grid may "
        "score every method lower"
        for task, oracle in oracles.items()
        if oracle.at_edge and oracle.learning_rate is not None
    ]
    unscored = dict.fromkeys(f"{row['task']}: {row['note']}" for row in rows if row["score"] is None)
    if len(shape.seeds) == 1:
        told.append("one seed: there are no intervals")
    return [*told, *unscored]
