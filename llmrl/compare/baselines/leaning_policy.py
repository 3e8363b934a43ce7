"""The controller at its default level whose steps lean on their own gradient from the start: nothing learned."""

from __future__ import annotations

import numpy as np
from llmrl_envs.interface.action import action_table
from llmrl_envs.interface.observation import ObservationSpec
from llmrl_envs.interface.schedule_settings import ScheduleSettings
from numpy.typing import NDArray

from llmrl.policy import SchedulePolicy
from llmrl.policy_decision import PolicyDecision


class LeaningPolicy(SchedulePolicy):
    """Leans as soon as it may, and holds.

    Args:
        settings: Schedule settings; None takes those of *hold*.
    """

    def __init__(self, settings: ScheduleSettings | None = None) -> None:
        table = action_table("lean")
        super().__init__(table, ObservationSpec(table), settings or ScheduleSettings(), None, {"name": "hold_lean"})

    def act(self, observation: NDArray[np.float32], mask: NDArray[np.bool_]) -> PolicyDecision:
        """Leaning where mask bool[E, A] allows it, holding elsewhere."""
        lean = self.table.lean
        assert lean is not None
        actions = np.where(mask[:, lean], lean, self.table.hold).astype(np.int64)
        return PolicyDecision(actions, np.full(mask.shape, np.nan, np.float32))
