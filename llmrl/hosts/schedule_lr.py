"""The scheduler that a Trainer holds: it never decides a rate, it shows and keeps those of the controller.

`Trainer` logs `get_last_lr()` and puts `state_dict()` into every checkpoint, so rates and the controller's state go
through it. `step()` may be called any number of times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from llmrl.controller import ScheduleController

STATE_KEY = "llmrl"


class ScheduleLR(LRScheduler):
    """Rates that come from a controller.

    Args:
        optimizer: The one that the Trainer steps.
        controller: Attached later, when the model is ready and a checkpoint was loaded.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, controller: ScheduleController) -> None:
        self.controller: ScheduleController | None = controller
        self.restored: Mapping[str, Any] | None = None
        """The controller's state in the checkpoint that was loaded, until the controller takes it."""
        super().__init__(optimizer)

    def get_lr(self) -> list[float | torch.Tensor]:
        """The groups' present rates; needed by the base class only."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def step(self, epoch: int | None = None) -> None:
        """Changes nothing: rates change when the controller says so."""
        self._step_count = getattr(self, "_step_count", 0) + 1
        if not hasattr(self, "_last_lr"):
            self.show([float(group["lr"]) for group in self.optimizer.param_groups])

    def show(self, rates: Sequence[float]) -> None:
        """Takes the rates that the optimizer will step with as those to be logged."""
        self._last_lr: list[float | torch.Tensor] = list(rates)

    def state_dict(self) -> dict[str, Any]:
        """The controller's state, and what a plain linear scheduler needs to go on without it."""
        assert self.controller is not None
        state = self.controller.state_dict()
        return {
            STATE_KEY: state,
            "base_lrs": [float(rate) for rate in self.base_lrs],
            "last_epoch": int(state["step"]),
            "_step_count": int(state["step"]) + 1,
            "_last_lr": [float(rate) for rate in self._last_lr],
            "lr_lambdas": [None] * len(self.base_lrs),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the controller's state for when it is attached; a checkpoint without one starts it afresh."""
        self.restored = state_dict.get(STATE_KEY)
        if self.restored is not None:
            self.base_lrs = list(state_dict["base_lrs"])
