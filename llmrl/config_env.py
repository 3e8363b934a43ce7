"""The section `env` of a training: where the agent learns, what it sees, does and is paid for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from llmrl_envs.interface.action import action_table
from llmrl_envs.interface.reward import RewardSpec
from llmrl_envs.interface.schedule_settings import ScheduleSettings
from llmrl_envs.jobs.task import TaskDistribution
from pydantic import Field, field_validator, model_validator
from pydantic.dataclasses import dataclass as pydantic_dataclass

from llmrl.config_base import STRICT, Device, Settings

FINE_TUNING_ID = "llmrl/FineTuning-v0"
NOISY_QUADRATIC_ID = "llmrl/NoisyQuadratic-v0"

_OF_JOBS = ("tasks", "device", "vectorization", "population_workers", "groups")
_UNREAD = {FINE_TUNING_ID: ("kwargs",), NOISY_QUADRATIC_ID: _OF_JOBS}
_UNREAD_ELSEWHERE = (*_OF_JOBS, "actions", "observation", "reward", "schedule")
"""Keys of `env` that an environment has no use for, so that giving them is a mistake."""


class ObservationConfig(Settings):
    """What the policy sees.

    Attributes:
        stack: Decisions that are stacked into one observation, the newest first.
        feature_dropout: Probability that an episode hides the features that some hosts cannot supply, so that the
            policy copes without them.
        validation_visible: Probability that an episode shows the policy its validation loss; using a policy must not
            need one, so by default none does.
    """

    stack: int = Field(default=3, ge=1, le=16)
    feature_dropout: float = Field(default=0.1, ge=0.0, le=1.0)
    validation_visible: float = Field(default=0.0, ge=0.0, le=1.0)


@pydantic_dataclass(frozen=True, config=STRICT)
class RewardConfig(RewardSpec):
    """How the reward is made from validation losses; its keys are those of `RewardSpec`."""


@pydantic_dataclass(frozen=True, config=STRICT)
class ScheduleConfig(ScheduleSettings):
    """What a schedule does besides its actions; its keys are those of `ScheduleSettings`."""


class EnvConfig(Settings):
    """Where the agent learns.

    Attributes:
        id: A Gymnasium id. Ids of this package and of `gymnasium` itself need no import; others may be written
            `module:id`.
        population: Environments that are stepped together. For fine-tuning `auto` takes as many as fit into memory.
        vectorization: How more than one fine-tuning job runs: `population` all of them in one forward and backward
            pass, `sync` one after the other, `async` each in a process of its own.
        population_workers: Processes that train the jobs of a population on a CPU, each with one thread; `auto` takes
            one for each core that torch would use, but at least four jobs for each.
        groups: Jobs of a population that share task, given rate, seed and data order; the first of each group holds.
        tasks: The jobs of `llmrl/FineTuning-v0`; required there and refused elsewhere. Other keys that an environment
            does not read are refused as well.
        actions: Name of the action table: moves, moves_only, decay, rise, careful, joint, levels, factors.
        observation: What the policy sees.
        reward: How the reward is made.
        schedule: What an action changes.
        device: Where the jobs run; `auto` is a GPU when there is one.
        kwargs: Passed to the constructor of any other environment.
    """

    id: str = Field(default=FINE_TUNING_ID, min_length=1)
    population: Annotated[int, Field(ge=1)] | Literal["auto"] = 1
    vectorization: Literal["population", "sync", "async"] = "population"
    population_workers: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    groups: int = Field(default=1, ge=1)
    tasks: TaskDistribution | None = None
    actions: str = Field(default="moves", min_length=1)
    observation: ObservationConfig = ObservationConfig()
    reward: RewardConfig = RewardConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    device: Device = "auto"
    kwargs: dict[str, Any] = Field(default_factory=dict)

    @field_validator("actions")
    @classmethod
    def _check_actions(cls, value: str) -> str:
        return action_table(value).name

    @model_validator(mode="after")
    def _check_what_the_environment_reads(self) -> EnvConfig:
        if self.id == FINE_TUNING_ID and self.tasks is None:
            raise ValueError(f"{FINE_TUNING_ID} needs env.tasks.tasks: a list of at least one task")
        if self.population == "auto" and (self.id != FINE_TUNING_ID or self.vectorization != "population"):
            raise ValueError("env.population auto is for the population of fine-tuning jobs; otherwise give a number")
        if self.reward.baseline == "hold" and self.groups == 1:
            raise ValueError("env.reward.baseline hold needs env.groups of at least 2: a job of each group holds")
        if self.groups > 1 and (self.vectorization != "population" or self.population == 1):
            raise ValueError("env.groups needs env.vectorization population and env.population of at least as many")
        if self.population_workers != "auto" and (self.vectorization != "population" or self.population == 1):
            raise ValueError("env.population_workers needs env.vectorization population and env.population above 1")
        unread = _UNREAD.get(self.id, _UNREAD_ELSEWHERE)
        fields = type(self).model_fields
        changed = [
            name for name in unread if getattr(self, name) != fields[name].get_default(call_default_factory=True)
        ]
        if changed:
            raise ValueError(f"{self.id} does not read {', '.join(f'env.{name}' for name in changed)}")
        return self
