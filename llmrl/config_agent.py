"""The section `agent` of a training: who learns, from what, and with which flags."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from llmrl.dqn.config import FLAGS_READ, PRESETS, DQNConfig, PresetName


class AgentConfig(DQNConfig):
    """Who learns: the name of the agent and, beside it, every flag of `DQNConfig` (`agent.n_step=5`).

    Attributes:
        name: dqn, tabular (Q-learning on a table), or reinforce (with a value baseline).
        preset_name: The key `preset`: where flags that are not given come from. `default`, or `nature`, the DQN exactly
            as first published.
        experience: What earlier runs saw, put into the replay before learning starts: run directories or replay folders
            of runs with the same observations and actions.
        ignored_features: Names of features that the network is blind to, in every stacked decision; `mode_*` names all
            that begin so. What does not carry from the jobs of training to others does harm, and with this it can
            stay in the experience.
        pretrain_updates: Updates on that experience before the first decision; they do not count against
            `replay_ratio`. With `training.decisions: 0` the policy is learned from logs alone.
        seed: Not a key here: the agent's generators follow from the run's seed.
    """

    name: Literal["dqn", "tabular", "reinforce"] = "dqn"
    preset_name: PresetName = Field(default="default", alias="preset")
    experience: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    ignored_features: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    pretrain_updates: int = Field(default=0, ge=0)
    seed: int = Field(default=0, exclude=True)

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, value: Any) -> Any:
        preset = value.get("preset") if isinstance(value, dict) else None
        return {**PRESETS[preset], **value} if preset in PRESETS else value

    @model_validator(mode="after")
    def _refuse_seed(self) -> AgentConfig:
        if "seed" in self.model_fields_set:
            raise ValueError("agent.seed is not a key; the run's `seed` stands at the top level")
        return self

    @model_validator(mode="after")
    def _check_what_the_agent_reads(self) -> AgentConfig:
        """A flag that an agent has no use for must stand at its default, so that nobody believes it has an effect."""
        if self.name == "dqn":
            return self
        read = {"name", "seed", *FLAGS_READ[self.name]}
        changed = [
            field.alias or name
            for name, field in type(self).model_fields.items()
            if name not in read and getattr(self, name) != field.get_default(call_default_factory=True)
        ]
        if changed:
            raise ValueError(f"{self.name} does not read {', '.join(f'agent.{name}' for name in changed)}")
        return self

    @model_validator(mode="after")
    def _check_pretraining(self) -> AgentConfig:
        if self.pretrain_updates and not self.experience:
            raise ValueError(f"agent.pretrain_updates={self.pretrain_updates} needs agent.experience to learn from")
        return self

    @model_validator(mode="after")
    def _check_blindness(self) -> AgentConfig:
        if self.ignored_features and (self.ignored_obs or not self.normalize_obs):
            raise ValueError("agent.ignored_features needs agent.normalize_obs, and no agent.ignored_obs beside it")
        return self

    def dqn(self, seed: int) -> DQNConfig:
        """The agent's flags alone, with the seed of its generators."""
        return DQNConfig(**{**self.model_dump(include=set(DQNConfig.model_fields)), "seed": seed})
