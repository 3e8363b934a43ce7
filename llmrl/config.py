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
from llmrl_envs.jobs.task import FineTuningTask
from pydantic import Field, field_validator, model_validator

from llmrl.compare.names import METHOD_NAMES
from llmrl.config_agent import AgentConfig
from llmrl.config_base import Device, Positive, Settings
from llmrl.config_env import EnvConfig, ScheduleConfig
from llmrl.policy_reference import HoldsOn

WandbMode: TypeAlias = Literal["offline", "online", "disabled"]
TrackerName: TypeAlias = Literal["aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio"]


def _is_policy_path(name: str) -> bool:
    return "/" in name or "\\" in name or Path(name).is_dir()


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
        table = action_table(self.env.actions)
        times = (6 if table.rise is None else 10) + (0 if table.lean is None else 3)
        size = {"neighbours": 7, "decay_times": times}.get(name)
        if size is not None and (self.env.groups != size or self.env.population != size):
            what = "level" if name == "neighbours" else "time"
            raise ValueError(
                f"training.demonstrator {name} needs env.population {size} and env.groups {size}: a job for each {what}"
            )
        if name != "decay_times":
            return self
        if UpdateChoice.COOLDOWN not in {action.choice for action in table.actions}:
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
        guard_validates: The guards of steered jobs look at the validation loss, about twelve times a job; without, they
            have the train loss alone, and a steered job costs what a plain one does.
        guard_skips: The guards of steered jobs skip steps whose loss stands out; see `OutlierSteps`.
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
    guard_validates: bool = True
    guard_skips: bool = True
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
