"""The optimizer's update at learning rate one, tensor by tensor: from Adam's moments, or from how the weights moved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from llmrl_envs.interface.tensor_sums import (
    PIECE,
    Array,
    Part,
    cpu_array,
    cpu_dot,
    flat_pieces,
    flat_shard,
    full_tensor,
    square_sum,
    total,
    wide,
)

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

    def square(self, parameters: Iterable[Parameter]) -> Tensor:
        """Sum of squares of this process's parts of their updates, a scalar; NaN where one is not known."""

    def moment_sums(self) -> Tensor:
        """Sums over what the others were asked for, [2]: squared means, variances; NaN where not known."""


@dataclass(frozen=True)
class _Scaling:
    """What stands between Adam's moments and its update, `scale * mean / (sqrt(variance) + epsilon)`.

    Parameters of one group that were stepped equally often have it in common, and add up in it before it is applied.

    Attributes:
        epsilon: The optimizer's, in the unit of sqrt(variance).
        scale: What bias corrections and the group's multiplier come to.
        correction1: 1 - beta1**step.
        correction2: 1 - beta2**step.
        mean_squares: Sums of squared means, not corrected for their beginning at zero.
        variances: Sums of variances, likewise.
    """

    epsilon: Tensor | float
    scale: Tensor | float
    correction1: Tensor | float
    correction2: Tensor | float
    mean_squares: list[Part] = field(default_factory=list)
    variances: list[Part] = field(default_factory=list)

    def add(self, mean_square: Part, variance: Part) -> None:
        """Takes sums over parts of the moments into those of all."""
        self.mean_squares.append(mean_square)
        self.variances.append(variance)

    def sums(self) -> Tensor:
        """Of the bias-corrected squared means and the variances, [2]."""
        return torch.stack([total(self.mean_squares) / self.correction1**2, total(self.variances) / self.correction2])


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
        self._scalings: dict[tuple[int, float | int], _Scaling] = {}
        self._place: Array = np.empty(0)

    def update(self, parameter: Parameter) -> Tensor:
        """The update, of the parameter's shape."""
        state = self._optimizer.state[parameter]
        scaling = self._scaling(parameter, state)
        if scaling is None:
            return torch.full_like(parameter, float("nan"))
        mean, variance = wide(state["exp_avg"]), wide(state["exp_avg_sq"])
        scaling.add(square_sum([mean]), flat_shard(variance).sum())
        return torch.div(mean, variance.sqrt().add_(scaling.epsilon)).mul_(scaling.scale)

    def square(self, parameters: Iterable[Parameter]) -> Tensor:
        """Their sum of squares."""
        found: dict[int, tuple[_Scaling, list[Part]]] = {}
        for parameter in parameters:
            state = self._optimizer.state[parameter]
            scaling = self._scaling(parameter, state)
            if scaling is None:
                return torch.full((), float("nan"), device=parameter.device)
            mean, variance = state["exp_avg"], state["exp_avg_sq"]
            means, variances = cpu_array(mean), cpu_array(variance)
            found.setdefault(id(scaling), (scaling, []))[1].extend(
                _device_squares(mean, variance, scaling)
                if means is None or variances is None
                else self._cpu_squares(means, variances, scaling)
            )
        return torch.stack([total(parts) * scaling.scale**2 for scaling, parts in found.values()]).sum()

    def _cpu_squares(self, mean: Array, variance: Array, scaling: _Scaling) -> Iterator[Part]:
        """The same as `_device_squares`."""
        epsilon = float(scaling.epsilon)
        for start in range(0, len(mean), PIECE):
            means = mean[start : start + PIECE]
            root = self._root(variance[start : start + PIECE])
            scaling.add(cpu_dot(means, means), cpu_dot(root, root))  # the root is in the cache
            root += epsilon
            np.divide(means, root, out=root)
            yield cpu_dot(root, root)

    def _root(self, numbers: Array) -> Array:
        """Square roots, which live until the next are asked for: in one place, so that no new pages are needed.

        NumPy's: torch's take five times as long where numbers are zero, as the moments of unseen tokens are.
        """
        if len(self._place) < len(numbers) or self._place.dtype != numbers.dtype:
            self._place = np.empty(PIECE, numbers.dtype)
        found: Array = np.sqrt(numbers, out=self._place[: len(numbers)])
        return found

    def _scaling(self, parameter: Parameter, state: Mapping[str, Any]) -> _Scaling | None:
        """None where the update is not known."""
        if "exp_avg" not in state or "exp_avg_sq" not in state:
            return None
        group, multiplier = self._groups[id(parameter)]
        step = _step_count(state["step"])
        place = id(group), step if isinstance(step, float) else id(parameter)
        if place not in self._scalings:
            beta1, beta2 = group["betas"]
            correction1, correction2 = 1.0 - beta1**step, 1.0 - beta2**step
            if isinstance(correction2, float) and correction2 == 0.0:  # every step so far was skipped
                return None
            root = correction2**0.5
            self._scalings[place] = _Scaling(
                group["eps"] * root, multiplier * root / correction1, correction1, correction2
            )
        return self._scalings[place]

    def moment_sums(self) -> Tensor:
        """Sums of the bias-corrected squared means and of the variances, [2]."""
        if not self._scalings:
            return torch.full((2,), float("nan"))
        return torch.stack([scaling.sums() for scaling in self._scalings.values()]).sum(dim=0)


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
        return (wide(self._before[id(parameter)]) - wide(parameter.detach())).div_(self._learning_rate)

    def square(self, parameters: Iterable[Parameter]) -> Tensor:
        """Their sum of squares."""
        return square_sum(self.update(parameter) for parameter in parameters)

    def moment_sums(self) -> Tensor:
        """Not known, [2]."""
        return torch.full((2,), float("nan"))


def _device_squares(mean: Tensor, variance: Tensor, scaling: _Scaling) -> Iterator[Part]:
    """Sums of squares of parts of an update, before `scale`; takes the moments into their sums."""
    for means, variances in zip(flat_pieces(mean), flat_pieces(variance), strict=True):
        scaling.add(torch.dot(means, means), variances.sum())
        update = means / variances.sqrt().add_(scaling.epsilon)
        yield torch.dot(update, update)


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
