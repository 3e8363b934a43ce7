"""Real models and data, ten times off both ways: the policy ends lower than linear decay, and W&B has its decisions.

    LLMRL_SHARED=DIRECTORY python -m pytest -m slow tests/scripts/test_real_models.py

The directory holds `models/stories3m-hf`, `models/minilm-l6-v8k-hf`, `data/instruct_1100` and `data/ag_news`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import wandb
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from llmrl import ScheduleCallback

SHARED = Path(os.environ["LLMRL_SHARED"])
STEPS = 60

pytestmark = pytest.mark.slow


def rows(name, split, count):
    lines = (SHARED / "data" / name / f"{split}.jsonl").read_text().splitlines()[:count]
    return [json.loads(line) for line in lines]


def instructions(learning_rate, folder, callbacks, report_to):
    """A 3M Llama that learns instructions with LoRA, in an SFTTrainer."""

    def examples(split, count):
        found = rows("instruct_1100", split, count)
        return Dataset.from_list([
            {"prompt": f"{row['instruction']}\n{row['input']}\n", "completion": row["output"]} for row in found
        ])  # fmt: skip

    path = str(SHARED / "models" / "stories3m-hf")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        args=SFTConfig(
            folder, max_steps=STEPS, per_device_train_batch_size=8, learning_rate=learning_rate, max_length=128,
            logging_steps=10, save_strategy="no", report_to=report_to, bf16=False, gradient_checkpointing=False,
            disable_tqdm=True, seed=0,
        ),
        train_dataset=examples("train", 872),
        eval_dataset=examples("test", 100),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=callbacks,
    )  # fmt: skip


def news(learning_rate, folder, callbacks, report_to):
    """A six-layer MiniLM that sorts news, in a Trainer."""
    path = str(SHARED / "models" / "minilm-l6-v8k-hf")
    tokenizer = AutoTokenizer.from_pretrained(path)

    def examples(split, count):
        found = rows("ag_news", split, count)
        texts = tokenizer([row["text"] for row in found], truncation=True, max_length=64)
        labels = [row["label"] for row in found]
        classes = sorted({row["label"] for row in rows("ag_news", "train", 6000)})
        ids = texts["input_ids"]
        return [
            {"input_ids": ids[i], "attention_mask": texts["attention_mask"][i], "labels": classes.index(labels[i])}
            for i in range(len(ids))
        ]

    return Trainer(
        model=AutoModelForSequenceClassification.from_pretrained(path, num_labels=4, dtype=torch.float32),
        args=TrainingArguments(
            folder, max_steps=STEPS, per_device_train_batch_size=16, learning_rate=learning_rate, logging_steps=10,
            save_strategy="no", report_to=report_to, disable_tqdm=True, seed=0,
        ),
        train_dataset=examples("train", 6000),
        eval_dataset=examples("test", 300),
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=callbacks,
    )  # fmt: skip


def test_loss(make, learning_rate, folder, callbacks, report_to):
    set_seed(0)
    trainer = make(learning_rate, str(folder / "job"), callbacks, report_to)
    trainer.train()
    found = trainer.evaluate()["eval_loss"]
    if "wandb" in report_to:
        wandb.finish()
    return found


test_loss.__test__ = False


def read_run(folder):
    """Configuration aside, what an offline run holds, through W&B's own reader."""
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    return list(
        map(json.loads, subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines())
    )


@pytest.mark.parametrize("factor", [0.1, 10.0])
@pytest.mark.parametrize(("make", "right"), [(instructions, 3e-3), (news, 1e-3)])
def test_a_job_is_rescued_from_a_wrong_rate(make, right, factor, tmp_path, monkeypatch, record_property):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    wandb.teardown()  # which remembers the directory of the test before
    linear = test_loss(make, factor * right, tmp_path, [], [])
    steered = test_loss(make, factor * right, tmp_path, [ScheduleCallback("hold")], ["wandb"])
    print(f"{make.__name__} from {factor * right:.0e}: linear {linear:.3f}, hold {steered:.3f}")
    record_property("losses", (linear, steered))
    assert steered < linear
    history = [record["history"]["item"] for record in read_run(tmp_path) if record["type"] == "history"]
    decisions = [row for row in history if "llmrl/learning_rate" in row]
    assert decisions[-1]["train/global_step"] == STEPS
    rates = {row["llmrl/learning_rate"] for row in decisions}
    assert len(rates) > 5
    assert any("llmrl/decisions" in name for row in history for name in row)
