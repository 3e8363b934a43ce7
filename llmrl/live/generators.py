"""The random generators that a job's steps draw from, torch's on the CPU and on the job's device.

A rollback turns them back. A data loader that shuffles without a generator of its own draws its order from the CPU's,
which must not be turned back with the weights, or an epoch's order would come again. So a generator counts as the job's
only as long as every step draws from it (dropout does): one that a step left alone is the data's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Generators:
    """Torch's generators of this process.

    Args:
        device: The job's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known = ("cpu",) if device.type == "cpu" else ("cpu", device.type)
        self._own = list(self._known)
        self._before: dict[str, Tensor] = {}

    @property
    def own(self) -> tuple[str, ...]:
        """Names of those that every step so far drew from."""
        return tuple(self._own)

    def begin_step(self) -> None:
        """Call before a step's first forward pass."""
        self._before = {name: self._state(name) for name in self._own}

    def end_step(self) -> None:
        """Call after a step's last forward pass: what it left alone is not the job's."""
        for name, before in self._before.items():
            if torch.equal(self._state(name), before):
                self._own.remove(name)
        self._before = {}

    def states(self) -> dict[str, Tensor]:
        """States of all generators, the job's own or not, uint8, on the CPU: the same names in every process."""
        return {name: self._state(name) for name in self._known}

    def restore(self, states: Mapping[str, Tensor]) -> None:
        """Turns the job's own generators back."""
        for name in self._own:
            if name in states:
                self._set(name, states[name].cpu().clone())  # torch 2.13 crashes on a view with an offset

    def keep(self, names: Sequence[str]) -> None:
        """Takes only these as the job's own, as `own` told before the job was interrupted."""
        self._own = [name for name in self._own if name in names]
        self._before = {}

    def _state(self, name: str) -> Tensor:
        if name == "cpu":
            return torch.get_rng_state()
        state: Tensor = getattr(torch, name).get_rng_state(self._device)
        return state

    def _set(self, name: str, state: Tensor) -> None:
        if name == "cpu":
            torch.set_rng_state(state)
        else:
            getattr(torch, name).set_rng_state(state, self._device)
