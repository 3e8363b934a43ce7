"""What methods cost: everything that a method trained and evaluated to arrive at the weights that it deploys.

The unit is one linear decay of the same task, so that tasks of different sizes add up:

    cost = (tokens_trained + tokens_evaluated / 3) / tokens that a run of the task's sweep trains

An evaluated token is a forward pass, a trained one a forward and a backward pass of twice that. A search counts all its
trials and a population all its members, since both are part of the tokens of their run. A start from the tuned rate
counts the sweep that found it, for methods that the given rate matters to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmrl.compare.cache import RunResult
from llmrl.compare.plan import Cell, Plan
from llmrl.compare.regimes import TUNED_RATE
from llmrl.compare.rows import Found, Row

FORWARD_SHARE = 1.0 / 3.0
"""Compute of a token's forward pass over that of its forward and backward pass."""


def training_tokens(run: RunResult) -> float:
    """Tokens trained, and those evaluated as what they cost in trained ones."""
    return run.tokens_trained + FORWARD_SHARE * run.tokens_evaluated


class Costs:
    """Tells the cost of a start.

    Args:
        plan: Its sweep is the unit.
        found: Result of every run, by key.
        methods: What is said about each method, by name; `depends_on_rate` is read.
    """

    def __init__(self, plan: Plan, found: Found, methods: Mapping[str, Mapping[str, Any]]) -> None:
        self._found = found
        self._needs_sweep = {name for name, told in methods.items() if told.get("depends_on_rate", True)}
        self._sweeps: dict[int, dict[int, list[float]]] = {}
        for cell in plan.sweep:
            by_seed = self._sweeps.setdefault(cell.task, {})
            by_seed.setdefault(cell.seed, []).append(training_tokens(found[cell.key]))

    def of(self, cell: Cell) -> float | None:
        """Cost of a start in linear decays of its task; None for a task without a sweep."""
        sweep = self._sweeps.get(cell.task)
        if sweep is None:
            return None
        runs = [tokens for by_seed in sweep.values() for tokens in by_seed]
        unit = sum(runs) / len(runs)
        own = training_tokens(self._found[cell.key])
        if cell.regime == TUNED_RATE and cell.method in self._needs_sweep:
            own += sum(sweep[cell.seed])
        return own / unit if unit else None


def compute_of(
    num_jobs: int, plan: Plan, found: Found, methods: Sequence[str], rows: Sequence[Row]
) -> dict[str, dict[str, Any]]:
    """Totals of every method and of the sweep.

    Args:
        num_jobs: Tasks times seeds; for the sweep a job is all its rates.
        plan: Which runs there are; a run counts once in each entry.
        found: Result of every run, by key.
        methods: Names.
        rows: The same starts as lines.
    """
    entries = {name: _totals([cell for cell in plan.rows if cell.method == name], found) for name in methods}
    for name, entry in entries.items():
        own = [row for row in rows if row["method"] == name and row["cost"] is not None]
        entry["cost_per_job"] = _mean([row["cost"] for row in own if row["regime"] != TUNED_RATE])
        entry["cost_per_tuned_job"] = _mean([row["cost"] for row in own if row["regime"] == TUNED_RATE])
    sweep = _totals(plan.sweep, found, num_jobs)
    sweep["cost_per_job"] = sweep["cost_per_tuned_job"] = len(plan.sweep) / num_jobs if plan.sweep else None
    return {**entries, "sweep": sweep}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _totals(cells: Sequence[Cell], found: Found, num_jobs: int | None = None) -> dict[str, Any]:
    runs = [found[key] for key in dict.fromkeys(cell.key for cell in cells)]
    jobs = [found[cell.key] for cell in cells]
    num_jobs = num_jobs or len(jobs)
    memory = [run.peak_memory_bytes for run in runs if run.peak_memory_bytes is not None]
    return {
        "num_jobs": num_jobs,
        "num_runs": len(runs),
        "num_trainings": sum(run.num_trials for run in runs),
        "tokens_trained": sum(run.tokens_trained for run in runs),
        "tokens_evaluated": sum(run.tokens_evaluated for run in runs),
        "seconds": sum(run.seconds for run in runs),
        "tokens_trained_per_job": sum(job.tokens_trained for job in jobs) / max(num_jobs, 1),
        "tokens_evaluated_per_job": sum(job.tokens_evaluated for job in jobs) / max(num_jobs, 1),
        "seconds_per_job": sum(job.seconds for job in jobs) / max(num_jobs, 1),
        "peak_memory_bytes": max(memory, default=None),
    }
