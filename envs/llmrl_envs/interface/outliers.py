"""Batches that stand out: a step whose loss is far above those before, and far above the first ones, is not taken.

Broken text or labels that belong elsewhere pull weights as far as any other batch, towards nothing that helps. Their
loss tells, before the step is taken. Two things have to come together, since either happens to sound jobs as well: a
loss far above its running mean, in units of its noise (so is that of a hard example late in a job, and of a classifier
that begins to tell classes apart), and one half as large again as those that the job began with. The noise is read off
from step to step (half the mean squared successive difference, von Neumann's estimator), which a falling loss does not
disturb.

Skipping batches at which the loss spikes is an old habit of those who train large models (Chowdhery et al. 2022,
https://arxiv.org/abs/2204.02311, section 5.1). What it is worth: docs/log.md, "Steps at which the loss stands out".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

MULTIPLE = 10.0
"""Standard deviations of the noise above the running mean."""
RATIO = 1.5
"""Times the mean of the first losses; jobs that begin at zero or below, as reinforcement learning may, go unjudged."""
MEMORY = 20
"""Steps that mean and noise remember, exponentially."""
FIRST_STEPS = 3
"""Steps whose mean loss is what a job began with."""
LEAST_STEPS = 5
"""Steps before any is judged."""
MOST_IN_A_ROW = 5
"""After so many the job is elsewhere, and its steps are taken again."""


class OutlierSteps:
    """Judges the losses of R jobs, step by step, on their device and without waiting for it.

    Args:
        num_rows: R.
        device: Where the losses are.

    Attributes:
        state: float32[R, 6], in the order of `NAMES`: of the losses of steps taken the mean, the variance of the noise,
            their number, the mean of the first and the last one; and the steps skipped in a row just now.
    """

    NAMES = ("mean", "variance", "count", "first", "last", "skipped")

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.state = torch.zeros(num_rows, len(self.NAMES), device=device)

    def forget(self, rows: int | slice | Sequence[int]) -> None:
        """New jobs in these rows."""
        self.state[rows] = 0.0

    def values(self) -> dict[str, float]:
        """The state of the one job that there is, by name."""
        (values,) = self.state.tolist()
        return {f"outliers.{name}": value for name, value in zip(self.NAMES, values, strict=True)}

    def load_values(self, values: Mapping[str, float]) -> None:
        """Restores what `values` gave; those of earlier versions know nothing of a job's losses."""
        found = [values.get(f"outliers.{name}", 0.0) for name in self.NAMES]
        self.state[0] = torch.tensor(found, device=self.state.device)

    @torch.no_grad()
    def judge(self, losses: Tensor, rows: slice = slice(None)) -> Tensor:
        """Takes in the losses of a step and tells which stand out, bool[M]; one that is not finite does not.

        Args:
            losses: float32[M], mean loss of the step.
            rows: The M rows that they belong to.
        """
        state = self.state[rows]
        mean, variance, count, first, last, skipped = state.unbind(dim=1)
        losses = losses.detach().to(state)
        finite = torch.isfinite(losses)
        far = losses > mean + MULTIPLE * variance.sqrt()
        judged = (count >= LEAST_STEPS) & (skipped < MOST_IN_A_ROW)
        outlying = finite & judged & far & (first > 0.0) & (losses > RATIO * first)
        taken = finite & ~outlying
        start = torch.where(count < FIRST_STEPS, first + (losses - first) / (count + 1.0), first)
        mean_weight, noise_weight = (
            torch.clamp(1.0 / n, min=1.0 / MEMORY) for n in (count + 1.0, count.clamp(min=1.0))
        )
        noise = torch.where(count > 0.0, 0.5 * (losses - last).square() - variance, 0.0)
        moved = (mean + mean_weight * (losses - mean), variance + noise_weight * noise, count + 1.0, start, losses)
        in_a_row = torch.where(outlying, skipped + 1.0, torch.where(finite, 0.0, skipped))
        columns = torch.where(taken[:, None], torch.stack(moved, dim=1), state[:, :-1])
        self.state[rows] = torch.cat([columns, in_a_row[:, None]], dim=1)
        return outlying
