"""Measures a running job: per-step losses and gradient norms, and the optimizer's update once per interval.

Everything stays on the job's device until `collect`, which copies one small tensor to the host: between decisions
nothing waits for the device. Costly measurements (one pass over gradients and moments) are taken on the interval's
last step only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from llmrl_envs.interface.statistics import TrainingStatistics, TuningMode

_NUM_PROBES = 4
_EPSILON = 1e-30


@dataclass(frozen=True)
class LowRankPair:
    """One LoRA adapter: the weight changes by `scaling * b @ a`.

    Attributes:
        a: [r, in].
        b: [out, r].
        scaling: alpha / r.
        weight_norm: Norm of the weight that the adapter adapts.
    """

    a: Parameter
    b: Parameter
    scaling: float
    weight_norm: float


class StatisticsRecorder:
    """Records the optimizer steps of one job.

    Call, for each step and in this order: `before_update` (gradients ready, moments of the step before),
    `record_step`, and after the optimizer has stepped `after_update`. The first and the last do their work only where
    `probe` is true.

    Args:
        optimizer: AdamW, or any optimizer that keeps `exp_avg` and `exp_avg_sq`; with others the update is unknown.
        device: Where losses and parameters live.
        mode: What the job trains.
        trainable_fraction: Trained parameters over all parameters.
        capacity_steps: Longest interval.
        pairs: LoRA adapters whose effective weight change is measured; empty for plain parameters.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        device: torch.device,
        mode: TuningMode,
        trainable_fraction: float,
        capacity_steps: int,
        pairs: Sequence[LowRankPair] = (),
    ) -> None:
        self._optimizer = optimizer
        self._groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        self._mode = mode
        self._trainable_fraction = trainable_fraction
        self._pairs = tuple(pairs)
        self._paired = {id(part) for pair in pairs for part in (pair.a, pair.b)}
        self._steps = torch.zeros(capacity_steps, 2, device=device)
        self._probes = torch.full((_NUM_PROBES,), float("nan"), device=device)
        self._learning_rates: list[float] = []
        self._limits: list[float] = []

    def before_update(self, active: Iterable[Parameter], *, probe: bool) -> None:
        """Measures the gradient against the momentum of the step before."""
        if not probe:
            return
        with torch.no_grad():
            dot, gradient, momentum = [], [], []
            for parameter in active:
                average = self._optimizer.state[parameter].get("exp_avg")
                if parameter.grad is None or average is None:
                    continue
                flat, mean = parameter.grad.detach().reshape(-1), average.reshape(-1)
                dot.append(torch.dot(flat, mean))
                gradient.append(torch.dot(flat, flat))
                momentum.append(torch.dot(mean, mean))
            if dot:
                product = (torch.stack(gradient).sum() * torch.stack(momentum).sum()).sqrt()
                self._probes[0] = torch.stack(dot).sum() / (product + _EPSILON)

    def record_step(
        self, loss: Tensor, gradient_norm: Tensor, *, learning_rate: float, max_gradient_norm: float
    ) -> None:
        """Notes one step's mean loss and its gradient norm before clipping, both scalars on the device."""
        position = len(self._learning_rates)
        if position >= len(self._steps):
            raise ValueError(f"interval: expected at most {len(self._steps)} steps, got one more")
        self._steps[position, 0] = loss.detach()
        self._steps[position, 1] = gradient_norm.detach()
        self._learning_rates.append(learning_rate)
        self._limits.append(max_gradient_norm)

    def after_update(self, active: Iterable[Parameter], *, probe: bool) -> None:
        """Measures the optimizer's update at learning rate one, and the weights."""
        if not probe:
            return
        with torch.no_grad():
            plain = [p for p in active if p.grad is not None and id(p) not in self._paired]
            pairs = [pair for pair in self._pairs if pair.a.grad is not None or pair.b.grad is not None]
            moments = _MomentNorms(self._optimizer, self._groups)
            updates = [moments.update_norm_square(p) for p in plain]
            updates += [_pair_update_square(pair, moments) for pair in pairs]
            if not updates:
                return
            weights = [torch.dot(p.detach().reshape(-1), p.detach().reshape(-1)) for p in plain]
            weight_square = torch.stack(weights).sum() if weights else torch.zeros((), device=self._probes.device)
            adapted_square = sum(pair.weight_norm**2 for pair in pairs)
            self._probes[1] = torch.stack(updates).sum().sqrt()
            self._probes[2] = (weight_square + adapted_square).sqrt()
            self._probes[3] = moments.signal_to_noise()

    def collect(
        self,
        *,
        step: int,
        total_steps: int,
        reduce: Callable[[Tensor], Tensor] | None = None,
        validation_loss: float = float("nan"),
    ) -> TrainingStatistics:
        """The interval's statistics (E = 1); the recorder is then ready for the next interval.

        Args:
            step: Optimizer steps done.
            total_steps: The job's budget.
            reduce: Averages a tensor over the processes of the job.
            validation_loss: Nats per target, where it was measured anyway.
        """
        count = len(self._learning_rates)
        packed = torch.cat([self._steps[:count].reshape(-1), self._probes])
        host = (packed if reduce is None else reduce(packed)).double().cpu().numpy()
        steps, probes = host[: 2 * count].reshape(count, 2), host[2 * count :]
        loss, norm = steps[:, 0].copy(), steps[:, 1].copy()
        finite = np.isfinite(loss) & np.isfinite(norm)
        limits = np.array(self._limits)
        rates = np.array(self._learning_rates)
        cosine, update_norm, weight_norm, signal = (float(value) for value in probes[:4])
        step_size = float(rates.mean()) * update_norm / weight_norm if count and weight_norm > 0 else float("nan")
        self._learning_rates, self._limits = [], []
        self._probes.fill_(float("nan"))
        return TrainingStatistics(
            step=np.array([step], np.int64),
            total_steps=np.array([total_steps], np.int64),
            num_steps=np.array([count], np.int64),
            loss=np.where(finite, loss, np.nan)[None],
            gradient_norm=np.where(finite, norm, np.nan)[None],
            clipped=(finite & (norm > limits))[None],
            skipped=(~finite)[None],
            update_norm=np.array([update_norm]),
            weight_norm=np.array([weight_norm]),
            step_size=np.array([step_size]),
            momentum_cosine=np.array([cosine]),
            signal_to_noise=np.array([signal]),
            validation_loss=np.array([validation_loss]),
            mode=np.array([int(self._mode)], np.int64),
            trainable_fraction=np.array([self._trainable_fraction]),
        )

    def initial_norms(self, active: Sequence[Parameter]) -> tuple[float, float]:
        """||u|| and ||theta|| before the first step, where Adam's update is +-1 in every coordinate.

        An upper bound of the update for plain parameters (coordinates without gradient do not move), so the first
        rates err on the low side. For LoRA, b is zero at first and u_b @ a is the whole change, here with independent
        signs.
        """
        plain = [p for p in active if id(p) not in self._paired]
        update = float(sum(p.numel() for p in plain))
        weight = float(sum(float(p.detach().double().square().sum()) for p in plain))
        for pair in self._pairs:
            update += pair.scaling**2 * len(pair.b) * float(pair.a.detach().double().square().sum())
            weight += pair.weight_norm**2
        return update**0.5, weight**0.5


