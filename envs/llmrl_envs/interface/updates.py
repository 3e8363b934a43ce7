"""The optimizer's update at learning rate one, tensor by tensor: from Adam's moments, or from how the weights moved.

Tensors may be shards (DTensors of FSDP2): elementwise results stay shards, and only sums travel between processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor
from torch.nn import Parameter

UpdateSource = Literal["moments", "difference"]
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


class UpdateMeasure(Protocol):
    """Measures one optimizer step."""

    def update(self, parameter: Parameter) -> Tensor:
        """The update of a parameter at learning rate one, of its shape; NaN where it is not known."""

    def moment_sums(self) -> Tensor:
        """Sums over what `update` has been asked for: squared means, variances; NaN where not known. Shape [2]."""


class MomentUpdates:
    """Adam's update at learning rate one, `m_hat / (sqrt(v_hat) + eps)`, without weight decay.

    Args:
        optimizer: Keeps `exp_avg` and `exp_avg_sq`; with others the update is unknown.
        multipliers: Factor of each parameter group's rate on the common one.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, multipliers: Sequence[float]) -> None:
        self._optimizer = optimizer
        self._groups: dict[int, tuple[Mapping[str, Any], float]] = {
            id(p): (group, multiplier)
            for group, multiplier in zip(optimizer.param_groups, multipliers, strict=True)
            for p in group["params"]
        }
        self._mean_squares: list[Tensor] = []
        self._variances: list[Tensor] = []

    def update(self, parameter: Parameter) -> Tensor:
        """The update, of the parameter's shape."""
        state, (group, multiplier) = self._optimizer.state[parameter], self._groups[id(parameter)]
        if "exp_avg" not in state or "exp_avg_sq" not in state:
            return torch.full_like(parameter, float("nan"))
        beta1, beta2 = group["betas"]
        step = _step_count(state["step"])
        correction1, correction2 = 1.0 - beta1**step, 1.0 - beta2**step
        if isinstance(correction2, float) and correction2 == 0.0:  # every step so far was skipped
            return torch.full_like(parameter, float("nan"))
        mean, variance = _wide(state["exp_avg"]), _wide(state["exp_avg_sq"])
        flat = local_shard(mean).reshape(-1)
        self._mean_squares.append(torch.dot(flat, flat) / correction1**2)
        self._variances.append(local_shard(variance).sum() / correction2)
        denominator = variance.sqrt().mul_(correction2**-0.5).add_(group["eps"])
        update = torch.div(mean, denominator.mul_(correction1))
        return update if multiplier == 1.0 else update.mul_(multiplier)

    def moment_sums(self) -> Tensor:
        """Sums of the bias-corrected squared means and of the variances, [2]."""
        if not self._variances:
            return torch.full((2,), float("nan"))
        return torch.stack([torch.stack(self._mean_squares).sum(), torch.stack(self._variances).sum()]).float()


class DifferenceUpdates:
    """The update as the change of the weights over the learning rate, for optimizers without Adam's moments.

    Weight decay is part of it. A copy of the weights lives from `before_update` to `after_update` of one step.

    Args:
        parameters: Those that the step may change.
        learning_rate: The step's common rate.
    """

    def __init__(self, parameters: Iterable[Parameter], learning_rate: float) -> None:
        self._before = {id(p): p.detach().clone() for p in parameters}
        self._learning_rate = learning_rate

    def update(self, parameter: Parameter) -> Tensor:
        """The update, of the parameter's shape."""
        if self._learning_rate <= 0.0:
            return torch.full_like(parameter, float("nan"))
        return (_wide(self._before[id(parameter)]) - _wide(parameter.detach())).div_(self._learning_rate)

    def moment_sums(self) -> Tensor:
        """Not known, [2]."""
        return torch.full((2,), float("nan"))


def local_shard(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor; any other tensor as it is."""
    return cast(Tensor, tensor.to_local()) if hasattr(tensor, "to_local") else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a DTensor, the same on every process; any other tensor as it is."""
    return cast(Tensor, tensor.full_tensor()) if hasattr(tensor, "full_tensor") else tensor


def square_sum(tensor: Tensor) -> Tensor:
    """Sum of squares of this process's part, a scalar."""
    flat = _wide(local_shard(tensor.detach()).reshape(-1))
    return torch.dot(flat, flat)


def _wide(tensor: Tensor) -> Tensor:
    """Half-precision numbers as float32, in which their squares can be added up; others as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def pair_update_square(pair: LowRankPair, measure: UpdateMeasure) -> Tensor:
    """Squared Frobenius norm of the first-order change `scaling * (u_b @ a + b @ u_a)`, by 2r x 2r products."""
    update_a, update_b = full_tensor(measure.update(pair.a)), full_tensor(measure.update(pair.b))
    a, b = full_tensor(pair.a.detach()), full_tensor(pair.b.detach())
    left = torch.cat([update_b, b.to(update_b.dtype)], dim=1)  # [out, 2r]
    right = torch.cat([a.to(update_a.dtype), update_a], dim=0)  # [2r, in]
    square = ((left.T @ left) * (right @ right.T)).sum()
    return pair.scaling**2 * square.clamp(min=0.0)


def _step_count(step: Tensor | float) -> Tensor | float:
    """Adam's count of steps: a number where reading it waits for nothing, else the tensor on its device."""
    if isinstance(step, Tensor):
        return float(step) if step.device.type == "cpu" else step.float()
    return float(step)


def signal_to_noise(moment_sums: Tensor) -> Tensor:
    """||m_hat|| / sqrt(sum of v_hat), in [0, 1] up to the moments' different memories; from `moment_sums`."""
    return (moment_sums[0] / (moment_sums[1] + _EPSILON)).sqrt()
