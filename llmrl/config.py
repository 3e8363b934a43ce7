"""What a configuration file may say: one model per command (`train`, `finetune`, `compare`).

Files are YAML, read by `llmrl.config_loading.load_config`, which also applies `key.sub=value` overrides and reports
every mistake at once. Models are frozen and refuse unknown keys. Nothing here imports torch or transformers.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from llmrl_envs.jobs.task import FineTuningTask, TaskDistribution
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

FINE_TUNING_ID = "llmrl/FineTuning-v0"
NOISY_QUADRATIC_ID = "llmrl/NoisyQuadratic-v0"

Device: TypeAlias = Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]
WandbMode: TypeAlias = Literal["offline", "online", "disabled"]
NonNegative: TypeAlias = Annotated[float, Field(ge=0.0)]
Positive: TypeAlias = Annotated[float, Field(gt=0.0)]


class Settings(BaseModel):
    """Base of every section: frozen, no unknown keys, finite numbers; a section left empty keeps its defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _drop_empty_sections(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        sections = {
            name
            for name, field in cls.model_fields.items()
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        }
        return {key: item for key, item in value.items() if item is not None or key not in sections}


class ObservationConfig(Settings):
    """What the policy sees.

    Attributes:
        stack: Decisions that are stacked into one observation, the newest first.
        feature_dropout: Probability that an episode hides the features that some hosts cannot supply, so that the
            policy copes without them.
    """

    stack: int = Field(default=3, ge=1, le=16)
    feature_dropout: float = Field(default=0.1, ge=0.0, le=1.0)


class RewardConfig(Settings):
    """How the reward is made from validation losses; see `llmrl_envs.interface.reward.RewardSpec`.

    Attributes:
        average_intervals: Time constant, in decision intervals, of the average of the weights that is measured;
            0 measures the deployed weights.
        baseline: `reference` subtracts the drop of the linear-to-zero run over the same steps.
        switch_cost: Subtracted when an action changes the level or a toggle.
        rollback_cost: Subtracted when a rollback is carried out.
        time_cost: Subtracted per decision in proportion to its share of the budget.
    """

    average_intervals: float = Field(default=0.0, ge=0.0, le=1.0)
    baseline: Literal["none", "reference"] = "none"
    switch_cost: NonNegative = 0.0
    rollback_cost: NonNegative = 0.0
    time_cost: NonNegative = 0.0


class ScheduleConfig(Settings):
    """The base that the level multiplies, and where the level starts.

    Attributes:
        base: Shape over the budget, 1 at its peak.
        warmup_fraction: Share of the budget over which the base rises from zero.
        start: `default` starts at the action table's default level whatever rate the job was given; `given` at the
            level which that rate means, for a job whose rate is known to be tuned.
    """

    base: Literal["linear", "constant", "cosine"] = "linear"
    warmup_fraction: float = Field(default=0.05, ge=0.0, lt=1.0)
    start: Literal["default", "given"] = "default"


class EnvConfig(Settings):
    """Where the agent learns.

    Attributes:
        id: A Gymnasium id. Ids of this package and of `gymnasium` itself need no import; others may be written
            `module:id`.
        population: Environments that are stepped together; `auto` takes as many as the device holds.
        tasks: The jobs of `llmrl/FineTuning-v0`; required there and refused elsewhere.
        actions: Name of the action table: moves, moves_only, levels, factors.
        observation: What the policy sees.
        reward: How the reward is made.
        schedule: What an action changes.
        device: Where the jobs run; `auto` is a GPU when there is one.
        kwargs: Passed to the constructor of any other environment.
    """

    id: str = Field(default=FINE_TUNING_ID, min_length=1)
    population: Annotated[int, Field(ge=1)] | Literal["auto"] = 1
    tasks: TaskDistribution | None = None
    actions: str = Field(default="moves", min_length=1)
    observation: ObservationConfig = ObservationConfig()
    reward: RewardConfig = RewardConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    device: Device = "auto"
    kwargs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_what_the_environment_reads(self) -> EnvConfig:
        if self.id == FINE_TUNING_ID and self.tasks is None:
            raise ValueError(f"{FINE_TUNING_ID} needs env.tasks.tasks: a list of at least one task")
        if self.id == FINE_TUNING_ID and self.kwargs:
            raise ValueError(f"env.kwargs is for other environments; {FINE_TUNING_ID} is configured by env itself")
        if self.id != FINE_TUNING_ID and self.tasks is not None:
            raise ValueError(f"env.tasks belongs to {FINE_TUNING_ID}; {self.id} does not read it")
        return self


class AgentConfig(Settings):
    """Who learns: the name of the agent and, beside it, the agent's own flags (`agent.n_step=5`).

    Attributes:
        name: dqn, tabular (Q-learning on a table), or reinforce (with a value baseline).
        preset: Defaults of the flags: `default`, or `nature`, the DQN exactly as first published.
    """

    model_config = ConfigDict(extra="allow")

    name: Literal["dqn", "tabular", "reinforce"] = "dqn"
    preset: Literal["default", "nature"] = "default"


class TrainingConfig(Settings):
    """How long the agent learns and how often it is looked at.

    Attributes:
        decisions: Decisions taken in all environments together.
        demonstrations: Episodes of known schedules put into the replay before learning starts.
        checkpoint_period_episodes: Episodes between checkpoints.
        evaluation_period_episodes: Episodes between evaluations of the greedy policy; 0 evaluates at the end only.
        evaluation_episodes: Episodes of one evaluation.
    """

    decisions: int = Field(default=20_000, ge=1)
    demonstrations: int = Field(default=0, ge=0)
    checkpoint_period_episodes: int = Field(default=20, ge=1)
    evaluation_period_episodes: int = Field(default=50, ge=0)
    evaluation_episodes: int = Field(default=8, ge=1)


class TrackingConfig(Settings):
    """Weights & Biases. Offline, the default, needs no account; `wandb sync DIR` uploads such a run later.

    Attributes:
        wandb: offline, online or disabled. Not given: the environment variable WANDB_MODE, else offline.
        project: Project that the run belongs to.
        group: Experiment that several runs belong to; not given: the name of the run directory.
        tags: Labels to filter by.
        name: Shown in the list of runs; not given: the name of the run directory.
    """

    wandb: WandbMode | None = None
    project: str = Field(default="llmrl", min_length=1)
    group: str | None = Field(default=None, min_length=1)
    tags: tuple[str, ...] = ()
    name: str | None = Field(default=None, min_length=1)


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
    agent: AgentConfig = AgentConfig()
    training: TrainingConfig = TrainingConfig()
    tracking: TrackingConfig = TrackingConfig()


class FinetuneConfig(Settings):
    """`llmrl finetune`: one fine-tuning job, steered by a policy or a named schedule.

    Attributes:
        seed: Data order, dropout and every other random number of the job.
        task: The job.
        learning_rate: Rate that the job is given, right or wrong; not given: the task's.
        schedule: The base that the level multiplies, and where the level starts.
        device: Where the job runs; `auto` is a GPU when there is one.
        save_model: Write the fine-tuned model (or adapter) to the run directory.
        tracking: Weights & Biases.
    """

    seed: int = Field(default=0, ge=0)
    task: FineTuningTask
    learning_rate: Positive | None = None
    schedule: ScheduleConfig = ScheduleConfig()
    device: Device = "auto"
    save_model: bool = True
    tracking: TrackingConfig = TrackingConfig()


class CompareConfig(Settings):
    """`llmrl compare`: methods x tasks x starting rates x seeds, scored against a sweep.

    Attributes:
        tasks: The jobs.
        methods: What is compared; `policy` is the one of `--policy`.
        learning_rate_factors: Starting rates, as factors on each task's default rate.
        seeds: A list of seeds, or how many (0, 1, ..).
        oracle_factors: Rates, as factors on the default, of the sweep of linear-to-zero runs that scores 1.
        schedule: The base that a policy's level multiplies, and where the level starts.
        device: Where the jobs run; `auto` is a GPU when there is one.
        workers: Processes that share the runs.
        tracking: Weights & Biases.
    """

    tasks: tuple[FineTuningTask, ...] = Field(min_length=1)
    methods: tuple[str, ...] = Field(default=("policy", "hold", "constant", "linear", "cosine"), min_length=1)
    learning_rate_factors: tuple[Positive, ...] = Field(default=(1 / 30, 1 / 3, 1.0, 3.0, 30.0), min_length=1)
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0, 1, 2), min_length=1)
    oracle_factors: tuple[Positive, ...] = Field(default=(0.1, 0.3, 1.0, 3.0, 10.0), min_length=1)
    schedule: ScheduleConfig = ScheduleConfig()
    device: Device = "auto"
    workers: int = Field(default=1, ge=1)
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("seeds", mode="before")
    @classmethod
    def _count_seeds(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            return tuple(range(value))
        return value

    @field_validator("methods", "seeds", "learning_rate_factors", "oracle_factors")
    @classmethod
    def _refuse_repeats(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        repeated = sorted({item for item in value if value.count(item) > 1})
        if repeated:
            raise ValueError(f"expected every entry once, got {', '.join(map(repr, repeated))} more than once")
        return value

    @model_validator(mode="after")
    def _check_names(self) -> CompareConfig:
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"expected tasks of different names, got {', '.join(names)}")
        return self


ConfigKind: TypeAlias = Literal["train", "finetune", "compare"]
CONFIG_MODELS: dict[ConfigKind, type[Settings]] = {
    "train": TrainConfig,
    "finetune": FinetuneConfig,
    "compare": CompareConfig,
}
