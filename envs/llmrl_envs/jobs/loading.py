"""Jobs ready to run: tasks with their model and data loaded once and shared by every episode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmrl_envs.errors import UserError
from llmrl_envs.interface.job_scale import NOT_A_CLASSIFIER, label_nats
from llmrl_envs.interface.statistics import TuningMode
from llmrl_envs.jobs.data import TaskData, load_task_data
from llmrl_envs.jobs.models import LoadedModel, check_length, load_model, load_tokenizer
from llmrl_envs.jobs.splits import fixed_subset
from llmrl_envs.jobs.task import FineTuningTask

_Value = TypeVar("_Value")

# What decides which weights are loaded and which examples are cut; budget and rate do not.
_MODEL_KEYS = ("model", "objective", "mode", "lora")
_DATA_KEYS = ("model", "objective", "data", "max_length", "num_labels", "batch_size")


@dataclass
class Job:
    """A task with its model and data.

    Attributes:
        task: The task.
        loaded: The model, its tokenizer and the parameters that are trained.
        data: The tokenized splits.
        device: Where the model is.
        initial: The trained parameters as loaded, to which every session returns.
    """

    task: FineTuningTask
    loaded: LoadedModel
    data: TaskData
    device: torch.device
    initial: dict[str, Tensor]
    _subsets: dict[str, tuple[NDArray[np.int64], ...]] = field(default_factory=dict)

    @property
    def mode(self) -> TuningMode:
        """What the job trains."""
        return TuningMode.LORA if self.task.mode == "lora" else TuningMode.FULL

    @property
    def label_nats(self) -> float:
        """Nats in the label of an example, which say what a level means; infinity unless the job classifies."""
        return NOT_A_CLASSIFIER if self.data.num_labels is None else label_nats(self.data.num_labels)

    @torch.no_grad()
    def restore_initial_weights(self) -> None:
        """Copies the loaded weights back into the model."""
        for name, parameter in self.loaded.trainable.items():
            parameter.copy_(self.initial[name])
            parameter.grad = None

    def subset(self, split: str) -> tuple[NDArray[np.int64], ...]:
        """Index arrays of the evaluation batches of the fixed subset of "validation" or "test".

        The subset is the same for every seed; examples of similar length share a batch.
        """
        if split not in self._subsets:
            lengths = getattr(self.data, split).num_tokens
            most = {"validation": self.task.validation_examples, "test": self.task.test_examples}[split]
            chosen = fixed_subset(len(lengths), most)
            order = chosen[np.argsort(lengths[chosen], kind="stable")]
            size = self.task.evaluation_batch_size
            self._subsets[split] = tuple(order[start : start + size] for start in range(0, len(order), size))
        return self._subsets[split]


class JobLibrary:
    """Loads each model and each dataset once.

    Args:
        device: "auto" (CUDA when there is one), or a torch device name.
    """

    def __init__(self, device: str = "auto") -> None:
        self.device = resolve_device(device)
        self._models: dict[str, tuple[LoadedModel, dict[str, Tensor]]] = {}
        self._data: dict[str, TaskData] = {}
        self._tokenizers: dict[str, Any] = {}
        self.curves: dict[str, tuple[float, ...]] = {}

    def job(self, task: FineTuningTask) -> Job:
        """The task's job; its model is shared with every job of the same model and mode.

        Raises:
            UserError: Model or data cannot be loaded or do not fit the task.
        """
        data_key = task.model_dump_json(include=set(_DATA_KEYS))
        tokenizer = _once(self._tokenizers, task.model, lambda: load_tokenizer(task.model))
        data = _once(self._data, data_key, lambda: load_task_data(task, tokenizer))
        model_key = task.model_dump_json(include=set(_MODEL_KEYS)) + str(data.num_labels)
        loaded, initial = _once(self._models, model_key, lambda: self._load(task, data.num_labels, tokenizer))
        check_length(loaded.model.config, task)
        return Job(task, loaded, data, self.device, initial)

    def _load(
        self, task: FineTuningTask, num_labels: int | None, tokenizer: Any
    ) -> tuple[LoadedModel, dict[str, Tensor]]:
        loaded = load_model(task, num_labels=num_labels, device=self.device, tokenizer=tokenizer)
        return loaded, {name: parameter.detach().clone() for name, parameter in loaded.trainable.items()}


def _once(cache: dict[str, _Value], key: str, make: Callable[[], _Value]) -> _Value:
    if key not in cache:
        cache[key] = make()
    return cache[key]


def resolve_device(name: str) -> torch.device:
    """The device that a name means; "auto" is CUDA when there is one, otherwise the CPU.

    Raises:
        UserError: The device does not exist here.
    """
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            "the device cannot be used", expected="auto, cpu, cuda, cuda:0, ...", got=name, where="device"
        ) from error
    return device
