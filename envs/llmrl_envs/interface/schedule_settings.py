"""What a schedule does besides its actions: base, warm-up, start, limits, and how often a job decides."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from llmrl_envs.errors import UserError
from llmrl_envs.interface.base_schedule import BASE_NAMES, USUAL_DECISIONS, BaseName, decision_intervals
from llmrl_envs.interface.statistics import Integers

ADDED_SETTINGS = frozenset(
    {"earliest_cooldown", "earliest_move", "latest_move", "decisions_per_job", "early_decisions", "skip_outliers"}
)
"""Settings that policies of earlier versions lack: they have the default."""

_MOST_ROLLBACKS = 10**6
_MOST_DECISIONS = 1000


@dataclass(frozen=True)
class ScheduleSettings:
    """What a schedule does besides its actions.

    Attributes:
        base: Shape over the budget that every level is multiplied with.
        warmup_fraction: Share of the budget over which the rate rises linearly from near zero.
        start: "default": the table's default level, whatever rate was given. "given": the level that the given
            rate means for this model, for jobs whose rate is known to be good. That level is known once Adam's
            moments have filled, so the first few measurements move the level and leave the rate alone.
        rollbacks: How many times a job may return to its best snapshot.
        cooldown_progress: Share of the budget after which the level is final.
        earliest_cooldown: Share of the budget from which a job may commit to a cooldown; never before its warm-up ends.
        earliest_move: Share of the budget from which the level may move.
        latest_move: Share of the budget after which it may not.
        smoothing: Weight of a new measurement of ||theta|| / ||u||, in log space, after the first few.
        decisions_per_job: About how many decisions a job has, as long as four optimizer steps lie between them.
        early_decisions: Seven of them come sooner at the beginning, where a wrong rate does its damage.
        skip_outliers: A step whose loss stands out is not taken; see `OutlierSteps`.
    """

    base: BaseName = "linear"
    warmup_fraction: float = 0.05
    start: Literal["default", "given"] = "default"
    rollbacks: int = 2
    cooldown_progress: float = 0.9
    earliest_cooldown: float = 0.25
    earliest_move: float = 0.0
    latest_move: float = 1.0
    smoothing: float = 0.5
    decisions_per_job: int = USUAL_DECISIONS
    early_decisions: bool = True
    skip_outliers: bool = True

    def __post_init__(self) -> None:
        if self.base not in BASE_NAMES:
            raise UserError("unknown base schedule", expected=f"one of {', '.join(BASE_NAMES)}", got=repr(self.base))
        if not 0.0 <= self.warmup_fraction < 1.0:
            raise UserError(
                "the warm-up is out of range",
                expected="a share of the budget in [0, 1)",
                got=self.warmup_fraction,
                where="schedule.warmup_fraction",
            )
        for name, allowed, fits in (
            ("start", "default or given", self.start in ("default", "given")),
            ("rollbacks", f"0 to {_MOST_ROLLBACKS}", 0 <= self.rollbacks <= _MOST_ROLLBACKS),
            ("cooldown_progress", "a share of the budget in [0, 1]", 0.0 <= self.cooldown_progress <= 1.0),
            ("earliest_cooldown", "a share of the budget in [0, 1]", 0.0 <= self.earliest_cooldown <= 1.0),
            ("earliest_move", "a share of the budget in [0, 1]", 0.0 <= self.earliest_move <= 1.0),
            ("latest_move", "a share of the budget in [0, 1]", 0.0 <= self.latest_move <= 1.0),
            ("smoothing", "a weight in (0, 1]", 0.0 < self.smoothing <= 1.0),
            ("decisions_per_job", f"1 to {_MOST_DECISIONS}", 1 <= self.decisions_per_job <= _MOST_DECISIONS),
        ):
            if not fits:
                raise UserError(
                    "the schedule's setting is out of range",
                    expected=allowed,
                    got=repr(getattr(self, name)),
                    where=f"schedule.{name}",
                )

    def identity(self) -> dict[str, Any]:
        """What a digest of the settings is made of: the same as in earlier versions where nothing new is set."""
        fresh = ScheduleSettings()
        return {k: v for k, v in asdict(self).items() if k not in ADDED_SETTINGS or v != getattr(fresh, k)}

    def intervals(self, total_steps: int) -> tuple[int, ...]:
        """Optimizer steps between the decisions of a job, see `decision_intervals`."""
        return decision_intervals(total_steps, self.decisions_per_job, early=self.early_decisions)

    def warmup_steps(self, total_steps: Integers) -> Integers:
        """Optimizer steps of warm-up, int64[E]."""
        steps: Integers = np.rint(self.warmup_fraction * np.asarray(total_steps)).astype(np.int64)
        return steps
