"""Optimizers of other packages, made for a session."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from llmrl_envs.jobs.extensions import OptimizerFactory
from llmrl_envs.jobs.optimizer import parameter_groups
from llmrl_envs.jobs.task import OptimizerSettings
from torch.nn import Parameter

from llmrl.compare.baselines.packages import require_package

PRODIGY_START = 1e-5


def schedule_free_adamw(warmup_steps: int) -> OptimizerFactory:
    """Schedule-free AdamW, from the package of its authors.

    Defazio et al. 2024, https://arxiv.org/abs/2405.15682

    Args:
        warmup_steps: Steps over which it raises its own rate.
    """
    package = require_package("schedulefree", "schedule_free")

    def make(parameters: Mapping[str, Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
        groups = parameter_groups(parameters, settings.weight_decay)
        made: torch.optim.Optimizer = package.AdamWScheduleFree(
            groups, lr=1.0, betas=settings.betas, eps=settings.eps, warmup_steps=warmup_steps
        )
        return made

    return make


def prodigy() -> OptimizerFactory:
    """Prodigy, from the package of its authors: AdamW whose rate is an estimated distance to the solution.

    Its defaults, but that the estimate starts at 1e-5: from 1e-6 it takes a fifth of a job of 200 steps to arrive. Bias
    correction, which its authors advise for diffusion models, delays it further and is off, as by default.

    Mishchenko and Defazio 2023, https://arxiv.org/abs/2306.06101
    """
    package = require_package("prodigyopt", "prodigy")

    def make(parameters: Mapping[str, Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
        groups = parameter_groups(parameters, settings.weight_decay)
        made: torch.optim.Optimizer = package.Prodigy(
            groups, lr=1.0, betas=settings.betas, eps=settings.eps, d0=PRODIGY_START
        )
        return made

    return make


def prodigy_rate(optimizer: torch.optim.Optimizer) -> float:
    """The rate that Prodigy's last step took: its estimate times the schedule's factor."""
    group = optimizer.param_groups[0]
    return float(group["d"] * group["lr"])
