"""Small jobs of the built-in model in a Trainer."""

import numpy as np
import pytest
import torch
from llmrl_envs.jobs.data import batch_indices
from llmrl_envs.jobs.loading import JobLibrary
from llmrl_envs.jobs.task import FineTuningTask
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from llmrl.policy import PolicyDecision, SchedulePolicy, hold_policy

TASK = {
    "data": "builtin:json", "steps": 24, "batch_size": 2, "max_length": 32,
    "validation_examples": 4, "test_examples": 4,
}  # fmt: skip


class Scripted(SchedulePolicy):
    """Takes a list of actions by name, by the number of the decision, whatever it sees."""

    def __init__(self, actions, settings=None, table="moves"):
        hold = hold_policy(settings, table)
        super().__init__(hold.table, hold.spec, hold.settings, None)
        self.actions = list(actions)
        self.seen = []

    def act(self, observation, mask):
        index = len(self.seen)
        self.seen.append(observation[0].copy())
        name = self.actions[index] if index < len(self.actions) else "hold"
        return PolicyDecision(np.array([self.table.names.index(name)]), np.zeros(mask.shape, np.float32))


class Rows(Dataset):
    """The batches of a session's plan, one example after the other."""

    def __init__(self, task, split, seed=3):
        size = task.batch_size * task.gradient_accumulation
        order = [batch_indices(len(split), size, seed, step) for step in range(task.steps)]
        self.rows = []
        for indices in order:
            batch = split.collate(indices)
            self.rows += [{name: value[i] for name, value in batch.items()} for i in range(len(indices))]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class InOrder(Trainer):
    """Takes the examples in the order in which they come."""

    def _get_train_sampler(self, *arguments):
        return None


@pytest.fixture(scope="session")
def scripted():
    return Scripted


@pytest.fixture(scope="session")
def in_order():
    return InOrder


@pytest.fixture(scope="session")
def task_settings():
    return TASK


@pytest.fixture(scope="session")
def library():
    return JobLibrary("cpu")


@pytest.fixture
def make_trainer(library, tmp_path):
    """Builds a Trainer over the built-in model's job, from its initial weights."""

    def make(callbacks, *, task=None, trainer=InOrder, folder="out", optimizers=(None, None), **arguments):
        job = library.job(FineTuningTask.model_validate({**TASK, **(task or {})}))
        job.restore_initial_weights()
        settings = {
            "per_device_train_batch_size": job.task.batch_size, "max_steps": job.task.steps, "logging_steps": 1,
            "learning_rate": 1e-5, "report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
            "seed": 3, **arguments,
        }  # fmt: skip
        made = trainer(
            model=job.loaded.model,
            args=TrainingArguments(str(tmp_path / folder), **settings),
            train_dataset=Rows(job.task, job.data.train),
            callbacks=callbacks,
            optimizers=optimizers,
            eval_dataset=torch.utils.data.Subset(Rows(job.task, job.data.validation), range(4)),
        )
        made.job = job
        return made

    return make
