"""From test losses to scores: 0 is the job before training, 1 the best linear decay of a learning-rate sweep.

    score = (loss_initial - loss) / (loss_initial - loss_oracle)

on the test split with the deployed weights. The oracle's rate is chosen for each task as the one whose mean final test
loss over the seeds is lowest, and a run is scored against the loss at this rate with its own seed, so that both share
data order. The choice looks at the test split on purpose: it makes the yardstick harder than any real sweep, which
would have to choose on validation data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

SCORE_FLOOR = -1.0
"""No score is lower, and a run whose loss is not finite gets this one: below zero it matters little how bad it is."""

MIN_RELATIVE_GAIN = 1e-3
"""An oracle that improves on the initial loss by less than this share of it is no yardstick."""


@dataclass(frozen=True)
class Oracle:
    """The best linear decay of a task's sweep.

    Attributes:
        learning_rate: The rate of the lowest mean loss; None where no rate has finite losses for all seeds.
        losses: Test loss at this rate, by seed.
        at_edge: The best rate is the lowest or the highest of the grid: a wider grid may hold a better one, and scores
            are then too high.
    """

    learning_rate: float | None
    losses: dict[int, float]
    at_edge: bool

    @property
    def loss_test(self) -> float:
        """Mean over the seeds; NaN without a rate."""
        return float(np.mean(list(self.losses.values()))) if self.losses else math.nan


def choose_oracle(sweep: Mapping[float, Mapping[int, float]]) -> Oracle:
    """Chooses the best rate of a sweep.

    Args:
        sweep: Test loss by learning rate and seed; every rate with the same seeds.
    """
    means = {rate: float(np.mean(list(losses.values()))) for rate, losses in sweep.items()}
    finite = {rate: value for rate, value in means.items() if math.isfinite(value)}
    if not finite:
        return Oracle(None, {}, at_edge=True)
    best = min(sorted(finite), key=finite.__getitem__)
    return Oracle(best, dict(sweep[best]), at_edge=best in (min(sweep), max(sweep)))


def score_run(loss_initial: float, loss_test: float, loss_oracle: float) -> tuple[float | None, str | None]:
    """The score of a run, at least `SCORE_FLOOR`.

    Returns:
        The score, or None where there is no yardstick, and a note that says why.

    >>> score_run(3.0, 2.5, 2.0)
    (0.5, None)
    >>> score_run(3.0, float("nan"), 2.0)
    (-1.0, 'the test loss is not finite')
    """
    gain = loss_initial - loss_oracle
    if not math.isfinite(gain):
        return None, "no score: no rate of the sweep ends with a finite loss"
    if gain <= MIN_RELATIVE_GAIN * abs(loss_initial):
        return None, f"no score: the best of the sweep improves the loss by {gain:.3g} only"
    if not math.isfinite(loss_test):
        return SCORE_FLOOR, "the test loss is not finite"
    score = (loss_initial - loss_test) / gain
    return (score, None) if score >= SCORE_FLOOR else (SCORE_FLOOR, f"the score of {score:.3g} is raised to the floor")
