"""How a job that somebody else runs is steered."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from llmrl_envs.interface.schedule_settings import ScheduleSettings


@dataclass(frozen=True)
class JobOptions:
    """How a job is steered.

    Attributes:
        total_steps: Its budget in optimizer steps.
        first_step: Steps that it has done already.
        max_grad_norm: Norm that gradients are clipped to; infinity does not clip.
        base_rates: The parameter groups' own rates; None reads them from the optimizer.
        settings: Schedule settings; None takes the policy's.
        guarded: Fall back to linear decay when the job loses too much, or its validation loss turns, and take no step
            whose loss stands out.
        snapshots: Whether and where the best state is kept.
        snapshot_path: File of a snapshot on disk, without the rank and the suffix.
    """

    total_steps: int
    first_step: int = 0
    max_grad_norm: float = math.inf
    base_rates: tuple[float, ...] | None = None
    settings: ScheduleSettings | None = None
    guarded: bool = True
    snapshots: bool = False
    snapshot_path: Path | None = None
