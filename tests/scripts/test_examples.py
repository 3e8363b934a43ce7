"""The worked examples run without arguments, and the policy does what they say."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import wandb
from accelerate import Accelerator
from transformers.integrations import WandbCallback

from llmrl import ScheduleCallback

ROOT = Path(__file__).parents[2]
LOSSES = re.compile(r"test loss: ([\d.]+|nan) with linear decay, ([\d.]+) with the policy")


@pytest.mark.parametrize("name", ["trainer", "sft", "accelerate_loop"])
def test_an_example_ends_better_than_linear_decay_from_the_same_wrong_rate(name, tmp_path):
    found = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "examples" / f"{name}.py")],
        capture_output=True, text=True, timeout=240, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'envs'}"},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-2000:]
    match = LOSSES.search(found.stdout)
    assert match is not None, found.stdout[-2000:]
    linear, steered = map(float, match.groups())
    assert steered < linear


@pytest.mark.slow
def test_the_loop_runs_on_two_processes(tmp_path):
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "configs/accelerate/two_cpu_processes.yaml"),
    ]
    found = subprocess.run(
        [sys.executable, *launch, str(ROOT / "scripts" / "examples" / "accelerate_loop.py")],
        capture_output=True, text=True, timeout=300, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'envs'}", "ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-2000:]
    (match,) = LOSSES.finditer(found.stdout)
    linear, steered = map(float, match.groups())
    assert steered < linear


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "scripts" / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_decisions(folder):
    """The decisions of an offline run, through W&B's own reader."""
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    records = map(json.loads, subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines())
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    return [row for row in rows if "llmrl/learning_rate" in row]


@pytest.fixture
def run(tmp_path):
    made = wandb.init(mode="offline", dir=str(tmp_path), project="tests", settings=wandb.Settings(silent=True))
    yield made
    made.finish()


@pytest.mark.slow
@pytest.mark.parametrize("factor", [0.1, 10.0])
@pytest.mark.parametrize(("name", "right"), [("trainer", 1e-3), ("sft", 1e-2)])
def test_a_trainer_is_rescued_from_a_rate_ten_times_too_low_and_too_high(name, right, factor, run, tmp_path):
    example = load(name)
    linear, _ = example.train(factor * right, [])
    steered, trainer = example.train(factor * right, [ScheduleCallback("hold"), WandbCallback()])
    run.finish()
    assert steered < linear
    decisions = read_decisions(tmp_path)
    assert decisions[-1]["train/global_step"] == trainer.state.max_steps
    assert len(decisions) == sum("llmrl/level" in row for row in trainer.state.log_history)


@pytest.mark.slow
@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_a_loop_is_rescued_from_a_rate_ten_times_too_low_and_too_high(factor, run, tmp_path, monkeypatch):
    example = load("accelerate_loop")
    monkeypatch.setattr(example, "LEARNING_RATE", factor * 3e-3)
    losses = []
    for policy in (None, "hold"):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=example.ACCUMULATION)
        job = example.Job(accelerator, policy)
        job.train(example.STEPS)
        losses.append(job.test_loss())
        accelerator.free_memory()
    controller = job.controller
    for record in controller.records:
        run.log({**controller.metrics(record), "train/global_step": record.step})
    run.finish()
    assert losses[1] < losses[0]
    assert [row["train/global_step"] for row in read_decisions(tmp_path)][-1] == example.STEPS
