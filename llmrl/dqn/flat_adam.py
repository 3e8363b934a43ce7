"""Adam on one vector: the kernel of `torch.optim.Adam`, called without what an optimizer of many tensors needs."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor


class FlatAdam:
    """Adam (Kingma and Ba 2015, https://arxiv.org/abs/1412.6980); equals `torch.optim.Adam(fused=True)` bit for bit.

    Args:
        values: [P] what is optimised, in place; `values.grad` [P] is its gradient.
        lr: Learning rate.
        betas: Decay of the two averages.
        eps: Added to the root of the second average.

    Attributes:
        param_groups: One group, whose "lr" can be set.
        found_inf: [] 1 where the gradient is not finite and nothing is to change; None = the caller has looked.
        state: As an optimizer's: for `values` the tensors "step" [], "exp_avg" [P] and "exp_avg_sq" [P].
    """

    def __init__(self, values: Tensor, *, lr: float, betas: tuple[float, float], eps: float) -> None:
        self.param_groups: list[dict[str, Any]] = [{"lr": lr}]
        self.state: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)
        self.found_inf: Tensor | None = None
        self._values, self._betas, self._eps = values, betas, eps

    def step(self) -> None:
        """One update from the gradient as it stands; none where `found_inf` is 1."""
        state = self.state[self._values] or self._begin()
        step, gradient = state["step"].add_(1.0), self._values.grad
        assert gradient is not None
        # What `torch.optim.Adam(fused=True)` calls, whose own bookkeeping takes twice as long as the arithmetic here.
        torch._fused_adam_(
            [self._values],
            [gradient],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [step],
            amsgrad=False,
            beta1=self._betas[0],
            beta2=self._betas[1],
            lr=self.param_groups[0]["lr"],
            weight_decay=0.0,
            eps=self._eps,
            maximize=False,
            found_inf=self.found_inf,
        )
        if self.found_inf is not None:
            step.sub_(self.found_inf)

    def _begin(self) -> dict[str, Tensor]:
        self.state[self._values] = {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(self._values),
            "exp_avg_sq": torch.zeros_like(self._values),
        }
        return self.state[self._values]
