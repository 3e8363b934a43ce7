"""Learning curves and schedules for the report: means over seeds, of the starts that tell most."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from llmrl.compare.plan import Cell, Plan
from llmrl.compare.regimes import WRONG_RATE
from llmrl.compare.rows import Found
from llmrl.hosts.curve import CurvePoint

_DIGITS = 5


def mean_curves(plan: Plan, tasks: Sequence[str], found: Found) -> list[dict[str, Any]]:
    """A curve for every task, method and shown start.

    Shown are the default rate, the tuned rate, stress, and of the wrong rates the lowest and the highest.

    Returns:
        task, method, regime, factor, and lists of one length: step, loss_validation, loss_train, learning_rate. A loss
        is the mean over the seeds, a rate the geometric mean; null where a seed has none.
    """
    wrong = [cell.factor for cell in plan.rows if cell.regime == WRONG_RATE]
    shown = {min(wrong, default=None), max(wrong, default=None)}
    groups: dict[tuple[int, str, str, float], list[Cell]] = {}
    for cell in plan.rows:
        if cell.regime != WRONG_RATE or cell.factor in shown:
            groups.setdefault((cell.task, cell.method, cell.regime, cell.factor), []).append(cell)
    return [
        {"task": tasks[task], "method": method, "regime": regime, "factor": factor, **mean_curve(curves)}
        for (task, method, regime, factor), cells in groups.items()
        if all(curves := [found[cell.key].curve for cell in cells])
    ]


def mean_curve(curves: Sequence[Sequence[CurvePoint]]) -> dict[str, list[Any]]:
    """Means at the steps that all curves have."""
    by_step = [{point.step: point for point in curve} for curve in curves]
    steps = [step for step in by_step[0] if all(step in points for points in by_step)]
    at = [[points[step] for points in by_step] for step in steps]
    return {
        "step": steps,
        "loss_validation": [_mean(point.loss_validation for point in points) for points in at],
        "loss_train": [_mean(point.loss_train for point in points) for points in at],
        "learning_rate": [_geometric_mean(point.learning_rate for point in points) for points in at],
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = list(values)
    numbers = [value for value in known if value is not None]
    return None if len(numbers) < len(known) else _rounded(sum(numbers) / len(numbers))


def _geometric_mean(values: Iterable[float | None]) -> float | None:
    known = list(values)
    positive = [value for value in known if value is not None and value > 0.0]
    if len(positive) < len(known):
        return None
    return _rounded(math.exp(sum(map(math.log, positive)) / len(positive)))


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