class _MomentNorms:
    """Adam's bias-corrected moments of several parameters, summed up."""

    def __init__(self, optimizer: torch.optim.Optimizer, groups: Mapping[int, Mapping[str, Any]]) -> None:
        self._optimizer = optimizer
        self._groups = groups
        self._mean_squares: list[Tensor] = []
        self._variances: list[Tensor] = []

    def update(self, parameter: Parameter) -> Tensor:
        """Adam's update at learning rate one, `m_hat / (sqrt(v_hat) + eps)`, without weight decay."""
        state, group = self._optimizer.state[parameter], self._groups[id(parameter)]
        if "exp_avg" not in state or "exp_avg_sq" not in state:
            return torch.full_like(parameter, float("nan"))
        beta1, beta2 = group["betas"]
        step = _step_count(state["step"])
        correction1, correction2 = 1.0 - beta1**step, 1.0 - beta2**step
        if isinstance(correction2, float) and correction2 == 0.0:  # every step so far was skipped
            return torch.full_like(parameter, float("nan"))
        mean, variance = state["exp_avg"], state["exp_avg_sq"]
        flat = mean.reshape(-1)
        self._mean_squares.append(torch.dot(flat, flat) / correction1**2)
        self._variances.append(variance.sum() / correction2)
        denominator = variance.sqrt().mul_(correction2**-0.5).add_(group["eps"])
        return torch.div(mean, denominator.mul_(correction1))

    def update_norm_square(self, parameter: Parameter) -> Tensor:
        """Squared norm of `update`."""
        flat = self.update(parameter).reshape(-1)
        return torch.dot(flat, flat)

    def signal_to_noise(self) -> Tensor:
        """||m_hat|| / sqrt(sum of v_hat), in [0, 1] up to the moments' different memories."""
        if not self._variances:
            return torch.tensor(float("nan"))
        return (torch.stack(self._mean_squares).sum() / (torch.stack(self._variances).sum() + _EPSILON)).sqrt()


def _step_count(step: Tensor | float) -> Tensor | float:
    """Adam's count of steps: a number where reading it waits for nothing, else the tensor on its device."""
    if isinstance(step, Tensor):
        return float(step) if step.device.type == "cpu" else step.float()
    return float(step)


def _pair_update_square(pair: LowRankPair, moments: _MomentNorms) -> Tensor:
    """Squared Frobenius norm of the first-order change `scaling * (u_b @ a + b @ u_a)`, by 2r x 2r products."""
    left = torch.cat([moments.update(pair.b), pair.b.detach()], dim=1)  # [out, 2r]
    right = torch.cat([pair.a.detach(), moments.update(pair.a)], dim=0)  # [2r, in]
    square = ((left.T @ left) * (right @ right.T)).sum()
    return pair.scaling**2 * square.clamp(min=0.0)
