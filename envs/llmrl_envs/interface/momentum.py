"""Quasi-hyperbolic momentum: an optimizer step that leans on its own gradient beside Adam's mean of those before.

Adam moves along the mean of the last ten gradients or so, whose middle is ten steps old: where the loss bends within
that time the mean points past the valley. QHAdam moves along `nu * m_hat + (1 - nu) * g` instead, over the same square
root of the second moment, and bears a higher rate (Ma and Yarats 2019, https://arxiv.org/abs/1810.06801, whose
recommended `nu` is the one here). Moments, weight decay and everything that is measured of them stay Adam's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

QUASI_HYPERBOLIC_SHARE = 0.7
"""Share of the mean in the update, nu; the rest is the step's own gradient."""


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
    with torch.no_grad():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    change = _lean(parameter, group, optimizer.state[parameter])
                    if skipped is not None:
                        change = torch.where(skipped.to(change.device) > 0.0, torch.zeros_like(change), change)
                    _local(parameter).sub_(change.mul_(group["lr"] * (1.0 - share)))


def _lean(parameter: Tensor, group: dict[str, Any], state: dict[str, Tensor]) -> Tensor:
    """What the step's own gradient would move a parameter by at rate one, less what the mean has, on this process."""
    gradient, mean, square = (_local(t) for t in (parameter.grad, state["exp_avg"], state["exp_avg_sq"]))
    beta1, beta2 = group["betas"]
    step = state["step"].to(square.device) if isinstance(state["step"], Tensor) else state["step"]
    gradient = -gradient if group.get("maximize") else gradient
    return gradient_lead(gradient, mean, square, 1.0 - beta1**step, 1.0 - beta2**step, group["eps"])


def gradient_lead(
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    correction1: Tensor | float,
    correction2: Tensor | float,
    eps: Tensor | float,
) -> Tensor:
    """`(g - m_hat) / (sqrt(v_hat) + eps)`, of the gradient's shape.

    Args:
        gradient: As the step took it, clipped.
        mean: First moment after the step.
        square: Second moment after the step.
        correction1: 1 - beta1**step.
        correction2: 1 - beta2**step.
        eps: The optimizer's.
    """
    root = square.sqrt().div_(correction2**0.5).add_(eps)
    return (gradient - mean / correction1).div_(root)


def _local(tensor: Any) -> Tensor:
    """This process's part of a tensor that is shared out."""
    found: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return found
