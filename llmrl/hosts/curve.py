"""The learning curve of a job, measured beside it for the record: it changes no number of the job."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
from llmrl_envs.interface.statistics import TrainingStatistics
from llmrl_envs.jobs.session import FineTuningSession
from numpy.typing import NDArray

NUM_CURVE_POINTS = 20
"""Points of a curve beside the one before training; fewer where a job takes fewer decisions."""


@dataclass(frozen=True)
class CurvePoint:
    """One point of a learning curve.

    Attributes:
        step: Optimizer steps done.
        loss_validation: On the fixed validation subset, nats per target; None if not finite.
        loss_train: Mean over the steps since the point before; None before training, or where every step was skipped.
        learning_rate: Rate of the latest step; None before training.
    """

    step: int
    loss_validation: float | None
    loss_train: float | None = None
    learning_rate: float | None = None


class CurveRecorder:
    """Measures the validation loss of a session about `num_points` times, evenly over its budget, and at the end.

    Whoever runs the session calls `add` after every interval; points lie where intervals end.

    Args:
        session: The job, before its first step.
        num_points: How many, the one before training not counted; 0 measures nothing.

    Attributes:
        points: The curve so far.
        tokens: Tokens that measuring it took.
        seconds: Wall time that measuring it took.
    """

    def __init__(self, session: FineTuningSession, num_points: int = NUM_CURVE_POINTS) -> None:
        self._session = session
        self._num_points = num_points
        self._losses: list[NDArray[np.float64]] = []
        self._next = 0.0
        self.points: list[CurvePoint] = []
        self.tokens = 0
        self.seconds = 0.0

    def begin(self) -> None:
        """Measures the point before training."""
        if self._num_points:
            self._measure(None)

    def add(self, statistics: TrainingStatistics, learning_rate: float) -> None:
        """Takes in an interval, and measures a point if one is due.

        Args:
            statistics: Of the interval.
            learning_rate: Rate of its last step.
        """
        self._losses.append(statistics.loss[0])
        step, total = self._session.step, self._session.total_steps
        if self._num_points and (step >= self._next or step == total):
            self._measure(learning_rate)

    def _measure(self, learning_rate: float | None) -> None:
        began = time.perf_counter()
        found = self._session.evaluate("validation")
        self.seconds += time.perf_counter() - began
        self.tokens += found.num_tokens
        step, spacing = self._session.step, self._session.total_steps / self._num_points
        losses = np.concatenate([np.empty(0), *self._losses])
        loss_train = float(np.mean(losses[np.isfinite(losses)])) if np.isfinite(losses).any() else None
        point = CurvePoint(step, _finite(found.loss), loss_train, _finite(learning_rate))
        self.points.append(point)
        self._losses = []
        self._next = (math.floor(step / spacing) + 1) * spacing


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
