"""The learner's update as one CUDA graph: a network of two layers of 128 is all launch overhead on a GPU.

`step_without_branches` is the arithmetic of `Learner.differentiate` and `Learner.apply` with every decision made on the
device; on the CPU it can be run as it is, and tests compare it with the plain one. `CapturedUpdate` records it once and
replays it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from llmrl.dqn.learner import Learner
    from llmrl.dqn.td_loss import TensorBatch

Measured = tuple[Tensor, Tensor, Tensor, Tensor]  # mean loss [], priority [B], mean value [], gradient norm []

WARM_UP_STEPS = 3  # libraries allocate their workspaces in the first few; none of that may fall into the recording


def can_capture(learner: Learner) -> bool:
    """Whether an update can be recorded: on CUDA, in one process, with the optimizer that can skip on the device."""
    alone = learner.average_gradient is None
    return alone and learner.device.type == "cuda" and learner.config.optimizer == "adam"


def step_without_branches(learner: Learner, batch: TensorBatch) -> Measured:
    """One update; a gradient that is not finite leaves parameters and averages as they are, decided on the device."""
    loss, priority, value, norm = learner.differentiate(batch)
    parameters, config = learner.parameters, learner.config
    not_finite = (~torch.isfinite(norm)).to(norm.dtype)
    if config.max_grad_norm is not None:
        parameters.gradient.mul_((config.max_grad_norm / norm).clamp(max=1.0))
    if config.weight_decay:
        rate = learner.optimizer.param_groups[0]["lr"] * config.weight_decay
        with torch.no_grad():
            parameters.values.mul_(1.0 - parameters.decay_mask * rate * (1.0 - not_finite))
    # The fused Adam kernel leaves everything alone where this is 1; gradient scalers use the same attribute.
    learner.optimizer.found_inf = not_finite  # type: ignore[union-attr]
    learner.optimizer.step()
    return loss, priority, value, norm


class CapturedUpdate:
    """`step_without_branches` recorded for batches of one shape.

    Recording runs a few updates; parameters and averages are put back afterwards, so that it changes nothing.

    Args:
        learner: On a CUDA device; its tensors must stay where they are as long as this is used.
        example: A batch of the shape to be replayed, on the device.
    """

    def __init__(self, learner: Learner, example: TensorBatch) -> None:
        self._inputs = type(example)(*(tensor.clone() for tensor in example))
        kept = _state_of(learner)
        stream = torch.cuda.Stream(learner.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(learner.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                step_without_branches(learner, self._inputs)
        torch.cuda.current_stream(learner.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = step_without_branches(learner, self._inputs)
        _put_back(learner, kept)

    def matches(self, batch: TensorBatch) -> bool:
        """Whether a batch has the shapes of the recording."""
        return all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(self._inputs, batch, strict=True))

    def __call__(self, batch: TensorBatch) -> Measured:
        """Replays the update on a batch."""
        for own, given in zip(self._inputs, batch, strict=True):
            own.copy_(given, non_blocking=True)
        self._graph.replay()
        loss, priority, value, norm = (tensor.clone() for tensor in self._outputs)
        return loss, priority, value, norm


def _state_of(learner: Learner) -> tuple[Tensor, dict[str, Tensor]]:
    state = learner.optimizer.state[learner.parameters.values]
    return learner.parameters.values.clone(), {name: value.clone() for name, value in state.items()}


@torch.no_grad()
def _put_back(learner: Learner, kept: tuple[Tensor, dict[str, Tensor]]) -> None:
    """Restores in place, since the recording holds the addresses; averages that did not exist become zero."""
    values, state = kept
    learner.parameters.values.copy_(values)
    for name, value in learner.optimizer.state[learner.parameters.values].items():
        if name in state:
            value.copy_(state[name])
        else:
            value.zero_()
