"""Gradient clipping by z-score."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from llmrl_envs.jobs.task import FineTuningTask
from torch import Tensor
from torch.nn import Parameter

DECAY, THRESHOLD, WARMUP_STEPS, WARMUP_SHARE = 0.97, 2.5, 25, 0.1
_EPSILON = 1e-6


class ZClip:
    """Clips a gradient whose norm is an outlier among the norms before it.

    With mean m and standard deviation s of the norms, exponentially averaged, a norm g of z = (g - m) / s above the
    threshold c is scaled down to

        m + c * s / (z / c)

    and the averages take in what it was scaled to. The averages start from the norms of the first steps. The job's own
    limit holds as well, in those first steps alone.

    Kumar et al. 2025, https://arxiv.org/abs/2504.02507, with their settings: decay 0.97, c = 2.5.

    Args:
        warmup_steps: Steps whose norms start the averages.
        decay: Of the averages, per step.
        threshold: c.

    Attributes:
        mean: m; NaN before the averages start.
        variance: s squared.
    """

    def __init__(self, warmup_steps: int, *, decay: float = DECAY, threshold: float = THRESHOLD) -> None:
        self._warmup_steps, self._decay, self._threshold = warmup_steps, decay, threshold
        self._first: list[float] = []
        self.mean = self.variance = math.nan

    def __call__(self, parameters: Sequence[Parameter], limit: float) -> Tensor:
        """Scales the gradients in place and returns their global norm before; see `GradientClipper`."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        allowed = min(limit, self.limit_of(float(norm)))
        torch.nn.utils.clip_grads_with_norm_(parameters, allowed, norm, foreach=True)
        return norm

    def limit_of(self, norm: float) -> float:
        """What a norm is scaled down to; infinity where it is no outlier. Takes the norm into the averages."""
        if not math.isfinite(norm):  # the step is skipped
            return math.inf
        if math.isnan(self.mean):
            self._start(norm)
            return math.inf
        deviation = math.sqrt(self.variance)
        z_score = (norm - self.mean) / (deviation + _EPSILON)
        outlier = z_score > self._threshold
        allowed = self.mean + self._threshold * deviation / (z_score / self._threshold) if outlier else math.inf
        self._average(min(norm, allowed))
        return allowed

    def _start(self, norm: float) -> None:
        self._first.append(norm)
        if len(self._first) >= self._warmup_steps:
            self.mean = sum(self._first) / len(self._first)
            self.variance = sum((value - self.mean) ** 2 for value in self._first) / len(self._first)

    def _average(self, norm: float) -> None:
        self.mean = self._decay * self.mean + (1.0 - self._decay) * norm
        self.variance = self._decay * self.variance + (1.0 - self._decay) * (norm - self.mean) ** 2


def zclip_for(task: FineTuningTask) -> ZClip:
    """With the averages started by 25 steps, as published, but by a tenth of the budget at most."""
    return ZClip(min(WARMUP_STEPS, max(2, round(WARMUP_SHARE * task.steps))))
