"""AdamW that learns its learning rate by gradient descent on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, overload

import torch
from llmrl_envs.jobs.optimizer import parameter_groups
from llmrl_envs.jobs.task import OptimizerSettings
from torch import Tensor
from torch.nn import Parameter

HYPER_RATE, MOST_CHANGE = 3.0, 0.2
_TINY = 1e-30


class HypergradientAdamW(torch.optim.Optimizer):
    """AdamW-HD with the multiplicative rule, which does not depend on the scale of gradients, rates or models.

    With u_t Adam's update at rate one, the loss falls with the rate as fast as the next gradient agrees with it:

        alpha_t = alpha_{t-1} * exp(clip(beta * cos(g_t, u_{t-1}), -0.2, 0.2))

    Baydin et al. 2018, https://arxiv.org/abs/1703.04782: their multiplicative rule 1 + beta * cos, written as the
    exponential so that a rate stays positive at any beta, and limited to a fifth a step. Gradients of small batches
    agree little (a cosine of 0.05 at a rate that is far too low), hence the large beta; where they agree well the rate
    would explode without the limit. Their additive rule moves a rate by about as much whatever its size, and cannot
    correct one that is ten times too high within a job.

    Args:
        groups: Parameter groups; decay by `weight_decay` of each. The `lr` of the first step is the rate to start from,
            later ones are not read.
        betas: Decay of the moments.
        eps: Added to the root of the second moment.
        hyper_rate: beta.

    Attributes:
        learning_rate: The present rate; None before the first step.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        hyper_rate: float = HYPER_RATE,
    ) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.hyper_rate = hyper_rate
        self.learning_rate: float | None = None

    @overload
    def step(self, closure: None = ...) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step: first the rate, then the weights."""
        if closure is not None:
            raise ValueError("closure: expected None, got a function")
        members = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if self.learning_rate is None:
            self.learning_rate = float(self.param_groups[0]["lr"])
        else:
            change = self.hyper_rate * self._agreement([p for _, p in members])
            self.learning_rate *= math.exp(min(max(change, -MOST_CHANGE), MOST_CHANGE))
        for group, parameter in members:
            update = self._adam_update(parameter, group)
            parameter.mul_(1.0 - self.learning_rate * group["weight_decay"])
            parameter.sub_(update, alpha=self.learning_rate)
        return None

    def _agreement(self, parameters: list[Parameter]) -> float:
        """cos(g_t, u_{t-1}) over all parameters; 0 where either is zero."""
        known = [p for p in parameters if "update" in self.state[p]]
        pairs = [(_gradient(p).reshape(-1), self.state[p]["update"].reshape(-1)) for p in known]
        sums = [torch.stack([torch.dot(g, u), torch.dot(g, g), torch.dot(u, u)]) for g, u in pairs]
        dot, gradient, update = torch.stack(sums).sum(dim=0).tolist() if sums else (0.0, 0.0, 0.0)
        return float(dot / max((gradient * update) ** 0.5, _TINY))

    def _adam_update(self, parameter: Parameter, group: Mapping[str, Any]) -> Tensor:
        """Adam's bias-corrected update at rate one; it is kept for the next step."""
        state = self.state[parameter]
        if "step" not in state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        (beta1, beta2), gradient = group["betas"], _gradient(parameter)
        state["step"] += 1
        state["exp_avg"].lerp_(gradient, 1.0 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
        mean = state["exp_avg"] / (1.0 - beta1 ** state["step"])
        root = (state["exp_avg_sq"] / (1.0 - beta2 ** state["step"])).sqrt()
        state["update"] = mean / (root + group["eps"])
        update: Tensor = state["update"]
        return update


def _gradient(parameter: Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def hypergradient_adamw(parameters: Mapping[str, Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimizer of a session."""
    groups = parameter_groups(parameters, settings.weight_decay)
    return HypergradientAdamW(groups, betas=settings.betas, eps=settings.eps)
