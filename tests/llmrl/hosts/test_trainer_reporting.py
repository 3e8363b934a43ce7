"""Where the numbers of a decision go: W&B, TensorBoard, and what the Trainer itself keeps."""

import json
import subprocess
import sys

import pytest
import wandb
from transformers import TrainerCallback

from llmrl import ScheduleCallback


def read_history(folder):
    """Rows of an offline run, through W&B's own reader."""
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    records = [json.loads(line) for line in lines]
    return [record["history"]["item"] for record in records if record["type"] == "history"]


@pytest.fixture
def offline(tmp_path):
    """An offline run, which the Trainer's integration uses."""
    run = wandb.init(mode="offline", dir=str(tmp_path), project="tests", settings=wandb.Settings(silent=True))
    yield tmp_path
    run.finish()


def test_wandb_has_every_decision_against_the_global_step(make_trainer, offline):
    callback = ScheduleCallback("hold")
    trainer = make_trainer([callback], report_to=["wandb"])
    trainer.train()
    wandb.finish()
    rows = read_history(offline)
    decisions = [row for row in rows if "llmrl/learning_rate" in row]
    assert [row["train/global_step"] for row in decisions] == [record.step for record in callback.controller.records]
    for row, record in zip(decisions, callback.controller.records, strict=True):
        assert row["llmrl/learning_rate"] == pytest.approx(record.learning_rate)
        assert row["llmrl/level"] == pytest.approx(0.0025)
    logged = {row["train/global_step"]: row["train/learning_rate"] for row in rows if "train/learning_rate" in row}
    assert logged[24] == pytest.approx(decisions[-1]["llmrl/learning_rate"])
    assert not any(name.startswith("train/llmrl") for row in rows for name in row)
    assert any("llmrl/decisions" in name for row in rows for name in row)
    assert any("llmrl/schedule" in name for row in rows for name in row)
    assert (offline / "out" / "llmrl-schedule.png").stat().st_size > 1000


def test_other_integrations_are_told_as_the_trainer_tells_them(make_trainer):
    class Told(TrainerCallback):
        rows: list

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.rows.append(dict(logs))

    class Outside(Told):
        pass

    Told.__module__ = "transformers.integrations.something"
    inside, outside = Told(), Outside()
    inside.rows, outside.rows = [], []
    trainer = make_trainer([ScheduleCallback("hold"), inside, outside])
    trainer.train()
    levels = [row["llmrl/level"] for row in inside.rows if "llmrl/level" in row]
    assert levels == pytest.approx([0.0025] * 8)
    assert not any("llmrl/level" in row for row in outside.rows)
    assert any("loss" in row for row in outside.rows)


def test_tensorboard_has_the_series(make_trainer, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    callback = ScheduleCallback("hold")
    make_trainer([callback], report_to=["tensorboard"]).train()
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    (name,) = [tag for tag in events.Tags()["scalars"] if tag.endswith("llmrl/learning_rate")]
    found = {event.step: event.value for event in events.Scalars(name)}
    records = callback.controller.records
    assert list(found) == [record.step for record in records]
    assert list(found.values()) == pytest.approx([record.learning_rate for record in records])
