"""The reference that rewards are scaled by: a linear decay to zero from the task's default rate."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from llmrl_envs.interface.action import action_table
from llmrl_envs.interface.schedule import Schedule
from llmrl_envs.interface.schedule_settings import ScheduleSettings
from llmrl_envs.jobs.loading import Job
from llmrl_envs.jobs.session import FineTuningSession
from llmrl_envs.jobs.task import FineTuningTask

WARMUP_FRACTION = 0.05
Measured = Literal["decisions", "end"]
"""When a curve is measured: after every interval, or at the end alone; it stands at the initial loss until then."""


def given_rate_schedule(base: str, total_steps: int, learning_rate: float, warmup_fraction: float) -> Schedule:
    """A usual schedule: a base shape times the given rate, with no decisions to take.

    Args:
        base: constant, linear, cosine or wsd.
        total_steps: Budget in optimizer steps.
        learning_rate: Peak rate.
        warmup_fraction: Share of the budget spent rising to it.
    """
    settings = ScheduleSettings(base=base, warmup_fraction=warmup_fraction, skip_outliers=False)  # type: ignore[arg-type]
    return Schedule(action_table("factors"), np.array([total_steps]), np.array([learning_rate]), settings)


class ReferenceCurves:
    """Validation log-loss of reference runs at every decision; one run per task and seed, kept.

    Args:
        curves: Curves that are known already; new ones are added.
    """

    def __init__(self, curves: dict[str, tuple[float, ...]]) -> None:
        self._curves = curves

    def curve(
        self, job: Job, seed: int, *, measured: Measured = "decisions", settings: ScheduleSettings | None = None
    ) -> tuple[float, ...]:
        """Log-loss before the first and after every decision interval, one value more than there are intervals.

        A reference that is not finite (a default rate that destroys the model) counts as no improvement from there on.

        Args:
            job: The job.
            seed: Of its data order.
            measured: When losses are measured.
            settings: When decisions come; None takes the usual times.
        """
        settings = settings or ScheduleSettings()
        key = reference_key(job.task, seed, measured, settings)
        if key not in self._curves:
            self._curves[key] = _run_reference(job, seed, measured, settings.intervals(job.task.steps))
        return self._curves[key]


def reference_key(task: FineTuningTask, seed: int, measured: Measured, settings: ScheduleSettings) -> str:
    """What decides a reference run; jobs that share it share the curve."""
    ends = "|end" if measured == "end" else ""
    intervals = settings.intervals(task.steps)
    times = "" if intervals == ScheduleSettings().intervals(task.steps) else f"|{intervals}"
    return f"{task.model_dump_json(exclude={'name', 'test_examples'})}|{seed}{ends}{times}"


def _run_reference(job: Job, seed: int, measured: Measured, intervals: tuple[int, ...]) -> tuple[float, ...]:
    session = FineTuningSession(job, seed=seed, record=False)
    schedule = given_rate_schedule("linear", job.task.steps, job.task.learning_rate, WARMUP_FRACTION)
    curve = [math.log(max(session.evaluate("validation").loss, 1e-12))]
    for num_steps in intervals:
        session.run_interval(num_steps, schedule)
        if measured == "end" and session.step < job.task.steps:
            curve.append(curve[0])
            continue
        loss = session.evaluate("validation").loss
        curve.append(math.log(max(loss, 1e-12)) if math.isfinite(loss) else curve[0])
    return tuple(curve)
