"""Where a rollback returns to: parameters, optimizer state and random generators, in memory or in a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from llmrl_envs.interface.tensor_sums import local_shard
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Parameter

SnapshotPlace = Literal["auto", "memory", "disk", "off"]
_SEPARATOR = "|"


def state_tensors(parameters: Mapping[str, Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters ("NAME") and their optimizer state ("NAME|KEY"), not copied; numbers as float64 scalars."""
    found: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        found[name] = local_shard(parameter.detach())
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                found[name + _SEPARATOR + key] = local_shard(value.detach())
            elif isinstance(value, (int, float)):
                found[name + _SEPARATOR + key] = torch.tensor(value, dtype=torch.float64)
    return found


@torch.no_grad()
def copy_state(parameters: Mapping[str, Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies what `state_tensors` gives."""
    return {name: tensor.clone() for name, tensor in state_tensors(parameters, optimizer).items()}


@torch.no_grad()
def restore_state(
    copied: Mapping[str, Tensor], parameters: Mapping[str, Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Copies back what `copy_state` gave; state that a parameter did not have then is dropped.

    In a job that was resumed the optimizer is new and has no state, and the copy may lie on another device.
    """
    for name, parameter in parameters.items():
        local_shard(parameter.detach()).copy_(copied[name])
        prefix = name + _SEPARATOR
        saved = {key.removeprefix(prefix): value for key, value in copied.items() if key.startswith(prefix)}
        if not saved:
            optimizer.state.pop(parameter, None)
            continue
        state = optimizer.state[parameter]
        for key, value in saved.items():
            _put(state, key, value, parameter)


def _put(state: dict[str, Any], key: str, value: Tensor, parameter: Parameter) -> None:
    present = state.get(key)
    if present is None and value.ndim and value.shape == local_shard(parameter.detach()).shape:
        present = state[key] = torch.zeros_like(parameter, dtype=value.dtype)  # sharded as the parameter is
    if isinstance(present, Tensor):
        local_shard(present).copy_(value)
    elif isinstance(present, (int, float)):
        state[key] = type(present)(value.item())
    else:
        state[key] = value.clone()


class Snapshot:
    """The best state of a job so far.

    Args:
        path: File that holds it; None keeps it in memory, on the device of the parameters.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._held: dict[str, Tensor] | None = None
        self.taken = False

    def take(
        self, parameters: Mapping[str, Parameter], optimizer: torch.optim.Optimizer, random_state: Mapping[str, Tensor]
    ) -> None:
        """Keeps the present state in place of the one before.

        Args:
            parameters: By name.
            optimizer: Theirs.
            random_state: Generator states of all processes, uint8[P, ..], by the name of their device.
        """
        generators = {_SEPARATOR + name: state for name, state in random_state.items()}
        self.put(copy_state(parameters, optimizer) | generators)

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Keeps a state that was read elsewhere."""
        self.taken = True
        if self._path is None:
            self._held = dict(tensors)
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
        partial.replace(self._path)

    def restore(self, parameters: Mapping[str, Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Takes the job back to the kept state, and returns the generator states that belong to it.

        Raises:
            ValueError: Nothing was kept.
        """
        kept = self.tensors()
        restore_state(kept, parameters, optimizer)
        return {name.removeprefix(_SEPARATOR): t for name, t in kept.items() if name.startswith(_SEPARATOR)}

    def tensors(self) -> dict[str, Tensor]:
        """The kept state."""
        if not self.taken:
            raise ValueError("snapshot: expected one to have been taken, got none")
        if self._held is not None:
            return self._held
        assert self._path is not None
        loaded: dict[str, Tensor] = load_file(self._path)
        return loaded
