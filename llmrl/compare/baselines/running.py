"""Runs a job with a baseline in place of a policy: same session, same data order, same initial weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from llmrl_envs.interface.base_schedule import decision_intervals
from llmrl_envs.interface.guards import SPIKE_MULTIPLE
from llmrl_envs.interface.loss_tracker import LossTracker
from llmrl_envs.interface.statistics import TrainingStatistics
from llmrl_envs.jobs.extensions import GradientClipper, OptimizerFactory, StepRates, clip_to_limit
from llmrl_envs.jobs.loading import Job
from llmrl_envs.jobs.session import FineTuningSession
from llmrl_envs.jobs.task import FineTuningTask

from llmrl.compare.baselines.rates import FeedbackRates
from llmrl.hosts.result import JobMeter, JobResult


@dataclass(frozen=True)
class Baseline:
    """What takes the place of a policy in a job.

    Attributes:
        make_rates: The learning rates of a job, from the given rate and the task. `FeedbackRates` are told the
            validation loss after every interval.
        make_optimizer: The optimizer's factory; None is the job's AdamW.
        make_clipper: Clips the gradients; None is the task's limit.
        effective_rate: The rate that the optimizer's last step took, where that is not the one it was given.
        depends_on_rate: Whether the given rate changes anything.
        settings: All of the above in words and numbers: equal settings, equal runs.
    """

    make_rates: Callable[[float, FineTuningTask], StepRates]
    settings: Mapping[str, Any]
    make_optimizer: Callable[[FineTuningTask], OptimizerFactory] | None = None
    make_clipper: Callable[[FineTuningTask], GradientClipper] | None = None
    effective_rate: Callable[[torch.optim.Optimizer], float] | None = None
    depends_on_rate: bool = True


class EventCounter:
    """Counts skipped steps and, by the guards' measure, intervals with a spike of the loss."""

    def __init__(self) -> None:
        self._losses = LossTracker(1)
        self.skipped_steps = self.spikes = 0

    def add(self, statistics: TrainingStatistics) -> None:
        """Takes in an interval."""
        self._losses.update(statistics)
        self.skipped_steps += int(statistics.skipped.sum())
        self.spikes += bool(self._losses.spike[0] > SPIKE_MULTIPLE)

    def counts(self) -> dict[str, int]:
        """As `llmrl.hosts.result.count_events` gives them; nothing rolls back or falls back here."""
        return {"skipped_steps": self.skipped_steps, "spikes": self.spikes, "rollbacks": 0, "fallbacks": 0}


def run_baseline(
    job: Job,
    baseline: Baseline,
    *,
    learning_rate: float,
    seed: int,
    curve_points: int = 0,
    on_step: Callable[[int], None] | None = None,
) -> JobResult:
    """Fine-tunes to the end of the budget; see `llmrl.hosts.job.run_job`.

    Args:
        job: The job, loaded.
        baseline: What chooses the rates, steps and clips.
        learning_rate: The rate that the job is given.
        seed: Data order and dropout.
        curve_points: Points of the learning curve.
        on_step: Told the steps done after every interval.
    """
    session = FineTuningSession(
        job,
        seed=seed,
        optimizer=baseline.make_optimizer(job.task) if baseline.make_optimizer else None,
        clip=baseline.make_clipper(job.task) if baseline.make_clipper else clip_to_limit,
    )
    rates = baseline.make_rates(learning_rate, job.task)
    meter, events = JobMeter(session, curve_points), EventCounter()
    for num_steps in decision_intervals(session.total_steps):
        statistics = session.run_interval(num_steps, rates)
        rate = _last_rate(session, rates, baseline)
        if isinstance(rates, FeedbackRates):
            rates.observe(meter.evaluate().loss)
        events.add(statistics)
        meter.add(statistics, rate)
        if on_step is not None:
            on_step(session.step)
    return meter.finish(events.counts())


def _last_rate(session: FineTuningSession, rates: StepRates, baseline: Baseline) -> float:
    if baseline.effective_rate is not None:
        return baseline.effective_rate(session.optimizer)
    return float(rates.learning_rate(np.array([session.step - 1]))[0])
