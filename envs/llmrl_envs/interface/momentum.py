"""Quasi-hyperbolic momentum: an optimizer step that leans on its own gradient beside Adam's mean of those before.

Adam moves along the mean of the last ten gradients or so, whose middle is ten steps old: where the loss bends within
that time the mean points past the valley. QHAdam moves along `nu * m_hat + (1 - nu) * g` instead, over the same square
root of the second moment, and bears a higher rate (Ma and Yarats 2019, https://arxiv.org/abs/1810.06801, whose
recommended `nu` is the one that schedules have). Moments, weight decay and what is measured of them stay Adam's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from llmrl_envs.interface.tensor_sums import PIECE, local_shard


class LeaningStep:
    """Makes the next step of an optimizer lean on its own gradient, once, so that an interrupted job leaves nothing.

    Args:
        optimizer: As in `lean_on_gradient`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._handle: RemovableHandle | None = None

    def begin(self, share: float) -> None:
        """The step that comes leans, with this share of the mean; at 1 it is Adam's."""
        self.end()
        if share != 1.0:
            self._handle = self._optimizer.register_step_post_hook(lambda *_: self._lean(share))

    def end(self) -> None:
        """No step leans any more, whether one was taken or not."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _lean(self, share: float) -> None:
        self.end()
        lean_on_gradient(self._optimizer, share)


def lean_on_gradient(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Turns the step that Adam or AdamW has just taken into one of QHAdam, by moving the weights once more.

    Call before the gradients are forgotten. Parameters without a gradient stay where they are; where a fused optimizer
    was told to skip the step (`found_inf`), so do all, and nothing waits for the device.

    Args:
        optimizer: torch's Adam or AdamW, without amsgrad.
        share: Of the mean, nu; 1 changes nothing.
    """
    if share == 1.0:
        return
    skipped = getattr(optimizer, "found_inf", None)
    for group in optimizer.param_groups:
        rate = group["lr"] * (1.0 - share)
        for parameter in group["params"]:
            if parameter.grad is not None:
                kept = 1.0 if skipped is None else (skipped.to(parameter.device) == 0.0).to(torch.float32)
                _lean(parameter, parameter.grad, group, optimizer.state[parameter], rate, kept)


def _lean(
    parameter: Tensor,
    gradient: Tensor,
    group: Mapping[str, Any],
    state: Mapping[str, Any],
    rate: Tensor | float,
    kept: Tensor | float,
) -> None:
    """Moves this process's part of a parameter; not at all where `kept` is zero."""
    step, (beta1, beta2) = state["step"], group["betas"]
    if isinstance(step, Tensor):
        step = float(step) if step.device.type == "cpu" else step
    weight, gradient, mean, square = (
        local_shard(t) for t in (parameter.detach(), gradient, state["exp_avg"], state["exp_avg_sq"])
    )
    gradient = -gradient if group.get("maximize") else gradient
    lean(weight, gradient, mean, square, Corrections(1.0 - beta1**step, 1.0 - beta2**step, group["eps"]), rate, kept)


class Corrections(NamedTuple):
    """What stands between Adam's moments and its update.

    Attributes:
        mean: 1 - beta1**step; zero where every step so far was skipped.
        square: 1 - beta2**step.
        eps: The optimizer's.
    """

    mean: Tensor | float
    square: Tensor | float
    eps: Tensor | float


def lean(
    weight: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    corrections: Corrections,
    rate: Tensor | float,
    kept: Tensor | float = 1.0,
) -> None:
    """`weight -= rate * (g - m_hat) / (sqrt(v_hat) + eps)`, in place; on a CPU piece by piece, for the cache.

    Args:
        weight: To be moved, of any shape.
        gradient: As the step took it, clipped; of the same shape, like the moments.
        mean: First moment after the step.
        square: Second moment after the step.
        corrections: Of the moments.
        rate: What the rest of the mean's share is multiplied with.
        kept: 0 where the step was skipped, else 1.
    """
    tensors = weight, gradient, mean, square
    root = corrections.square**0.5
    if weight.is_cpu and all(t.is_contiguous() for t in tensors):
        parts: Iterable[Sequence[Tensor]] = zip(*(torch.split(t.view(-1), PIECE) for t in tensors), strict=True)
    else:
        parts = [tensors]
    numbers = not any(isinstance(value, Tensor) for value in (*corrections, rate, kept)) and corrections.mean != 0.0
    for part, slope, first, second in parts:
        divisor = second.sqrt().add_(corrections.eps * root)
        if numbers:  # four passes in place of seven
            lead = torch.sub(slope, first, alpha=float(1.0 / corrections.mean))
            part.addcdiv_(lead, divisor, value=-float(rate * root))
            continue
        lead = torch.sub(slope, first / corrections.mean).div_(divisor).mul_(rate * root)
        if isinstance(kept, Tensor):
            lead = torch.where(kept > 0.0, lead, torch.zeros_like(lead))
        part.sub_(lead)
