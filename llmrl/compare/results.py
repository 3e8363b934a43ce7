"""The rows of a comparison and what they add up to: the content of `results.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmrl.compare.aggregate import aggregate_rows, by_factor, by_regime, regimes_of, rows_in
from llmrl.compare.compute import Costs, compute_of
from llmrl.compare.curves import mean_curves
from llmrl.compare.methods import LINEAR, POLICY
from llmrl.compare.pairs import improvement_matrix, paired_differences, reference_method
from llmrl.compare.plan import Plan
from llmrl.compare.profiles import profile, profile_taus
from llmrl.compare.regimes import STRESS
from llmrl.compare.rows import Found, Row, find_oracles, find_targets, make_row
from llmrl.compare.scoring import SCORE_FLOOR, Oracle
from llmrl.compare.statistics import CONFIDENCE, NUM_RESAMPLES
from llmrl.config import CompareConfig

__all__ = ["ComparisonShape", "aggregate_rows", "make_results"]


@dataclass(frozen=True)
class ComparisonShape:
    """What a comparison spans.

    Attributes:
        tasks: Names, in the order that cells count them.
        factors: Starting rates, as factors on each task's default rate.
        seeds: Seeds.
        tuned: Whether every method is started from the best rate of the sweep as well.
    """

    tasks: tuple[str, ...]
    factors: tuple[float, ...]
    seeds: tuple[int, ...]
    tuned: bool = False

    @classmethod
    def of(cls, config: CompareConfig) -> ComparisonShape:
        """The shape that a configuration asks for."""
        names = tuple(task.name for task in config.all_tasks)
        return cls(names, config.learning_rate_factors, config.seeds, config.tuned)


def make_results(
    shape: ComparisonShape, plan: Plan, found: Found, methods: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Everything that `results.json` holds, but settings and versions.

    Args:
        shape: What it spans.
        plan: Its rows and sweep.
        found: Result of every run, by key.
        methods: What is said about each method, by name, in the order of tables.
    """
    oracles = find_oracles(plan, len(shape.tasks), found)
    rows = _rows(shape, plan, found, oracles, Costs(plan, found, methods))
    named = dict(zip(shape.tasks, oracles, strict=True))
    own = {name: [row for row in rows if row["method"] == name] for name in methods}
    return {
        "rows": rows,
        "aggregate": {name: by_regime(own[name], rows) for name in methods},
        "by_factor": {name: by_factor(own[name], rows, shape.factors) for name in methods},
        **_comparisons(rows, list(methods)),
        "profiles": _profiles(rows, own),
        "oracle": {name: _oracle_entry(oracle) for name, oracle in named.items()},
        "oracle_at_edge": any(oracle.at_edge for oracle in oracles),
        "compute": compute_of(len(shape.tasks) * len(shape.seeds), plan, found, list(methods), rows),
        "curves": mean_curves(plan, shape.tasks, found),
        "methods": dict(methods),
        "statistics": {
            "score_floor": SCORE_FLOOR,
            "confidence": CONFIDENCE,
            "num_resamples": NUM_RESAMPLES,
            "strata": "tasks",
            "units": "seeds",
        },
        "warnings": _warnings(rows, named, shape),
    }


def _rows(shape: ComparisonShape, plan: Plan, found: Found, oracles: Sequence[Oracle], costs: Costs) -> list[Row]:
    targets = find_targets(plan, oracles, found)
    return [
        make_row(
            cell,
            shape.tasks[cell.task],
            found[cell.key],
            oracles[cell.task],
            target=targets.get((cell.task, cell.seed), math.nan),
            cost=costs.of(cell),
        )
        for cell in plan.rows
    ]


def _comparisons(rows: Sequence[Row], methods: Sequence[str]) -> dict[str, Any]:
    """Methods against each other, in every regime that has rows."""
    reference = reference_method(methods, POLICY, LINEAR)
    matrices, differences = {}, {}
    for regime in regimes_of(rows):
        inside = rows_in(rows, regime)
        matrices[regime] = improvement_matrix(inside, methods)
        differences[regime] = paired_differences(inside, methods, reference)
    return {"improvement": matrices, "paired": {"reference": reference, "regimes": differences}}


def _profiles(rows: Sequence[Row], own: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    taus = profile_taus(rows)
    profiles = {
        regime: {name: told for name, of_method in own.items() if (told := profile(rows_in(of_method, regime), taus))}
        for regime in regimes_of(rows)
    }
    return {"taus": taus.tolist(), "regimes": profiles}


def _oracle_entry(oracle: Oracle) -> dict[str, Any]:
    loss = oracle.loss_test
    return {
        "learning_rate": oracle.learning_rate,
        "loss_test": loss if math.isfinite(loss) else None,
        "at_edge": oracle.at_edge,
    }


def _warnings(rows: Sequence[Row], oracles: Mapping[str, Oracle], shape: ComparisonShape) -> list[str]:
    told = [
        f"{task}: the best rate of the sweep, {oracle.learning_rate:.3g}, is at the edge of the grid; a wider grid may "
        "score every method lower"
        for task, oracle in oracles.items()
        if oracle.at_edge and oracle.learning_rate is not None
    ]
    if shape.tuned:
        # Tasks of `stress_tasks` have no tuned rate in any case.
        told += [
            f"{task}: no rate of the sweep ends with a finite loss, so that nothing starts from a tuned rate"
            for task in dict.fromkeys(row["task"] for row in rows if row["regime"] != STRESS)
            if oracles[task].learning_rate is None
        ]
    unscored = dict.fromkeys(f"{row['task']}: {row['note']}" for row in rows if row["score"] is None)
    if len(shape.seeds) == 1:
        told.append("one seed: there are no intervals")
    if len(shape.tasks) == 1:
        told.append("one task: nothing is known of others")
    return [*told, *unscored]
