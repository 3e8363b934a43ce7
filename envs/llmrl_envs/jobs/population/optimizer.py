"""AdamW for P jobs at once: every job its own rate, decay, clipping, skipped steps and step count.

The jobs' weights, gradients and moments are rows of float32[P, N]. On a CPU each row goes through torch's fused kernel,
one pass over memory; elsewhere all rows go through a dozen kernels whatever P is. Nothing waits for the device.

Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmrl_envs.interface.momentum import Corrections, lean
from llmrl_envs.jobs.population.columns import ColumnLayout
from llmrl_envs.jobs.population.stack import grown
from llmrl_envs.jobs.task import OptimizerSettings

_CLIP_EPSILON = 1e-6
"""As in `torch.nn.utils.clip_grad_norm_`."""


@dataclass(frozen=True)
class RowStep:
    """One optimizer step of the rows start .. stop, M of them.

    Attributes:
        start: First row.
        stop: End.
        rates: float64[M], learning rates; of a CPU population on the host.
        limits: float32[M], gradient norms above which a gradient is scaled down.
        norms: float32[M], the gradient norms; a row whose norm is not finite is not stepped.
        frozen: Rows, counted from `start`, whose lower half stays as it is, moments and step count included.
        momentum_shares: Share of the mean in each row's update, see `lean_on_gradient`; empty for plain Adam.
    """

    start: int
    stop: int
    rates: Tensor
    limits: Tensor
    norms: Tensor
    frozen: frozenset[int] = frozenset()
    momentum_shares: tuple[float, ...] = ()

    def leans(self) -> bool:
        """Whether some row's update is not plain Adam's."""
        return any(share != 1.0 for share in self.momentum_shares)


class PopulationAdamW:
    """Adam's moments of C jobs and the step that moves their weights.

    Args:
        layout: Columns of the parameters.
        device: Where the rows are.
        by_row: Step each row by torch's fused kernel; None does so on a CPU.

    Attributes:
        exp_avg: float32[C, N].
        exp_avg_sq: float32[C, N].
        steps: float32[C, 2], steps taken by the lower half and by the rest.
    """

    def __init__(self, layout: ColumnLayout, device: torch.device, *, by_row: bool | None = None) -> None:
        self.layout = layout
        self.exp_avg = torch.zeros(0, layout.num_columns, device=device)
        self.exp_avg_sq = torch.zeros(0, layout.num_columns, device=device)
        self.steps = torch.zeros(0, 2, device=device)
        # beta1, beta2, eps, weight_decay: on the host for the fused kernel, on the device for the others.
        self.settings = torch.zeros(0, 4, dtype=torch.float64)
        self._device_settings = self.settings.to(device)
        self._by_row = device.type == "cpu" if by_row is None else by_row

    def reserve(self, capacity: int) -> None:
        """Makes room for at least so many rows."""
        if capacity > len(self.steps):
            for name in ("exp_avg", "exp_avg_sq", "steps", "settings"):
                setattr(self, name, grown(getattr(self, name), capacity))
            self._copy_settings()

    def begin(self, row: int, settings: OptimizerSettings) -> None:
        """A job with fresh moments in `row`."""
        for tensor in (self.exp_avg, self.exp_avg_sq, self.steps):
            tensor[row] = 0.0
        values = [*settings.betas, settings.eps, settings.weight_decay]
        self.settings[row] = torch.tensor(values, dtype=torch.float64)
        self._copy_settings()

    def move(self, targets: Sequence[int], sources: Sequence[int]) -> None:
        """Copies the rows `sources` to `targets`."""
        for tensor in (self.exp_avg, self.exp_avg_sq, self.steps, self.settings):
            tensor[targets] = tensor[sources]
        self._copy_settings()

    def _copy_settings(self) -> None:
        self._device_settings = self.settings.to(self.steps.device)

    @torch.no_grad()
    def step(self, weights: Tensor, gradients: Tensor, step: RowStep) -> None:
        """Moves rows of `weights` along `gradients`, both float32[C, N]; the gradients are scaled on the way."""
        active = torch.isfinite(step.norms)
        clip = (step.limits / (step.norms + _CLIP_EPSILON)).clamp_(max=1.0)
        taken = self.steps[step.start : step.stop]
        moving = active[:, None].to(taken.dtype).expand(-1, 2)
        if step.frozen:
            moving = moving.clone()
            moving[sorted(step.frozen), 0] = 0.0
        taken += moving
        if self._by_row:
            self._step_rows(weights, gradients, step, active, clip)
        else:
            self._step_together(weights, gradients, step, moving, clip)

    def _step_rows(self, weights: Tensor, gradients: Tensor, step: RowStep, active: Tensor, clip: Tensor) -> None:
        rates, alive, scales = step.rates.tolist(), active.tolist(), (1.0 / clip).unbind()
        settings = self.settings[step.start : step.stop].tolist()
        for index, row in enumerate(range(step.start, step.stop)):
            if not alive[index]:
                continue
            beta1, beta2, eps, decay = settings[index]
            tensors = [rows[row] for rows in (weights, gradients, self.exp_avg, self.exp_avg_sq)]
            for parts, has_decay in self._parts(frozen=index in step.frozen, decay=decay > 0.0):
                values, slopes, means, squares = ([t[start:stop] for start, stop, _ in parts] for t in tensors)
                torch._fused_adamw_(
                    values,
                    slopes,
                    means,
                    squares,
                    [],
                    [self.steps[row, part] for _, _, part in parts],
                    lr=rates[index],
                    beta1=beta1,
                    beta2=beta2,
                    weight_decay=decay if has_decay else 0.0,
                    eps=eps,
                    amsgrad=False,
                    maximize=False,
                    grad_scale=scales[index],
                )
                if step.leans() and step.momentum_shares[index] != 1.0:
                    rate = rates[index] * (1.0 - step.momentum_shares[index])
                    for part, (_, _, place) in enumerate(parts):
                        count = float(self.steps[row, place])
                        corrections = Corrections(1.0 - beta1**count, 1.0 - beta2**count, eps)
                        lean(values[part], slopes[part], means[part], squares[part], corrections, rate)

    def _parts(self, *, frozen: bool, decay: bool) -> list[tuple[list[tuple[int, int, int]], bool]]:
        """Column ranges (start, stop, place of their step count) that share a decay, and whether they have it."""
        lower, end = self.layout.lower_stop, self.layout.num_columns
        first, last = self.layout.decayed
        if not decay:
            groups = [([(0, lower, 0), (lower, end, 1)], False)]
        else:
            groups = [([(first, lower, 0), (lower, last, 1)], True), ([(0, first, 0), (last, end, 1)], False)]
        kept = [([p for p in parts if p[1] > p[0] and not (frozen and p[2] == 0)], flag) for parts, flag in groups]
        return [(parts, flag) for parts, flag in kept if parts]

    def _step_together(self, weights: Tensor, gradients: Tensor, step: RowStep, moving: Tensor, clip: Tensor) -> None:
        rows, dtype = slice(step.start, step.stop), weights.dtype
        settings = self._device_settings[rows]
        counts = self.steps[rows].double()
        lower, end = self.layout.lower_stop, self.layout.num_columns
        for part, (start, stop) in enumerate(((0, lower), (lower, end))):
            if stop == start:
                continue
            columns = slice(start, stop)
            moves = moving[:, part : part + 1]
            beta1, beta2, eps, decay = (settings[:, index : index + 1] for index in range(4))
            rate = step.rates.to(counts.device)[:, None] * moves
            # A NaN times zero is NaN, so gradients of rows that are not stepped are replaced, not scaled.
            gradient = torch.where(moves > 0, gradients[rows, columns] * clip[:, None], 0.0)
            mean, square = self.exp_avg[rows, columns], self.exp_avg_sq[rows, columns]
            mean.lerp_(gradient, ((1.0 - beta1) * moves).to(dtype).expand_as(gradient))
            squared = gradient.square() if step.leans() else gradient.square_()
            square.lerp_(squared, ((1.0 - beta2) * moves).to(dtype).expand_as(gradient))
            count = counts[:, part : part + 1].clamp(min=1.0)
            correction1, correction2 = 1.0 - beta1**count, 1.0 - beta2**count
            weight = weights[rows, columns]
            first, last = max(self.layout.decayed[0], start), min(self.layout.decayed[1], stop)
            if last > first:
                weight[:, first - start : last - start] *= (1.0 - rate * decay).to(dtype)
            denominator = square.sqrt().mul_(correction2.rsqrt().to(dtype)).add_(eps.to(dtype))
            weight.sub_(torch.div(mean, denominator).mul_((rate / correction1).to(dtype)))
            if step.leans():
                own = rate * (1.0 - torch.tensor(step.momentum_shares, dtype=rate.dtype).to(rate.device)[:, None])
                weight.sub_((gradient - mean / correction1.to(dtype)).div_(denominator).mul_(own.to(dtype)))
