"""The optimizer's update at learning rate one, tensor by tensor: from Adam's moments, or from how the weights moved.

Tensors may be shards (DTensors of FSDP2): elementwise results stay shards, and only sums travel between processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

UpdateSource = Literal["moments", "difference"]
_EPSILON = 1e-30
_PIECE = 2**18
"""Numbers that are measured together on a CPU: a megabyte, which stays in its cache."""


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
    mean_squares: list[Tensor] = field(default_factory=list)
    variances: list[Tensor] = field(default_factory=list)

    def add(self, mean: Tensor, variance: Tensor) -> None:
        """Takes parts of the moments, one-dimensional, into their sums."""
        self.mean_squares.append(torch.dot(mean, mean))
        self.variances.append(variance.sum())

    def sums(self) -> Tensor:
        """Of the bias-corrected squared means and the variances, [2]."""
        mean_square = torch.stack(self.mean_squares).sum() / self.correction1**2
        return torch.stack([mean_square, torch.stack(self.variances).sum() / self.correction2]).float()


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

    def update(self, parameter: Parameter) -> Tensor:
        """The update, of the parameter's shape."""
        state = self._optimizer.state[parameter]
        scaling = self._scaling(parameter, state)
        if scaling is None:
            return torch.full_like(parameter, float("nan"))
        mean, variance = _wide(state["exp_avg"]), _wide(state["exp_avg_sq"])
        scaling.add(local_shard(mean).reshape(-1), local_shard(variance).reshape(-1))
        return torch.div(mean, variance.sqrt().add_(scaling.epsilon)).mul_(scaling.scale)

    def square(self, parameters: Iterable[Parameter]) -> Tensor:
        """Their sum of squares, piece by piece, so that no copy of a whole parameter is made."""
        found: dict[int, tuple[_Scaling, list[Tensor]]] = {}
        root = _SquareRoot()
        for parameter in parameters:
            state = self._optimizer.state[parameter]
            scaling = self._scaling(parameter, state)
            if scaling is None:
                return torch.full((), float("nan"), device=parameter.device)
            squares = found.setdefault(id(scaling), (scaling, []))[1]
            for mean, variance in zip(_pieces(state["exp_avg"]), _pieces(state["exp_avg_sq"]), strict=True):
                scaling.add(mean, variance)
                ratio = root(variance).add_(scaling.epsilon)
                torch.div(mean, ratio, out=ratio)
                squares.append(torch.dot(ratio, ratio))
        return torch.stack([(torch.stack(parts).sum() * s.scale**2).float() for s, parts in found.values()]).sum()

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
        return (_wide(self._before[id(parameter)]) - _wide(parameter.detach())).div_(self._learning_rate)

    def square(self, parameters: Iterable[Parameter]) -> Tensor:
        """Their sum of squares."""
        return torch.stack([square_sum(self.update(parameter)).float() for parameter in parameters]).sum()

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
    if type(tensor) is Tensor:  # the usual one; looking for what it has not takes longer
        return tensor
    return cast(Tensor, tensor.to_local()) if hasattr(tensor, "to_local") else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a DTensor, the same on every process; any other tensor as it is."""
    return cast(Tensor, tensor.full_tensor()) if hasattr(tensor, "full_tensor") else tensor


def flat_shard(tensor: Tensor) -> Tensor:
    """This process's part, flat and in numbers whose squares can be added up."""
    return _wide(local_shard(tensor).reshape(-1))


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The same; on a CPU in pieces that stay in its cache, elsewhere whole."""
    flat = local_shard(tensor).reshape(-1)
    whole = flat.device.type != "cpu" or flat.numel() <= _PIECE
    return map(_wide, (flat,) if whole else torch.split(flat, _PIECE))


class _SquareRoot:
    """Elementwise square roots; each lives until the next is asked for.

    On a CPU NumPy takes them, because torch's take five times as long where numbers are zero, as are the moments of
    embeddings whose tokens have not occurred; and they lie in one place, so that no new pages are asked for.
    """

    def __init__(self) -> None:
        self._place: Tensor | None = None

    def __call__(self, flat: Tensor) -> Tensor:
        if flat.device.type != "cpu":
            return flat.sqrt()
        if self._place is None or self._place.dtype != flat.dtype:
            self._place = torch.empty(_PIECE, dtype=flat.dtype)
        root = self._place[: flat.numel()]
        np.sqrt(flat.numpy(), out=root.numpy())
        return root


def square_sum(tensor: Tensor) -> Tensor:
    """Sum of squares of this process's part, a scalar."""
    flat = flat_shard(tensor.detach())
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
