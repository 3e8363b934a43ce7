"""The data of a task, ready to train on: three separate splits of tokenised examples.

data = load_task_data(task, tokenizer)
batch = data.train.collate(batch_indices(len(data.train), task.batch_size, seed, step))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from llmrl_envs.errors import UserError
from llmrl_envs.jobs.batches import IGNORED, TokenizedSplit, batch_indices
from llmrl_envs.jobs.data_files import Table
from llmrl_envs.jobs.data_sources import SPLIT_NAMES, load_tables
from llmrl_envs.jobs.examples import (
    ClassificationExample,
    label_column,
    read_examples,
)
from llmrl_envs.jobs.objectives import (
    resolve_labels,
    tokenize_classification,
    tokenize_instructions,
    tokenize_texts,
)
from llmrl_envs.jobs.splits import complete_splits, fixed_subset, noisy_answers
from llmrl_envs.jobs.task import FineTuningTask

__all__ = ["IGNORED", "TaskData", "TokenizedSplit", "batch_indices", "load_task_data"]


@dataclass(frozen=True)
class TaskData:
    """The splits of a task.

    Attributes:
        train: What batches are drawn from.
        validation: What the reward is measured on.
        test: For reporting only.
        num_labels: Number of classes; None where the objective has none.
        label_names: Name of each class; the number itself where the data has no names.
    """

    train: TokenizedSplit
    validation: TokenizedSplit
    test: TokenizedSplit
    num_labels: int | None = None
    label_names: tuple[str, ...] = ()


def load_task_data(task: FineTuningTask, tokenizer: Any) -> TaskData:
    """Reads, cuts and tokenises the data of a task.

    Splits that are not given are cut from the training source, the same way every time (see `splits.py`). Every split
    has all its examples, up to the limits of `data`; evaluation on fewer is the session's business.

    Raises:
        UserError: The data is missing or malformed, or the training split is smaller than a batch.
    """
    tables = load_tables(task.data)
    given = {split: read_examples(table, task.objective, task.data.fields) for split, table in tables.items()}
    splits = complete_splits(given, task.data.split_fractions)
    if task.objective == "classification":
        names = _stated_names(tables["train"], task)
        classes, label_names = resolve_labels(
            cast(dict[str, list[ClassificationExample]], splits), names, task.num_labels
        )
    else:
        classes, label_names = {}, ()
    tokenized = {
        split: _tokenize(task, tokenizer, splits[split], classes.get(split, []), is_train=split == "train")
        for split in SPLIT_NAMES
    }
    if len(tokenized["train"]) < task.batch_size:
        raise UserError(
            "training split is smaller than a batch",
            where=tables["train"].source,
            expected=f"at least {task.batch_size} examples of up to {task.max_length} tokens",
            got=len(tokenized["train"]),
        )
    return TaskData(**tokenized, num_labels=len(label_names) or None, label_names=label_names)


def _stated_names(table: Table, task: FineTuningTask) -> tuple[str, ...] | None:
    column = label_column(table, task.data.fields)
    return None if column is None else table.class_names.get(column)


def _tokenize(
    task: FineTuningTask, tokenizer: Any, examples: list[Any], classes: list[int], *, is_train: bool
) -> TokenizedSplit:
    """Tokenises the examples that the task keeps of a split; the limit and the noise of training are for it alone."""
    limits = (task.data.max_examples, task.data.max_train_examples if is_train else None)
    most = min((limit for limit in limits if limit is not None), default=len(examples))
    if task.objective == "language_modeling":
        return tokenize_texts(examples[:most], tokenizer, task.max_length)
    chosen = fixed_subset(len(examples), most)
    answers = chosen[noisy_answers(len(chosen), task.data.label_noise)] if is_train else chosen
    kept = [examples[index] for index in chosen]
    if task.objective == "instruction":
        completions = [examples[index].completion for index in answers]
        kept = [example._replace(completion=text) for example, text in zip(kept, completions, strict=True)]
        return tokenize_instructions(kept, tokenizer, task.max_length)
    return tokenize_classification(kept, [classes[index] for index in answers], tokenizer, task.max_length)
