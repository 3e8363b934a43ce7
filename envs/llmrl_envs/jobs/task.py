"""What is fine-tuned: one job (`FineTuningTask`) and a family of jobs to learn from (`TaskDistribution`).

Plain settings, checked when they are made. Nothing here imports torch, so that a configuration is validated in
milliseconds.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Objective = Literal["language_modeling", "instruction", "classification"]
Mode = Literal["full", "lora"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
StepsRange = tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
Share = Annotated[float, Field(gt=0.0, lt=1.0)]
BadBatches = Annotated[float, Field(ge=0.0, lt=1.0)] | tuple[Annotated[int, Field(ge=0)], ...]

FIELD_NAMES: Mapping[str, tuple[str, ...]] = {
    "language_modeling": ("text",),
    "instruction": ("prompt", "completion", "messages"),
    "classification": ("text", "text_pair", "label"),
}
"""What an objective reads from an example: the keys that `DataSpec.fields` may map to columns."""

Number = TypeVar("Number", int, float)
_SETTINGS = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class DataSpec(BaseModel):
    """Where the examples are. A bare string stands for `DataSpec(train=that string)`.

    A source is a file (.json, .jsonl, .csv, .parquet, .txt), a directory of such files named after the splits, a
    directory written by `datasets.save_to_disk`, a Hub id, or `builtin:TOPIC`.

    Attributes:
        train: Source of the training examples. The only one given: it is cut into the three splits.
        validation: Source of the validation examples, which the reward is measured on.
        test: Source of the test examples, for reporting only.
        fields: Role to column, e.g. `{"prompt": "question", "completion": "answer"}`. For an instruction task the value
            may be a template of columns instead, e.g. `"Translate to German: {en}"`. Empty: columns are recognised.
        split_fractions: Shares of train, validation and test where one source is cut; they sum to 1.
        max_examples: At most so many examples of each split, always the same ones, chosen at random; of a text for
            language modelling the first documents. None is all.
        max_train_examples: The same for the training examples alone: little data, judged on full splits.
        label_noise: Share of the training examples that get the label, or the completion, of another training
            example; always the same ones. Validation and test stay clean. Not for language modelling.
    """

    model_config = _SETTINGS

    train: str = Field(min_length=1)
    validation: str | None = Field(default=None, min_length=1)
    test: str | None = Field(default=None, min_length=1)
    fields: dict[str, str] = Field(default_factory=dict)
    split_fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    max_examples: int | None = Field(default=None, ge=1)
    max_train_examples: int | None = Field(default=None, ge=1)
    label_noise: float = Field(default=0.0, ge=0.0, le=1.0)

    @model_validator(mode="before")
    @classmethod
    def _accept_source(cls, value: object) -> object:
        return {"train": value} if isinstance(value, str) else value

    @field_validator("split_fractions")
    @classmethod
    def _check_fractions(cls, value: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(value) <= 0.0 or not math.isclose(sum(value), 1.0, abs_tol=1e-6):
            raise ValueError("expected three positive shares (train, validation, test) that sum to 1")
        return value


class LoraSettings(BaseModel):
    """Low-rank adapters: the update of a weight is `alpha / rank * B @ A`.

    Hu et al. 2021, https://arxiv.org/abs/2106.09685

    Attributes:
        rank: Rank of the update.
        alpha: Scale of the update, divided by `rank`.
        dropout: Dropout on the adapter's input while training.
        target_modules: `"all-linear"`, or the names of the modules to adapt.
    """

    model_config = _SETTINGS

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0.0)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"

    @field_validator("target_modules")
    @classmethod
    def _check_targets(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value:
            raise ValueError("expected 'all-linear' or at least one module name")
        return value


class OptimizerSettings(BaseModel):
    """AdamW and gradient clipping. A bare string stands for `OptimizerSettings(name=that string)`.

    Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101

    Attributes:
        name: The optimizer; AdamW is the one there is.
        betas: Decay of the first and the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay, multiplied by the learning rate.
        max_grad_norm: Global gradient norm above which gradients are scaled down; infinity clips nothing.
    """

    model_config = _SETTINGS

    name: Literal["adamw"] = "adamw"
    betas: tuple[Annotated[float, Field(ge=0.0, lt=1.0)], Annotated[float, Field(ge=0.0, lt=1.0)]] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0.0, allow_inf_nan=False)
    weight_decay: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    max_grad_norm: float = Field(default=1.0, gt=0.0)

    @model_validator(mode="before")
    @classmethod
    def _accept_name(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value


class FineTuningTask(BaseModel):
    """One fine-tuning job, all but its starting rate's factor and its seed.

    Attributes:
        name: What tables and files call it.
        model: Local directory, Hub id, .gguf file, or `builtin`.
        objective: What is learned from an example.
        data: Where the examples are.
        mode: Train every weight, or low-rank adapters.
        lora: Adapter settings, read where `mode` is `lora`.
        steps: Optimizer steps of the job.
        batch_size: Examples of one forward pass.
        gradient_accumulation: Forward passes of one optimizer step.
        max_length: Longest example in tokens; longer ones are cut.
        learning_rate: The job's default learning rate.
        optimizer: Optimizer and clipping.
        bad_batches: Share of the optimizer steps whose batch is spoiled, drawn from the job's seed, or a list of such
            steps, counted from 0: scrambled tokens, or for classification wrong labels. Every method meets the same.
        precision: Number format of the forward pass; `auto` is bf16 on a CUDA device that has it, otherwise fp32.
        validation_examples: Size of the fixed validation subset.
        test_examples: Size of the fixed test subset.
        evaluation_batch_size: Examples of one forward pass in evaluation.
        num_labels: Number of classes; None counts those of the data.
    """

    model_config = _SETTINGS

    name: str = Field(default="task", min_length=1)
    model: str = Field(default="builtin", min_length=1)
    objective: Objective = "language_modeling"
    data: DataSpec
    mode: Mode = "full"
    lora: LoraSettings = LoraSettings()
    steps: int = Field(default=200, ge=1)
    batch_size: int = Field(default=8, ge=1)
    gradient_accumulation: int = Field(default=1, ge=1)
    max_length: int = Field(default=128, ge=2)
    learning_rate: float = Field(default=1e-3, gt=0.0, allow_inf_nan=False)
    optimizer: OptimizerSettings = OptimizerSettings()
    bad_batches: BadBatches = 0.0
    precision: Precision = "auto"
    validation_examples: int = Field(default=64, ge=1)
    test_examples: int = Field(default=512, ge=1)
    evaluation_batch_size: int = Field(default=32, ge=1)
    num_labels: int | None = Field(default=None, ge=2)

    @model_validator(mode="after")
    def _check_objective(self) -> FineTuningTask:
        if self.num_labels is not None and self.objective != "classification":
            raise ValueError(
                f"num_labels belongs to objective 'classification', but the objective is {self.objective!r}"
            )
        if self.data.label_noise and self.objective == "language_modeling":
            raise ValueError("data.label_noise needs labels or completions, and language modelling has neither")
        allowed = FIELD_NAMES[self.objective]
        for name in self.data.fields:
            if name not in allowed:
                close = difflib.get_close_matches(name, allowed, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"data.fields: {self.objective} knows {', '.join(allowed)}, got {name!r}{hint}")
        return self

    def with_steps(self, steps: int) -> FineTuningTask:
        """The same task with another budget of optimizer steps."""
        return FineTuningTask.model_validate({**self._settings(), "steps": steps})

    def with_bad_batches(self, bad_batches: float) -> FineTuningTask:
        """The same task with another share of bad batches."""
        return FineTuningTask.model_validate({**self._settings(), "bad_batches": bad_batches})

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in FineTuningTask.model_fields}


class TaskEntry(FineTuningTask):
    """A task of a distribution: besides the task itself, how often and with which budgets it is drawn.

    Attributes:
        weight: How often it is drawn, in proportion to the other tasks' weights.
        steps_range: Range of its budget, in place of the distribution's.
    """

    weight: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    steps_range: StepsRange | None = None

    @model_validator(mode="before")
    @classmethod
    def _accept_task(cls, value: object) -> object:
        return dict(value) if isinstance(value, FineTuningTask) and not isinstance(value, TaskEntry) else value

    @field_validator("steps_range")
    @classmethod
    def _check_order(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        return _low_end_first(value)


@dataclass(frozen=True)
class SampledTask:
    """One job as drawn from a distribution.

    Attributes:
        task: The task, its `steps` resolved.
        task_index: Place of the task in `TaskDistribution.tasks`.
        learning_rate: The rate that the job is given, right or wrong.
        seed: Seed of the job's data order and dropout.
        start_move: Grid places from the default level at which the job starts.
    """

    task: FineTuningTask
    task_index: int
    learning_rate: float
    seed: int
    start_move: int = 0


class TaskDistribution(BaseModel):
    """A family of jobs: which tasks, from which learning rates, with which budgets and seeds.

    Attributes:
        tasks: The tasks, drawn in proportion to their weights.
        learning_rate_log10_range: Range of log10(given rate / default rate), drawn uniformly.
        default_rate_probability: Share of jobs that are given exactly the default rate.
        steps_range: Range of the budget, both ends included, drawn log-uniformly; None keeps every task's own.
        num_seeds: Number of different seeds, 0 .. num_seeds - 1.
        bad_batches_probability: Share of jobs that meet bad batches, besides those whose task asks for them.
        bad_batches_range: Range of their share of bad batches, drawn log-uniformly.
        start_moves: Grid places from the default level at which jobs start, drawn with equal probability, so that a
            policy learns to come back from wrong levels too; one that stands there twice is drawn twice as often.
    """

    model_config = _SETTINGS

    tasks: tuple[TaskEntry, ...] = Field(min_length=1)
    learning_rate_log10_range: tuple[float, float] = (-1.5, 1.5)
    default_rate_probability: float = Field(default=0.3, ge=0.0, le=1.0)
    steps_range: StepsRange | None = None
    num_seeds: int = Field(default=8, ge=1)
    bad_batches_probability: float = Field(default=0.0, ge=0.0, le=1.0)
    bad_batches_range: tuple[Share, Share] = (0.02, 0.1)
    start_moves: tuple[Annotated[int, Field(ge=-8, le=8)], ...] = Field(default=(0,), min_length=1)

    @field_validator("learning_rate_log10_range", "steps_range", "bad_batches_range")
    @classmethod
    def _check_order(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        return _low_end_first(value)

    def sample(self, rng: np.random.Generator) -> SampledTask:
        """Draws a job.

        Every call takes five numbers from `rng`, whatever is configured, so that switching one range on or off leaves
        the other draws as they were.
        """
        draws = rng.random(5).tolist()
        which, default, rate, steps, seed = draws
        ends = np.cumsum([entry.weight for entry in self.tasks])
        task_index = int(np.searchsorted(ends, which * ends[-1], side="right"))
        entry = self.tasks[task_index]
        low, high = self.learning_rate_log10_range
        factor = 1.0 if default < self.default_rate_probability else 10.0 ** (low + rate * (high - low))
        steps_range = entry.steps_range or self.steps_range
        task = entry.with_steps(log_uniform_integer(steps, *steps_range) if steps_range else entry.steps)
        if self.bad_batches_probability and not task.bad_batches:
            task = task.with_bad_batches(self._bad_batches(draws))
        start_move = self.start_moves[int(_generator_of(draws, 1).integers(len(self.start_moves)))]
        return SampledTask(task, task_index, task.learning_rate * factor, int(seed * self.num_seeds), start_move)

    def _bad_batches(self, draws: Sequence[float]) -> float:
        """The share of bad batches of the job of these draws."""
        chance, place = _generator_of(draws).random(2).tolist()
        low, high = self.bad_batches_range
        return low * math.pow(high / low, place) if chance < self.bad_batches_probability else 0.0


def _generator_of(draws: Sequence[float], *key: int) -> np.random.Generator:
    """A generator that a job's draws seed: what it gives leaves the draws of other jobs as they are."""
    return np.random.default_rng([*(int(draw * 2**53) for draw in draws), *key])


def log_uniform_integer(uniform: float, low: int, high: int) -> int:
    """Maps a uniform number in [0, 1) to a log-uniform integer in low .. high, both ends included."""
    value = int(low * math.pow((high + 1) / low, uniform))
    return min(max(value, low), high)


def _low_end_first(value: tuple[Number, Number] | None) -> tuple[Number, Number] | None:
    if value is not None and value[0] > value[1]:
        raise ValueError(f"expected the low end first, got {value[0]} .. {value[1]}")
    return value
