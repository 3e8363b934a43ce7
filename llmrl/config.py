"""What a configuration file may say: one model per command (`train`, `finetune`, `compare`).

Files are YAML, read by `llmrl.config_loading.load_config`, which also applies `key.sub=value` overrides and reports
every mistake at once. Models are frozen and refuse unknown keys. Nothing here imports torch or transformers.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from llmrl_envs.errors import UserError
from llmrl_envs.interface.action import UpdateChoice, action_table
from llmrl_envs.interface.base_schedule import WSD_DECAY_FRACTIONS
from llmrl_envs.interface.reward import RewardSpec
from llmrl_envs.interface.schedule import ScheduleSettings
from llmrl_envs.jobs.task import FineTuningTask, TaskDistribution
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic.dataclasses import is_pydantic_dataclass

from llmrl.compare.names import METHOD_NAMES
from llmrl.dqn.config import FLAGS_READ, PRESETS, DQNConfig, PresetName
from llmrl.policy_reference import HoldsOn

FINE_TUNING_ID = "llmrl/FineTuning-v0"
NOISY_QUADRATIC_ID = "llmrl/NoisyQuadratic-v0"

_OF_JOBS = ("tasks", "device", "vectorization", "population_workers", "groups")
_UNREAD = {FINE_TUNING_ID: ("kwargs",), NOISY_QUADRATIC_ID: _OF_JOBS}
_UNREAD_ELSEWHERE = (*_OF_JOBS, "actions", "observation", "reward", "schedule")
"""Keys of `env` that an environment has no use for, so that giving them is a mistake."""

Device: TypeAlias = Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]
WandbMode: TypeAlias = Literal["offline", "online", "disabled"]
TrackerName: TypeAlias = Literal["aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio"]
NonNegative: TypeAlias = Annotated[float, Field(ge=0.0)]
Positive: TypeAlias = Annotated[float, Field(gt=0.0)]


_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


def _is_policy_path(name: str) -> bool:
    return "/" in name or "\\" in name or Path(name).is_dir()


def section_fields(annotation: Any) -> dict[str, Any]:
    """Keys and their types, if a type is a section of a configuration; otherwise nothing."""
    if isinstance(annotation, type):
        if issubclass(annotation, BaseModel):
            return {field.alias or name: field.annotation for name, field in annotation.model_fields.items()}
        if is_pydantic_dataclass(annotation):
            return {name: field.annotation for name, field in annotation.__pydantic_fields__.items()}
    return {}


class Settings(BaseModel):
    """Base of every section: frozen, no unknown keys, finite numbers; a section left empty keeps its defaults."""

    model_config = ConfigDict(**_STRICT, frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _drop_empty_sections(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        sections = {name for name, field in cls.model_fields.items() if section_fields(field.annotation)}
        return {key: item for key, item in value.items() if item is not None or key not in sections}


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


@pydantic_dataclass(frozen=True, config=_STRICT)
class RewardConfig(RewardSpec):
    """How the reward is made from validation losses; its keys are those of `RewardSpec`."""


@pydantic_dataclass(frozen=True, config=_STRICT)
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


class TrainingConfig(Settings):
    """How long the agent learns and how often it is looked at.

    Attributes:
        decisions: Decisions taken in all environments of all processes together.
        demonstrations: Episodes that a script plays into the replay before the agent acts; updates go on meanwhile.
        demonstrator: What the script plays: `schedules`, known ones (linear, cosine, warm-up-stable-decay) at random
            levels; `neighbours`, a level in each job of a group, another one in each (see
            `llmrl/training/neighbours.py`); `decay_times`, the default level with a decay that begins at another time
            in each job of a group (see `llmrl/training/decay_times.py`).
        checkpoint_period_episodes: Episodes between checkpoints.
        evaluation_period_episodes: Episodes between evaluations of the greedy policy; 0 evaluates at the end only.
        evaluation_episodes: Episodes of one evaluation.
        process_timeout_seconds: Where several processes learn together, how long they wait for one that does not come;
            longer than an evaluation takes, for which the others wait. One that is gone is noticed at once.
        holds_on: Jobs on which the policy holds when it steers real ones: where validation tasks say that it does harm.
            "classification", or "larger_models" than the default level was measured on, 3.5 million parameters.
            Training and its evaluation do not look at it.
    """

    decisions: int = Field(default=20_000, ge=0)
    demonstrations: int = Field(default=0, ge=0)
    demonstrator: Literal["schedules", "neighbours", "decay_times"] = "schedules"
    holds_on: tuple[HoldsOn, ...] = ()
    checkpoint_period_episodes: int = Field(default=20, ge=1)
    evaluation_period_episodes: int = Field(default=50, ge=0)
    evaluation_episodes: int = Field(default=8, ge=1)
    process_timeout_seconds: Positive = 7_200.0


class TrackingConfig(Settings):
    """Weights & Biases. Offline, the default, needs no account; `wandb sync DIR` uploads such a run later.

    Attributes:
        wandb: offline, online or disabled. Not given: the environment variable WANDB_MODE, else offline.
        project: Project that the run belongs to.
        group: Experiment that several runs belong to; not given: the name of the run directory.
        tags: Labels to filter by.
        name: Shown in the list of runs; not given: the name of the run directory.
        trackers: Further trackers, by accelerate's names; each needs its own package.
    """

    wandb: WandbMode | None = None
    project: str = Field(default="llmrl", min_length=1)
    group: str | None = Field(default=None, min_length=1)
    tags: tuple[str, ...] = ()
    name: str | None = Field(default=None, min_length=1)
    trackers: tuple[TrackerName, ...] = ()


class TrainConfig(Settings):
    """`llmrl train`: learn a policy.

    Attributes:
        seed: Every random number of the run follows from it.
        env: Where the agent learns.
        agent: Who learns.
        training: How long.
        tracking: Weights & Biases.
    """

    seed: int = Field(default=0, ge=0)
    env: EnvConfig
    agent: AgentConfig = Field(default_factory=lambda: AgentConfig.model_validate({}))
    training: TrainingConfig = TrainingConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _check_groups_of_demonstrators(self) -> TrainConfig:
        name = self.training.demonstrator
        can_rise = action_table(self.env.actions).rise is not None
        size = {"neighbours": 7, "decay_times": 10 if can_rise else 6}.get(name)
        if size is not None and (self.env.groups != size or self.env.population != size):
            what = "level" if name == "neighbours" else "time"
            raise ValueError(
                f"training.demonstrator {name} needs env.population {size} and env.groups {size}: a job for each {what}"
            )
        if name != "decay_times":
            return self
        if UpdateChoice.COOLDOWN not in {action.choice for action in action_table(self.env.actions).actions}:
            wanted, got = "env.actions with a cooldown, such as decay", self.env.actions
        elif self.env.schedule.base not in ("constant", *WSD_DECAY_FRACTIONS):
            wanted, got = "an env.schedule.base that stays at its peak: constant, wsd, wsd_40", self.env.schedule.base
        else:
            return self
        raise ValueError(f"training.demonstrator decay_times needs {wanted}; got {got}")

    @model_validator(mode="after")
    def _check_that_something_is_learned(self) -> TrainConfig:
        if not self.training.decisions and not self.agent.pretrain_updates:
            raise ValueError("training.decisions=0 learns from logs alone and needs agent.pretrain_updates above 0")
        return self


class FinetuneConfig(Settings):
    """`llmrl finetune`: one fine-tuning job, steered by a policy or a named schedule.

    Attributes:
        seed: Data order, dropout and every other random number of the job.
        task: The job.
        learning_rate: Rate that the job is given, right or wrong; not given: the task's.
        schedule: The base that the level multiplies, and where the level starts; not given: what the policy was
            trained with.
        device: Where the job runs; `auto` is a GPU when there is one.
        save_model: Write the fine-tuned model (or adapter) to the run directory.
        keeps_best: Keep the best state, three times the trained weights in the host's memory, for rollbacks and to go
            back to when the validation loss turns; without, a job whose loss turns only trains at a lower rate.
        checkpoint_period_decisions: Decisions between checkpoints for `--resume`; 0 writes none. A job takes about 45
            decisions. The newest two checkpoints are kept, each of up to six times the trained weights (with their
            moments, and the best state for a rollback).
        tracking: Weights & Biases.
    """

    seed: int = Field(default=0, ge=0)
    task: FineTuningTask
    learning_rate: Positive | None = None
    schedule: ScheduleConfig | None = None
    device: Device = "auto"
    save_model: bool = True
    keeps_best: bool = True
    checkpoint_period_decisions: int = Field(default=5, ge=0)
    tracking: TrackingConfig = TrackingConfig()


class CompareConfig(Settings):
    """`llmrl compare`: methods x tasks x starting rates x seeds, scored against a sweep.

    Attributes:
        tasks: The jobs.
        stress_tasks: Further jobs with bad batches, label noise or little data, started from their own rate and
            reported apart.
        methods: What is compared; `policy` is the one of `--policy`.
        learning_rate_factors: Starting rates, as factors on each task's default rate.
        tuned: Start every method from the best rate of the sweep as well.
        seeds: A list of seeds, or how many (0, 1, ..).
        oracle_factors: Rates, as factors on the default, of the sweep of linear-to-zero runs that scores 1.
        schedule: The base that the level multiplies, and where the level starts; not given: what the policy was
            trained with.
        device: Where the jobs run; `auto` is a GPU when there is one.
        workers: Processes that share the runs.
        tracking: Weights & Biases.
    """

    tasks: tuple[FineTuningTask, ...] = Field(min_length=1)
    stress_tasks: tuple[FineTuningTask, ...] = ()
    methods: tuple[str, ...] = Field(default=("policy", "hold", "constant", "linear", "cosine"), min_length=1)
    learning_rate_factors: tuple[Positive, ...] = Field(
        default=(1 / 30, 0.1, 1 / 3, 1.0, 3.0, 10.0, 30.0), min_length=1
    )
    tuned: bool = True
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0, 1, 2), min_length=1)
    oracle_factors: tuple[Positive, ...] = Field(default=(0.1, 0.3, 1.0, 3.0, 10.0), min_length=1)
    schedule: ScheduleConfig | None = None
    device: Device = "auto"
    workers: int = Field(default=1, ge=1)
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("seeds", mode="before")
    @classmethod
    def _count_seeds(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            return tuple(range(value))
        return value

    @field_validator("methods")
    @classmethod
    def _check_methods(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in value if name not in METHOD_NAMES and not _is_policy_path(name)]
        if not unknown:
            return value
        nearest = {name: difflib.get_close_matches(name, METHOD_NAMES, n=1) for name in unknown}
        hints = "".join(f"; did you mean {close[0]!r}?" for close in nearest.values() if close)
        raise UserError(
            f"unknown method{'s' if len(unknown) > 1 else ''} {', '.join(map(repr, unknown))}{hints}",
            expected=f"{', '.join(METHOD_NAMES)}, or a policy's folder, Hub id or artifact",
            got=", ".join(map(repr, value)),
            where="methods",
        )

    @field_validator("methods", "seeds", "learning_rate_factors", "oracle_factors")
    @classmethod
    def _refuse_repeats(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        repeated = sorted({item for item in value if value.count(item) > 1})
        if repeated:
            raise ValueError(f"expected every entry once, got {', '.join(map(repr, repeated))} more than once")
        return value

    @property
    def all_tasks(self) -> tuple[FineTuningTask, ...]:
        """The tasks, those of `stress_tasks` behind the others; results count them so."""
        return self.tasks + self.stress_tasks

    @model_validator(mode="after")
    def _check_names(self) -> CompareConfig:
        names = [task.name for task in self.all_tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"expected tasks of different names, got {', '.join(names)}")
        return self


ConfigKind: TypeAlias = Literal["train", "finetune", "compare"]
CONFIG_MODELS: dict[ConfigKind, type[Settings]] = {
    "train": TrainConfig,
    "finetune": FinetuneConfig,
    "compare": CompareConfig,
}
