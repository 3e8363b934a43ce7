"""Reference runs of many jobs at once; the same curves as `ReferenceCurves` makes one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from llmrl_envs.interface.schedule_settings import ScheduleSettings
from llmrl_envs.jobs.loading import Job
from llmrl_envs.jobs.population.members import IntervalPlan, Member
from llmrl_envs.jobs.population.pool import PopulationPool
from llmrl_envs.jobs.reference import WARMUP_FRACTION, Measured, given_rate_schedule, reference_key


def run_references(
    pool: PopulationPool, jobs: Sequence[tuple[Job, int]], *, measured: Measured, settings: ScheduleSettings
) -> None:
    """Runs the references that are missing among those of `jobs` (job and seed), and keeps their curves.

    Args:
        pool: Runs them.
        jobs: Job and seed of each.
        measured: When losses are measured.
        settings: When decisions come.
    """
    curves = pool.library.curves
    missing = {reference_key(job.task, seed, measured, settings): (job, seed) for job, seed in jobs}
    runs = {key: _Run(pool.add(*pair), settings) for key, pair in missing.items() if key not in curves}
    under_way = list(runs.values())
    _evaluate(pool, under_way)
    while under_way := [run for run in under_way if not run.is_over]:
        pool.run_interval([run.plan() for run in under_way])
        due = [run for run in under_way if measured == "decisions" or run.is_last]
        for run in under_way:
            if run not in due:
                run.note(math.nan)
        _evaluate(pool, due)
    for key, run in runs.items():
        curves[key] = tuple(run.curve)
        pool.remove(run.member)


class _Run:
    """A linear decay from the task's default rate."""

    def __init__(self, member: Member, settings: ScheduleSettings) -> None:
        task = member.job.task
        self.member = member
        self.curve: list[float] = []
        self._intervals = settings.intervals(task.steps)
        self._schedule = given_rate_schedule("linear", task.steps, task.learning_rate, WARMUP_FRACTION)

    @property
    def is_over(self) -> bool:
        """The budget is used up."""
        return len(self.curve) == len(self._intervals) + 1

    @property
    def is_last(self) -> bool:
        """One value is missing."""
        return len(self.curve) == len(self._intervals)

    def plan(self) -> IntervalPlan:
        """The next interval."""
        steps = range(self.member.step, self.member.step + self._intervals[len(self.curve) - 1])
        rates = np.array([float(self._schedule.learning_rate(np.array([step]))[0]) for step in steps])
        return IntervalPlan(self.member, rates, self.member.job.task.optimizer.max_grad_norm, probe=False)

    def note(self, loss: float) -> None:
        """Takes in a validation loss; one that is not finite counts as no improvement."""
        finite = math.isfinite(loss) or not self.curve
        self.curve.append(math.log(max(loss, 1e-12)) if finite else self.curve[0])


def _evaluate(pool: PopulationPool, runs: Sequence[_Run]) -> None:
    if not runs:
        return
    found = pool.evaluate([run.member for run in runs], "validation", [False] * len(runs))
    for run, evaluation in zip(runs, found, strict=True):
        run.note(evaluation.loss)
