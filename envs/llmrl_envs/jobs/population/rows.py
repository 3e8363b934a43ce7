"""All that is kept of a population's jobs, one row of every array for each: weights, moments, averages, loss scales."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmrl_envs.interface.outliers import OutlierSteps
from llmrl_envs.jobs.population.loss_scale import LossScales
from llmrl_envs.jobs.population.optimizer import PopulationAdamW
from llmrl_envs.jobs.population.stack import WeightStack, grown
from llmrl_envs.jobs.task import OptimizerSettings


class PopulationRows:
    """Rows of C jobs.

    Args:
        stack: Weights and gradients.
        device: Where the jobs are.
        averaged: Keep an exponential average of the weights of every job.
        scaled: Losses are scaled (float16).

    Attributes:
        stack: As given.
        optimizer: Moments.
        scales: Loss scales.
        outliers: What is known of the jobs' losses.
        average: float32[C, N], the averaged weights; None where there are none.
        average_weight: float64[C], weight of a step in the average.
        touched: bool[C, 2], whether the optimizer has stepped the lower half and the rest.
    """

    def __init__(self, stack: WeightStack, device: torch.device, *, averaged: bool, scaled: bool) -> None:
        self.stack = stack
        self.optimizer = PopulationAdamW(stack.layout, device)
        self.scales = LossScales(device, enabled=scaled)
        self.outliers = OutlierSteps(0, device)
        self.average = torch.zeros(0, stack.layout.num_columns, device=device) if averaged else None
        self.average_weight: NDArray[np.float64] = np.zeros(0)
        self.touched: NDArray[np.bool_] = np.zeros((0, 2), np.bool_)

    def reserve(self, capacity: int) -> None:
        """Makes room for so many jobs."""
        for part in (self.stack, self.optimizer, self.scales):
            part.reserve(capacity)
        if capacity > len(self.outliers.state):
            self.outliers.state = grown(self.outliers.state, capacity)
        if self.average is not None and capacity > len(self.average):
            self.average = grown(self.average, capacity)
        missing = capacity - len(self.touched)
        if missing > 0:
            self.touched = np.concatenate([self.touched, np.zeros((missing, 2), np.bool_)])
            self.average_weight = np.concatenate([self.average_weight, np.zeros(missing)])

    @torch.no_grad()
    def begin(self, row: int, settings: OptimizerSettings, average_weight: float) -> None:
        """A job with the weights as loaded in `row`."""
        self.stack.weights[row] = self.stack.initial
        self.optimizer.begin(row, settings)
        self.scales.begin(row)
        self.outliers.forget(row)
        self.touched[row] = False
        self.average_weight[row] = average_weight
        if self.average is not None:
            self.average[row] = self.stack.initial

    @torch.no_grad()
    def move(self, targets: list[int], sources: list[int]) -> None:
        """Copies the rows `sources` to `targets`; gradients are zero between steps."""
        self.stack.weights[targets] = self.stack.weights[sources]
        self.optimizer.move(targets, sources)
        self.scales.move(targets, sources)
        self.outliers.state[targets] = self.outliers.state[sources]
        self.touched[targets] = self.touched[sources]
        self.average_weight[targets] = self.average_weight[sources]
        if self.average is not None:
            self.average[targets] = self.average[sources]

    @torch.no_grad()
    def average_in(self, start: int, stop: int) -> None:
        """Takes the present weights of rows into their averages."""
        if self.average is None:
            return
        weight = torch.from_numpy(self.average_weight[start:stop, None]).to(self.average)
        average, deployed = self.average[start:stop], self.stack.weights[start:stop]
        average.lerp_(deployed, weight.expand_as(average))

    @torch.no_grad()
    def shown(self, start: int, averaged: Sequence[bool]) -> Tensor:  # float32[C, N]
        """Weights to evaluate: of the rows from `start` on those that are `averaged`, of all others the deployed."""
        if self.average is None or not any(averaged):
            return self.stack.weights
        if all(averaged):
            return self.average
        weights = self.stack.weights.clone()
        chosen = [start + place for place, flag in enumerate(averaged) if flag]
        weights[chosen] = self.average[chosen]
        return weights

    def tensors(self) -> dict[str, Tensor]:
        """What a row's future depends on, by name, [C, ...] each; without `touched` and the tasks' own settings."""
        optimizer = self.optimizer
        found = {"weights": self.stack.weights, "exp_avg": optimizer.exp_avg, "exp_avg_sq": optimizer.exp_avg_sq}
        found |= {"steps": optimizer.steps, "loss_scale": self.scales.state, "outliers": self.outliers.state}
        return found if self.average is None else {**found, "average": self.average}
