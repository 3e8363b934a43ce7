"""The optimizer's update at learning rate one, tensor by tensor: from Adam's moments, or from how the weights moved.

Tensors may be shards (DTensors of FSDP2): elementwise results stay shards, and only sums travel between processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.nn import Parameter

UpdateSource = Literal["moments", "difference"]
_EPSILON = 1e-30
_PIECE = 2**17
"""Numbers that are measured together on a CPU: half a megabyte, and the memory system hands out no new pages."""


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

    def square(self, parameter: Parameter) -> Tensor:
        """Sum of squares of this process's part of `update`, a scalar."""

    def moment_sums(self) -> Tensor:
        """Sums over what the others were asked for, [2]: squared means, variances; NaN where not known."""


class _Moments(NamedTuple):
    """Adam's moments of one parameter, its update being `scale * mean / (sqrt(variance) + epsilon)`.

    Attributes:
        mean: m, not corrected for its beginning at zero.
        variance: v, likewise.
        epsilon: The optimizer's, in the unit of sqrt(variance).
        scale: What bias corrections and the group's multiplier come to.
        correction1: 1 - beta1**step.
        correction2: 1 - beta2**step.
    """

    mean: Tensor
    variance: Tensor
    epsilon: Tensor | float
    scale: Tensor | float
    correction1: Tensor | float
    correction2: Tensor | float


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
        known = self._moments(parameter)
        if known is None:
            return torch.full_like(parameter, float("nan"))
        self._add_sums(known, local_shard(known.mean).reshape(-1), local_shard(known.variance).reshape(-1))
        return torch.div(known.mean, known.variance.sqrt().add_(known.epsilon)).mul_(known.scale)

    def square(self, parameter: Parameter) -> Tensor:
        """Its sum of squares, piece by piece, so that no copy of the whole parameter is made."""
        known = self._moments(parameter)
        if known is None:
            return torch.full((), float("nan"), device=parameter.device)
        squares = []
        for mean, variance in zip(_pieces(known.mean), _pieces(known.variance), strict=True):
            self._add_sums(known, mean, variance)
            root = variance.sqrt().add_(known.epsilon)
            ratio = torch.div(mean, root, out=root)
            squares.append(torch.dot(ratio, ratio))
        total = squares[0] if len(squares) == 1 else torch.stack(squares).sum()
        return total * known.scale**2

    def _moments(self, parameter: Parameter) -> _Moments | None:
        """None where the update is not known."""
        state, (group, multiplier) = self._optimizer.state[parameter], self._groups[id(parameter)]
        if "exp_avg" not in state or "exp_avg_sq" not in state:
            return None
        beta1, beta2 = group["betas"]
        step = _step_count(state["step"])
        correction1, correction2 = 1.0 - beta1**step, 1.0 - beta2**step
        if isinstance(correction2, float) and correction2 == 0.0:  # every step so far was skipped
            return None
        root = correction2**0.5
        return _Moments(
            _wide(state["exp_avg"]),
            _wide(state["exp_avg_sq"]),
            epsilon=group["eps"] * root,
            scale=multiplier * root / correction1,
            correction1=correction1,
            correction2=correction2,
        )

    def _add_sums(self, known: _Moments, mean: Tensor, variance: Tensor) -> None:
        """Takes parts of the moments, one-dimensional, into their sums."""
        self._mean_squares.append(torch.dot(mean, mean) / known.correction1**2)
        self._variances.append(variance.sum() / known.correction2)

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

    def square(self, parameter: Parameter) -> Tensor:
        """Its sum of squares."""
        return square_sum(self.update(parameter))

    def moment_sums(self) -> Tensor:
        """Not known, [2]."""
        return torch.full((2,), float("nan"))


def level_parameters(parameters: Sequence[Parameter], *, has_pairs: bool = False) -> list[Parameter]:
    """Those whose norms a level refers to: matrices; vectors only where nothing else is trained.

    Gains of normalisation layers are near one, or far above it, where entries of matrices are hundredths: a few
    thousand of them can hold most of ||theta||^2, and a level that counts them is several times too high for the rest.

    Args:
        parameters: What is trained, but for low-rank adapters.
        has_pairs: There are adapters besides, whose effective change counts.
    """
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    return matrices if matrices or has_pairs else list(parameters)


def local_shard(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor; any other tensor as it is."""
    return cast(Tensor, tensor.to_local()) if hasattr(tensor, "to_local") else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a DTensor, the same on every process; any other tensor as it is."""
    return cast(Tensor, tensor.full_tensor()) if hasattr(tensor, "full_tensor") else tensor


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """This process's part, flat; on a CPU in pieces that stay in its cache, elsewhere whole."""
    flat = local_shard(tensor).reshape(-1)
    return torch.split(flat, _PIECE) if flat.device.type == "cpu" and len(flat) > _PIECE else (flat,)


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
