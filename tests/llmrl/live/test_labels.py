"""How much a classifier's label holds, and that a level means the same in every host."""

import math

import numpy as np
import pytest
import torch
from llmrl_envs.builtin import builtin_model_path
from llmrl_envs.fine_tuning import FineTuningEnv
from llmrl_envs.interface.job_scale import FULL_LABEL_NATS
from llmrl_envs.jobs.task import FineTuningTask, SampledTask
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForTokenClassification,
    Trainer,
    TrainingArguments,
)

from llmrl import ScheduleCallback, ScheduleController
from llmrl.live.labels import model_label_nats

TASK = {
    "data": "builtin:kinds", "objective": "classification", "steps": 8, "batch_size": 2, "max_length": 32,
    "validation_examples": 4, "test_examples": 4,
}  # fmt: skip


def classifier(**changes):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(builtin_model_path(), **changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_labels": 2}, math.log(2)),
        ({"num_labels": 20}, math.log(20)),
        ({"num_labels": 1}, math.log(2)),
        ({"num_labels": 5, "problem_type": "regression"}, math.log(2)),
        ({"num_labels": 5, "problem_type": "multi_label_classification"}, 5 * math.log(2)),
    ],
    ids=str,
)
def test_a_label_holds_the_logarithm_of_the_classes(changes, expected):
    assert model_label_nats(classifier(**changes)) == pytest.approx(expected)


def test_a_classifier_is_found_within_wrappers():
    adapted = get_peft_model(classifier(num_labels=4), LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"]))
    assert model_label_nats(torch.nn.ModuleList([adapted])) == math.log(4)


def test_models_that_answer_for_tokens_count_as_language_models():
    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    for model in (AutoModelForCausalLM.from_pretrained(builtin_model_path()), BertForTokenClassification(config)):
        assert model_label_nats(model) == math.inf


def test_a_level_of_a_classifier_means_the_same_in_environment_loop_and_trainer(tmp_path):
    task = FineTuningTask.model_validate(TASK)
    env = FineTuningEnv({"tasks": [task]})
    env.reset(options={"job": SampledTask(task, 0, 1e-5, 3)})
    job = env.unwrapped._library.job(task)
    expected = math.sqrt(math.log(job.data.num_labels) / FULL_LABEL_NATS)
    assert expected < 1.0
    schedule = env.unwrapped._steering.schedule
    assert schedule.job_scale == pytest.approx(expected)
    first_rate = float(schedule.learning_rate(np.array([0]))[0])

    job.restore_initial_weights()
    controller = ScheduleController.from_pretrained("hold")
    optimizer = torch.optim.AdamW(job.loaded.model.parameters(), lr=1e-5)
    controller.attach(job.loaded.model, optimizer, total_steps=8)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(first_rate, rel=1e-6)

    callback = ScheduleCallback("hold")
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, max_steps=8,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    row = {name: value[0] for name, value in job.data.train.collate([0]).items()}
    Trainer(model=job.loaded.model, args=arguments, train_dataset=[row] * 12, callbacks=[callback]).train()
    assert callback.controller.job.loop.schedule.job_scale == pytest.approx(expected)
