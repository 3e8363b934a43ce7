"""A job's state, copied out and copied back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class SessionSnapshot:
    """State of a session.

    Attributes:
        tensors: Parameters ("parameter.NAME"), moments ("exp_avg.NAME", ...) and averaged weights ("average.INDEX").
        position: Step, tokens and loss scale.
        random_state: Generator states of the job, uint8 tensors by device type.
        best: The state that a rollback returns to, if there is one.
    """

    tensors: dict[str, Tensor]
    position: dict[str, float]
    random_state: dict[str, Tensor]
    best: SessionSnapshot | None = None


def take_snapshot(
    parameters: Mapping[str, Parameter],
    optimizer: torch.optim.Optimizer,
    average: Sequence[Tensor],
    position: Mapping[str, float],
    random_state: Mapping[str, Tensor],
    *,
    device: torch.device | None = None,
) -> SessionSnapshot:
    """Copies a job's state, to `device` or to where it is; later training does not change the copy."""
    present = present_tensors(parameters, optimizer, average)
    tensors = {name: tensor.to(device or tensor.device, copy=True) for name, tensor in present.items()}
    states = {name: state.clone() for name, state in random_state.items()}
    return SessionSnapshot(tensors, dict(position), states)


def present_tensors(
    parameters: Mapping[str, Parameter], optimizer: torch.optim.Optimizer, average: Sequence[Tensor]
) -> dict[str, Tensor]:
    """The tensors of a job's state themselves, which later training changes."""
    tensors = {f"parameter.{name}": parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        state = optimizer.state.get(parameter, {})
        tensors |= {f"{moment}.{name}": state[moment].detach() for moment in _MOMENTS if moment in state}
    return tensors | {f"average.{index}": value for index, value in enumerate(average)}


@torch.no_grad()
def restore_snapshot(
    snapshot: SessionSnapshot,
    parameters: Mapping[str, Parameter],
    optimizer: torch.optim.Optimizer,
    average: Sequence[Tensor],
) -> dict[str, float]:
    """Copies a snapshot back into the parameters, the optimizer and the averaged weights; returns its position.

    It may lie on another device, as one does that was read from a file.
    """
    counts_on_device = all(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for name, parameter in parameters.items():
        parameter.copy_(snapshot.tensors[f"parameter.{name}"])
        parameter.grad = None
        if f"exp_avg.{name}" not in snapshot.tensors:
            optimizer.state.pop(parameter, None)
            continue
        state = optimizer.state[parameter]
        for moment in _MOMENTS:
            saved = snapshot.tensors[f"{moment}.{name}"]
            if moment in state:
                state[moment].copy_(saved)
            elif moment == "step" and not counts_on_device:
                state[moment] = saved.clone()
            else:
                state[moment] = saved.to(parameter.device, copy=True)
    for index, value in enumerate(average):
        value.copy_(snapshot.tensors[f"average.{index}"])
    return snapshot.position
