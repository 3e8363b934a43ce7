"""Measures a running job: per-step losses and gradient norms, and the optimizer's update once per interval.

Everything stays on the job's device until `collect`, which copies one small tensor to the host: between decisions
nothing waits for the device. Costly measurements (one pass over gradients and moments) are taken on the interval's
last step only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from llmrl_envs.interface.outliers import OutlierSteps
from llmrl_envs.interface.statistics import TrainingStatistics, TuningMode
from llmrl_envs.interface.tensor_sums import dot_products, full_tensor, local_shard, square_sum
from llmrl_envs.interface.updates import (
    DifferenceUpdates,
    LowRankPair,
    MomentUpdates,
    UpdateMeasure,
    UpdateSource,
    level_parameters,
    pair_update_square,
    signal_to_noise,
)

__all__ = ["LowRankPair", "StatisticsRecorder"]

_NUM_PROBES = 4
_EPSILON = 1e-30
_LOSS, _NORM, _SKIPPED = range(3)
"""What is noted of a step; the last is zero where it was taken, else NaN (1 in checkpoints of earlier versions)."""


class StatisticsRecorder:
    """Records the optimizer steps of one job.

    Call, for each step and in this order: `before_update` (gradients ready, moments of the step before),
    `record_step`, and after the optimizer has stepped `after_update`. The first and the last do their work only where
    `probe` is true.

    Args:
        optimizer: AdamW, or any optimizer that keeps `exp_avg` and `exp_avg_sq`; others need `source="difference"`.
        device: Where losses and parameters live.
        mode: What the job trains.
        trainable_fraction: Trained parameters over all parameters.
        capacity_steps: Longest interval.
        pairs: LoRA adapters whose effective weight change is measured; empty for plain parameters.
        multipliers: Factor of each parameter group's rate on the common one; None: all one.
        source: Where the update is read: from Adam's moments, or from the change of the weights.
        sum_shards: Sums a tensor over the processes that hold shards of the parameters; None: nothing is sharded.
        flat_vectors: Vectors, whole on every process, that the optimizer holds within flat partitions (DeepSpeed).
            Their norm is taken off, and of the update's square as much as they have of the numbers.
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
        multipliers: Sequence[float] | None = None,
        source: UpdateSource = "moments",
        sum_shards: Callable[[Tensor], Tensor] | None = None,
        flat_vectors: Sequence[Parameter] = (),
    ) -> None:
        self._optimizer = optimizer
        self._multipliers = tuple(multipliers) if multipliers is not None else (1.0,) * len(optimizer.param_groups)
        self._mode = mode
        self._trainable_fraction = trainable_fraction
        self._pairs = tuple(pairs)
        self._paired = {id(part) for pair in pairs for part in (pair.a, pair.b)}
        self._factors = {
            id(p): factor
            for group, factor in zip(optimizer.param_groups, self._multipliers, strict=True)
            for p in group["params"]
        }
        self._source = source
        self._sum_shards = sum_shards
        self._flat_vectors = tuple(flat_vectors)
        self._differences: DifferenceUpdates | None = None
        self.outliers = OutlierSteps(1, device)
        self._steps = torch.zeros(capacity_steps, 3, device=device)
        self._probes = torch.full((_NUM_PROBES,), float("nan"), device=device)
        self._learning_rates: list[float] = []
        self._limits: list[float] = []

    @torch.no_grad()
    def before_update(self, active: Iterable[Parameter], *, probe: bool, learning_rate: float = 0.0) -> None:
        """Measures the gradient against the momentum of the step before.

        Args:
            active: Parameters that the step changes.
            probe: Whether this step is measured.
            learning_rate: The step's common rate; needed where the update is the change of the weights.
        """
        if not probe:
            return
        active = list(active)
        if self._source == "difference":
            self._differences = DifferenceUpdates(active, learning_rate)
        averages = [self._optimizer.state[parameter].get("exp_avg") for parameter in active]
        pairs = [(p.grad, m) for p, m in zip(active, averages, strict=True) if p.grad is not None and m is not None]
        if pairs:
            sums = self._summed(dot_products(pairs))
            dot, gradient_square, momentum_square = sums.unbind()
            self._probes[0] = dot / ((gradient_square * momentum_square).sqrt() + _EPSILON)

    def record_step(
        self,
        loss: Tensor,
        gradient_norm: Tensor | None,
        *,
        learning_rate: float,
        max_gradient_norm: float,
        skip_outliers: bool = False,
    ) -> Tensor | bool:
        """Notes one step, and returns whether it may be taken: all of it is finite; on a device a scalar there.

        Args:
            loss: Mean loss of the step, a scalar on the device.
            gradient_norm: Global norm before clipping, a scalar on the device; None where the host does not tell.
            learning_rate: The step's common rate.
            max_gradient_norm: Norm that gradients are clipped to.
            skip_outliers: A loss must not stand out, either; see `OutlierSteps`.
        """
        position = len(self._learning_rates)
        if position >= self._steps.shape[0]:
            raise ValueError(f"interval: expected at most {self._steps.shape[0]} steps, got one more")
        self._learning_rates.append(learning_rate)
        self._limits.append(max_gradient_norm)
        outlying = self.outliers.judge(loss.reshape(1)).squeeze() if skip_outliers else None
        if self._steps.is_cpu:
            norm = None if gradient_norm is None else float(gradient_norm)
            return self._note_on_cpu(position, float(loss), norm, outlying)
        return self._note_on_device(position, loss, gradient_norm, outlying)

    def _note_on_cpu(
        self, position: int, loss: float, gradient_norm: float | None, outlying: Tensor | None = None
    ) -> bool:
        """In numbers, where nothing has to be waited for."""
        finite = math.isfinite(loss) and (gradient_norm is None or math.isfinite(gradient_norm))
        allowed = finite and not (outlying is not None and bool(outlying))
        norm = math.nan if gradient_norm is None else gradient_norm
        self._steps.numpy()[position] = loss, norm, 0.0 if allowed else math.nan
        return allowed

    def _note_on_device(
        self, position: int, loss: Tensor, gradient_norm: Tensor | None, outlying: Tensor | None = None
    ) -> Tensor:
        """The same, without waiting."""
        told = [loss.detach()] if gradient_norm is None else [loss.detach(), gradient_norm.detach()]
        values = torch.stack(told)
        defect = (values * 0.0).sum()  # zero, or NaN where one is not finite
        row = self._steps[position]
        row[: len(told)] = values
        if gradient_norm is None:
            row[_NORM] = float("nan")
        if outlying is not None:
            defect = torch.where(outlying, float("nan"), defect)
        row[_SKIPPED] = defect
        return defect == 0.0

    def after_update(self, active: Iterable[Parameter], *, probe: bool) -> None:
        """Measures the optimizer's update at learning rate one, and the weights."""
        if not probe:
            return
        moments = MomentUpdates(self._optimizer, self._multipliers)
        measured = self._measure(list(active), self._differences or moments)
        self._differences = None
        if measured is not None:
            self._probes[1:] = measured

    @torch.no_grad()
    def _measure(self, active: Sequence[Parameter], measure: UpdateMeasure) -> Tensor | None:
        """||u|| and ||theta|| of `level_parameters` and the signal-to-noise ratio, [3]; None: nothing is active."""
        held = {id(p) for p in active}
        plain = [p for p in active if id(p) not in self._paired]
        pairs = [pair for pair in self._pairs if id(pair.a) in held or id(pair.b) in held]
        if not plain and not pairs:
            return None
        sized = self._sized(plain)
        counted = {id(p) for p in sized}
        others = [p for p in plain if id(p) not in counted]
        squares = torch.zeros(2, device=self._probes.device)
        if sized:
            squares = torch.stack([measure.square(sized), square_sum(sized)])
        if others:  # they count in the moments' sums
            measure.square(others)
        update, weight = self._without_vectors(self._summed(squares), sized).unbind()
        update = update + sum(pair_update_square(pair, measure) for pair in pairs)
        weight = weight + sum(pair.weight_norm**2 for pair in pairs)
        moments = self._summed(measure.moment_sums().to(self._probes.device))
        return torch.stack([update.sqrt(), weight.sqrt(), signal_to_noise(moments)])

    def _sized(self, plain: Sequence[Parameter]) -> list[Parameter]:
        """Those that a level refers to, of those that have a rate."""
        moved = [p for p in plain if self._factors.get(id(p), 1.0)]
        return level_parameters(moved, has_pairs=bool(self._pairs))

    def _without_vectors(self, squares: Tensor, flat: Sequence[Parameter]) -> Tensor:
        """Squares of update and weight, [2], less those of vectors that flat partitions hold."""
        if not self._flat_vectors:
            return squares
        held = self._summed(torch.tensor(float(sum(p.numel() for p in flat)), device=squares.device))
        share = 1.0 - sum(p.numel() for p in self._flat_vectors) / held
        vectors = square_sum(self._flat_vectors)
        return torch.stack([squares[0] * share, (squares[1] - vectors).clamp(min=0.0)])

    def _summed(self, tensor: Tensor) -> Tensor:
        return tensor if self._sum_shards is None else self._sum_shards(tensor)

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
        steps, probes = host[: 3 * count].reshape(count, 3), host[3 * count :]
        loss, norm = steps[:, _LOSS].copy(), steps[:, _NORM].copy()
        finite = (steps[:, _SKIPPED] == 0.0) & np.isfinite(loss)
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
            clipped=(finite & np.isfinite(norm) & (norm > limits))[None],
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
        plain = self._sized([p for p in active if id(p) not in self._paired])
        factors = self._factors
        update = sum(local_shard(p).numel() * factors[id(p)] ** 2 for p in plain)
        weight = sum(float(local_shard(p).detach().double().square().sum()) for p in plain)
        sums = torch.tensor([update, weight], dtype=torch.float64)
        sums = sums if self._sum_shards is None else self._summed(sums.float().to(self._probes.device))
        update, weight = self._without_vectors(sums, plain).tolist()
        for pair in self._pairs:
            a = full_tensor(pair.a.detach()).double()
            update += (pair.scaling * factors[id(pair.b)]) ** 2 * len(pair.b) * float(a.square().sum())
            weight += pair.weight_norm**2
        return update**0.5, weight**0.5

    def present_norms(self, active: Sequence[Parameter]) -> tuple[float, float]:
        """||u|| and ||theta|| of a job whose optimizer has moments from earlier steps; NaN where it has none."""
        measured = self._measure(active, MomentUpdates(self._optimizer, self._multipliers))
        if measured is None:
            return float("nan"), float("nan")
        update, weight = measured[:2].tolist()
        return float(update), float(weight)

    def resize(self, capacity_steps: int) -> None:
        """Makes room for intervals of another length, between two intervals."""
        self._steps = torch.zeros(capacity_steps, 3, device=self._steps.device)

    def state_dict(self) -> dict[str, Any]:
        """The steps of the interval so far and the running loss; a probe is used within its step and not kept."""
        count = len(self._learning_rates)
        return {
            "steps": self._steps[:count].cpu().clone(),
            "learning_rates": torch.tensor(self._learning_rates, dtype=torch.float64),
            "limits": torch.tensor(self._limits, dtype=torch.float64),
            "outliers": self.outliers.state.cpu().clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        steps = state["steps"]
        self._steps[: len(steps)] = steps.to(self._steps.device)
        self._learning_rates = state["learning_rates"].tolist()
        self._limits = state["limits"].tolist()
        if "outliers" in state:  # not in those of earlier versions
            self.outliers.state.copy_(state["outliers"])
        self._probes.fill_(float("nan"))
