"""One line of the results for every start: what the run came to, and what that is against the sweep's best."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from llmrl.compare.cache import RunResult
from llmrl.compare.plan import Cell, Plan
from llmrl.compare.scoring import Oracle, choose_oracle, score_run
from llmrl.hosts.curve import CurvePoint

Row: TypeAlias = dict[str, Any]
Found: TypeAlias = Mapping[str, RunResult]


def make_row(cell: Cell, task: str, result: RunResult, oracle: Oracle, *, target: float, cost: float | None) -> Row:
    """The line of one start.

    Args:
        cell: Which start.
        task: Name of the task.
        result: What its run came to.
        oracle: The yardstick of the task.
        target: Validation loss that `steps_to_target` waits for; NaN for none.
        cost: Compute of the start, in linear decays of the task; see `llmrl.compare.compute`.
    """
    initial, final = number(result.loss_initial), number(result.loss_test)
    steps = steps_to_target(result.curve, target)
    told = math.isfinite(target) and bool(result.curve)
    score, note = score_run(initial, final, oracle.losses.get(cell.seed, math.nan))
    return {
        "task": task,
        "method": cell.method,
        "regime": cell.regime,
        "seed": cell.seed,
        "learning_rate": cell.learning_rate,
        "learning_rate_factor": cell.factor,
        "loss_initial": result.loss_initial,
        "loss_test": result.loss_test,
        "accuracy_test": result.accuracy_test,
        "score": score,
        "diverged": result.diverged,
        "failures": int(result.diverged),
        "steps_to_target": steps,
        "target_reached": steps is not None if told else None,
        "seconds": result.seconds,
        "tokens_trained": result.tokens_trained,
        "tokens_evaluated": result.tokens_evaluated,
        "peak_memory_bytes": result.peak_memory_bytes,
        "num_trials": result.num_trials,
        "cost": cost,
        "events": dict(result.events),
        "reused": cell.reused,
        "note": note,
    }


def steps_to_target(curve: Sequence[CurvePoint], target: float) -> int | None:
    """First optimizer step at which a validation loss was measured that is no higher than the target; None if never.

    The target is the last validation loss of the sweep's best run with the same task and seed, so that its own run
    arrives at the end at the latest. Losses are measured every so often: the figure is that coarse.
    """
    for point in curve:
        if point.loss_validation is not None and point.loss_validation <= target:
            return point.step
    return None


def find_oracles(plan: Plan, num_tasks: int, found: Found) -> list[Oracle]:
    """The best linear decay of every task's sweep, by place of the task."""
    sweeps: list[dict[float, dict[int, float]]] = [{} for _ in range(num_tasks)]
    for cell in plan.sweep:
        sweeps[cell.task].setdefault(cell.learning_rate, {})[cell.seed] = number(found[cell.key].loss_test)
    return [choose_oracle(sweep) for sweep in sweeps]


def tuned_factors(plan: Plan, oracles: Sequence[Oracle]) -> dict[int, float]:
    """Best rate of the sweep as a factor on the default, by place of the task; without those that have none."""
    factors = {(cell.task, cell.learning_rate): cell.factor for cell in plan.sweep}
    rates = {task: oracle.learning_rate for task, oracle in enumerate(oracles)}
    return {task: factors[task, rate] for task, rate in rates.items() if rate is not None}


def find_targets(plan: Plan, oracles: Sequence[Oracle], found: Found) -> dict[tuple[int, int], float]:
    """Last validation loss of the sweep's best run, by place of the task and seed; NaN where none was measured."""
    return {
        (cell.task, cell.seed): _last_loss(found[cell.key].curve)
        for cell in plan.sweep
        if cell.learning_rate == oracles[cell.task].learning_rate
    }


def _last_loss(curve: Iterable[CurvePoint]) -> float:
    measured = [point.loss_validation for point in curve if point.loss_validation is not None]
    return measured[-1] if measured else math.nan


def number(value: float | None) -> float:
    """NaN for what JSON has no number for."""
    return math.nan if value is None else value
