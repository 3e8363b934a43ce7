"""`llmrl finetune` as its user meets it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from llmrl_envs.errors import UserError

from llmrl.cli import main
from llmrl.config import FinetuneConfig
from llmrl.finetune import finetune
from llmrl.policy import hold_policy
from llmrl.run_directory import read_jsonl

TASK: dict[str, Any] = {
    "name": "tiny",
    "data": "builtin:json",
    "steps": 20,
    "batch_size": 4,
    "max_length": 32,
    "validation_examples": 4,
    "test_examples": 16,
}


def make_config(**changes: Any) -> FinetuneConfig:
    task = {**TASK, **changes.pop("task", {})}
    return FinetuneConfig.model_validate({"task": task, "tracking": {"wandb": "disabled"}, **changes})


def test_holding_repairs_a_rate_that_is_far_too_low(tmp_path: Path) -> None:
    config = make_config(task={"steps": 40}, learning_rate=1e-6)
    held = finetune(config=config, output=tmp_path / "hold", policy="hold")
    linear = finetune(config=config, output=tmp_path / "linear", schedule="linear")
    assert held["loss_test"] < held["loss_initial"] - 0.02
    assert held["loss_test"] < linear["loss_test"]
    assert held["loss_initial"] == linear["loss_initial"]


def test_the_run_directory_tells_everything(tmp_path: Path) -> None:
    output = tmp_path / "run"
    summary = finetune(config=make_config(), output=output, policy="hold")
    rows = read_jsonl(output / "schedule.jsonl")
    assert [row["step_after"] for row in rows][-1] == TASK["steps"]
    assert len(rows) == summary["num_decisions"]
    names = hold_policy().spec.names
    for row in rows:
        assert tuple(row["observation"]) == names
        assert row["mask"]["hold"]
        assert row["action"] == "hold"
        assert row["learning_rate"] > 0
        assert np.isfinite([row["train_loss"], row["validation_loss"]]).all()
    assert json.loads((output / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert (output / "schedule.png").read_bytes().startswith(b"\x89PNG")


def test_the_fine_tuned_model_loads_and_is_the_one_that_was_measured(tmp_path: Path) -> None:
    from llmrl_envs.jobs.loading import JobLibrary
    from llmrl_envs.jobs.session import FineTuningSession

    config = make_config()
    summary = finetune(config=config, output=tmp_path / "run", policy="hold")
    again = config.task.model_copy(update={"model": str(tmp_path / "run" / "model")})
    loss = FineTuningSession(JobLibrary().job(again), seed=0).evaluate("test").loss
    assert loss == pytest.approx(summary["loss_test"], rel=1e-6)


def test_an_adapter_is_saved_as_an_adapter(tmp_path: Path) -> None:
    finetune(config=make_config(task={"mode": "lora"}), output=tmp_path / "run", policy="hold")
    assert (tmp_path / "run" / "model" / "adapter_model.safetensors").is_file()


def test_two_runs_make_the_same_schedule(tmp_path: Path) -> None:
    first, second = (finetune(config=make_config(), output=tmp_path / name, policy="hold") for name in "ab")
    assert first["schedule_digests"] == second["schedule_digests"]
    assert first["loss_test"] == second["loss_test"]


def test_a_named_schedule_follows_the_given_rate(tmp_path: Path) -> None:
    config = make_config(learning_rate=3e-4, schedule={"warmup_fraction": 0.0})
    finetune(config=config, output=tmp_path / "run", schedule="linear")
    rows = read_jsonl(tmp_path / "run" / "schedule.jsonl")
    for row in rows:
        step = row["step_after"] - 1
        assert row["learning_rate"] == pytest.approx(3e-4 * (1 - step / TASK["steps"]))


def test_a_rate_that_destroys_the_model_is_an_outcome(tmp_path: Path) -> None:
    summary = finetune(config=make_config(learning_rate=1e4), output=tmp_path / "run", schedule="constant")
    assert summary["diverged"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"policy": "hold", "schedule": "linear"}, "both"),
        ({}, "neither"),
        ({"schedule": "cosin"}, "unknown schedule"),
        ({"policy": "./missing"}, "no policy folder"),
    ],
)
def test_what_steers_must_be_clear(tmp_path: Path, arguments: dict[str, str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        finetune(config=make_config(), output=tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


def test_a_run_directory_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        finetune(config=make_config(), output=tmp_path, policy="hold")
    assert (tmp_path / "kept.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("task", "told"),
    [
        ({"model": "./no-such-model"}, "no-such-model"),
        ({"data": "./no-such-file.jsonl"}, "no-such-file"),
        ({"data": "builtin:nothing"}, "nothing"),
        ({"max_length": 4096}, "4096"),
    ],
)
def test_bad_input_ends_with_one_message_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], task: dict[str, Any], told: str
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({"task": {**TASK, **task}, "tracking": {"wandb": "disabled"}}))
    arguments = ["finetune", "--config", str(path), "--policy", "hold", "--output", str(tmp_path / "run")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert told in error
    assert "Traceback" not in error
