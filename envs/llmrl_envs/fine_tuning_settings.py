"""What the fine-tuning environments are made with, single and vector alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from llmrl_envs.errors import UserError
from llmrl_envs.interface.action import ActionTable, action_table
from llmrl_envs.interface.observation import GROUPS, FeatureGroup, ObservationSpec
from llmrl_envs.interface.reward import RewardSpec
from llmrl_envs.interface.schedule_settings import ScheduleSettings
from llmrl_envs.jobs.reference import reference_key
from llmrl_envs.jobs.task import FineTuningTask, SampledTask, TaskDistribution

DEFAULT_TASKS: dict[str, Any] = {
    "tasks": [{"name": "builtin-json", "data": "builtin:json", "steps": 60, "max_length": 64}],
}


@dataclass(frozen=True)
class FineTuningSettings:
    """Settings of a fine-tuning environment; see `FineTuningEnv` for its arguments.

    Attributes:
        tasks: What episodes are drawn from.
        table: The actions.
        observation_spec: Layout of the observation.
        reward_spec: How rewards are made.
        schedule: What a schedule does besides its actions.
        feature_dropout: Probability that a job withholds a feature group.
        validation_visible: Probability that a job shows its validation loss to the policy.
    """

    tasks: TaskDistribution
    table: ActionTable
    observation_spec: ObservationSpec
    reward_spec: RewardSpec
    schedule: ScheduleSettings
    feature_dropout: float
    validation_visible: float

    @classmethod
    def make(
        cls,
        tasks: TaskDistribution | Mapping[str, Any] | None,
        actions: str,
        observation: Mapping[str, Any] | None,
        reward: Mapping[str, Any] | None,
        schedule: Mapping[str, Any] | None,
    ) -> FineTuningSettings:
        """Settings from an environment's arguments.

        Raises:
            UserError: A setting is unknown or out of range.
        """
        given = DEFAULT_TASKS if tasks is None else tasks
        shown = {"stack": 3, "feature_dropout": 0.0, "validation_visible": 0.0, **(observation or {})}
        dropout, visible = float(shown.pop("feature_dropout")), float(shown.pop("validation_visible"))
        table = action_table(actions)
        reward_spec = RewardSpec(**(reward or {}))
        if visible > 0.0 and reward_spec.measured == "end":
            raise UserError(
                "a validation loss that is measured at the end of a job alone cannot be shown before",
                expected="0, or reward.measured decisions",
                got=visible,
                where="observation.validation_visible",
            )
        return cls(
            tasks=given if isinstance(given, TaskDistribution) else TaskDistribution.model_validate(given),
            table=table,
            observation_spec=ObservationSpec(table, **shown),
            reward_spec=reward_spec,
            schedule=ScheduleSettings(**(schedule or {})),
            feature_dropout=dropout,
            validation_visible=visible,
        )

    def spaces(self) -> tuple[gymnasium.Space[NDArray[np.float32]], spaces.Discrete]:
        """Observation and action space of one environment."""
        low, high = self.observation_spec.bounds()
        return spaces.Box(low, high, dtype=np.float32), spaces.Discrete(self.table.num_actions)

    def reference_key(self, drawn: DrawnJob) -> str:
        """What decides the reference run of a job; see `ReferenceCurves`."""
        return reference_key(drawn.sampled.task, drawn.sampled.seed, self.reward_spec.measured, self.schedule)

    def draw(self, rng: np.random.Generator, job: SampledTask | None = None) -> DrawnJob:
        """Draws the next job and what it withholds; as many numbers whatever is configured.

        Args:
            rng: The environment's generator.
            job: The job, where it is given and not drawn.
        """
        sampled = self.tasks.sample(rng) if job is None else job
        draws = rng.random(len(GROUPS))
        hidden = draws < self.feature_dropout
        hidden[GROUPS.index(FeatureGroup.LOSS)] = False
        validation = GROUPS.index(FeatureGroup.VALIDATION)
        shows_validation = bool(draws[validation] < self.validation_visible)
        hidden[validation] = not shows_validation
        return DrawnJob(sampled, np.asarray(hidden), shows_validation)


@dataclass(frozen=True)
class DrawnJob:
    """An episode to come.

    Attributes:
        sampled: Its job.
        hidden: bool[G], feature groups that it withholds.
        shows_validation: Whether the policy sees the validation loss.
    """

    sampled: SampledTask
    hidden: NDArray[np.bool_]
    shows_validation: bool

    def state(self) -> dict[str, Any]:
        """The job as JSON values."""
        sampled = self.sampled
        return {
            "task": sampled.task.model_dump(mode="json"),
            "task_index": sampled.task_index,
            "learning_rate": sampled.learning_rate,
            "seed": sampled.seed,
            "start_move": sampled.start_move,
            "hidden": self.hidden.tolist(),
            "shows_validation": self.shows_validation,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> DrawnJob:
        """The job that `state` told of."""
        task = FineTuningTask.model_validate(state["task"])
        rate, seed, start_move = float(state["learning_rate"]), int(state["seed"]), int(state["start_move"])
        sampled = SampledTask(task, int(state["task_index"]), rate, seed, start_move)
        return cls(sampled, np.array(state["hidden"], np.bool_), bool(state["shows_validation"]))
