"""What a session can be given in place of its own parts: learning rates, an optimizer, a way to clip gradients.

The controller's schedule and AdamW are the usual ones; a comparison brings others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import Parameter

from llmrl_envs.interface.statistics import Booleans, Floats, Integers

if TYPE_CHECKING:
    from llmrl_envs.jobs.task import OptimizerSettings


class StepRates(Protocol):
    """What a session asks for each step's rate; `Schedule` of one lane is one."""

    @property
    def frozen(self) -> Booleans:
        """bool[1], whether the lower half of the model stands still."""

    def learning_rate(self, step: Integers, /) -> Floats:
        """Learning rate of the optimizer step with index `step` int64[1], float64[1]."""

    def clipping_factor(self) -> Floats:
        """What the job's gradient-norm limit is multiplied with, float64[1]."""

    def momentum_share(self) -> Floats:
        """Share of Adam's mean in an update, float64[1]; see `lean_on_gradient`."""

    def skips_outliers(self) -> bool:
        """Steps whose loss stands out are not taken; see `OutlierSteps`."""


class OptimizerFactory(Protocol):
    """Makes the optimizer of a session, whose groups' `lr` is set before every step."""

    def __call__(self, parameters: Mapping[str, Parameter], settings: OptimizerSettings, /) -> torch.optim.Optimizer:
        """An optimizer of these parameters."""


@runtime_checkable
class ModalOptimizer(Protocol):
    """An optimizer that trains at other weights than those that it deploys, such as a schedule-free one."""

    def train(self) -> None:
        """Puts the weights of training into the model."""

    def eval(self) -> None:
        """Puts the deployed weights into the model."""


class GradientClipper(Protocol):
    """Scales gradients before a step."""

    def __call__(self, parameters: Sequence[Parameter], limit: float, /) -> Tensor:
        """Scales the gradients in place.

        Args:
            parameters: Those that the step changes.
            limit: The job's own limit of the global norm.

        Returns:
            The global norm before, a scalar on the device.
        """


def clip_to_limit(parameters: Sequence[Parameter], limit: float) -> Tensor:
    """Scales gradients down to a global norm of `limit`."""
    return torch.nn.utils.clip_grad_norm_(parameters, limit, foreach=True)
