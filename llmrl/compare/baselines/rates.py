"""Learning rates of the baselines: functions of the step, and schedulers that are told the validation loss."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from llmrl_envs.interface.base_schedule import BaseName, base_factor
from llmrl_envs.interface.statistics import Booleans, Floats, Integers
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers.optimization import GreedyLR

PLATEAU_FACTOR, PLATEAU_PATIENCE = 0.5, 2
GREEDY_RANGE = 30.0
GREEDY_FACTOR, GREEDY_PATIENCE = 0.7, 1


class Scheduler(Protocol):
    """A scheduler of torch or transformers that is stepped with a loss."""

    def step(self, metrics: float, /) -> None:
        """Takes in a loss and changes its optimizer's rate."""


class _Plain:
    """What no baseline does: freeze layers, tighten clipping, lean on a step's own gradient, skip what stands out."""

    @property
    def frozen(self) -> Booleans:
        return np.zeros(1, np.bool_)

    def clipping_factor(self) -> Floats:
        return np.ones(1)

    def momentum_share(self) -> Floats:
        return np.ones(1)

    def skips_outliers(self) -> bool:
        return False


class FixedRates(_Plain):
    """A base shape over a peak rate.

    Args:
        base: See `base_factor`.
        peak: Rate where the base is 1.
        total_steps: The job's budget.
        warmup_steps: Steps of linear warm-up.
    """

    def __init__(self, base: BaseName, peak: float, total_steps: int, warmup_steps: int = 0) -> None:
        self._base: BaseName = base
        self.peak = peak
        self._total, self._warmup = np.array([total_steps]), np.array([warmup_steps])

    def learning_rate(self, step: Integers) -> Floats:
        """Rate of the optimizer step with index `step`, float64[1]."""
        return self.peak * base_factor(self._base, step, self._total, self._warmup)


class FeedbackRates(_Plain):
    """The rate of a scheduler that steps on a loss, held between two losses.

    Args:
        scheduler: Changes the optimizer's one group.
        optimizer: Holds the rate; it trains nothing.
    """

    def __init__(self, scheduler: Scheduler, optimizer: torch.optim.Optimizer) -> None:
        self._scheduler, self._optimizer = scheduler, optimizer

    def learning_rate(self, step: Integers) -> Floats:
        """The present rate, float64[1]."""
        return np.array([self._optimizer.param_groups[0]["lr"]], np.float64)

    def observe(self, loss: float) -> None:
        """Takes in a validation loss; one that is not finite counts as no improvement."""
        self._scheduler.step(loss)


def plateau_rates(given: float) -> FeedbackRates:
    """torch's `ReduceLROnPlateau`: halved where the best validation loss is three evaluations old.

    Its defaults (a tenth after eleven evaluations) were made for epochs; a job takes about forty evaluations, and with
    them the rate would hardly ever move. Everything else is default: threshold 1e-4, relative.
    """
    optimizer = _holder(given)
    return FeedbackRates(ReduceLROnPlateau(optimizer, factor=PLATEAU_FACTOR, patience=PLATEAU_PATIENCE), optimizer)


def greedy_rates(given: float) -> FeedbackRates:
    """transformers' `GreedyLR` as it comes: x 0.95 after 11 worse evaluations, / 0.95 after 11 better ones.

    Its bounds are 1e-3 and 1, so that a rate below 1e-3 is never lowered.

    Balasubramanian et al. 2025, https://arxiv.org/abs/2512.14527
    """
    optimizer = _holder(given)
    return FeedbackRates(GreedyLR(optimizer), optimizer)


def greedy_bounded_rates(given: float) -> FeedbackRates:
    """`GreedyLR` that can move within a job: x or / 0.7 after two evaluations, within a factor of 30 of the given rate.

    So it can cross the whole range in the forty evaluations of a job. `eps`, the least change that it carries out, is
    far below every rate here.
    """
    optimizer = _holder(given)
    scheduler = GreedyLR(
        optimizer,
        factor=GREEDY_FACTOR,
        patience=GREEDY_PATIENCE,
        min_lr=given / GREEDY_RANGE,
        max_lr=given * GREEDY_RANGE,
        eps=1e-12,
    )
    return FeedbackRates(scheduler, optimizer)


def _holder(rate: float) -> torch.optim.Optimizer:
    parameter: Tensor = torch.zeros(1, requires_grad=True)
    return torch.optim.SGD([parameter], lr=rate)
