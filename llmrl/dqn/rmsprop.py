"""RMSProp as in the first DQN: centred, with the constant under the root.

    m = decay * m + (1 - decay) * g        v = decay * v + (1 - decay) * g**2
    w -= learning_rate * g / sqrt(v - m**2 + epsilon)

Mnih et al. 2015, https://www.nature.com/articles/nature14236, after Graves 2013, https://arxiv.org/abs/1308.0850.
PyTorch's own adds its epsilon outside the root: where the gradient has settled that divides by epsilon itself, here by
its root.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class CentredRMSprop(torch.optim.Optimizer):
    """Centred RMSProp; the optimizer interface of PyTorch, and the names of its state.

    Args:
        values: Tensors with gradients.
        lr: Learning rate.
        decay: Share of the averages that a step keeps.
        epsilon: Added to the variance of the gradient.
    """

    def __init__(self, values: list[Tensor], *, lr: float, decay: float, epsilon: float) -> None:
        super().__init__(values, {"lr": lr, "decay": decay, "epsilon": epsilon})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update from the gradients as they stand; a closure is not called."""
        for group in self.param_groups:
            for value in group["params"]:
                gradient, state = value.grad, self.state[value]
                if not state:
                    state["square_avg"], state["grad_avg"] = torch.zeros_like(value), torch.zeros_like(value)
                square, mean = state["square_avg"], state["grad_avg"]
                square.lerp_(gradient.square(), 1.0 - group["decay"])
                mean.lerp_(gradient, 1.0 - group["decay"])
                # Rounding can put the square of the mean above the mean of the squares.
                variance = (square - mean.square()).clamp_(min=0.0)
                value.addcdiv_(gradient, variance.add_(group["epsilon"]).sqrt_(), value=-group["lr"])
