"""Sweep files: what an agent of W&B starts for them is a command that llmrl accepts, whatever the sweep draws."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from llmrl.config_loading import load_config

ROOT = Path(__file__).parents[1]
SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))
METRICS = {"train": "evaluation/score", "finetune": "loss_test"}


def read(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text())
    assert isinstance(content, dict)
    return content


def draws(parameters: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What a sweep may draw: every listed value and both ends of every range, the other parameters at their first."""
    choices = {name: entry.get("values") or [entry["min"], entry["max"]] for name, entry in parameters.items()}
    first = {name: values[0] for name, values in choices.items()}
    return [{**first, name: value} for name, values in choices.items() for value in values]


def agent_command(sweep: dict[str, Any], drawn: dict[str, Any]) -> list[str]:
    """The words that the agent starts: macros that stand alone are replaced by lists of words."""
    variables = create_sweep_command_args({"args": {name: {"value": value} for name, value in drawn.items()}})
    words: list[str] = []
    for word in sweep["command"]:
        words += variables[word[2:-1]] if word.startswith("${") else [word]
    return words


def llmrl_words(words: list[str], folder: Path) -> list[str]:
    """Runs the command with a stand-in for llmrl that tells what it was called with."""
    stand_in = folder / "llmrl"
    stand_in.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    stand_in.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "WANDB_RUN_ID": "abc123"}
    finished = subprocess.run(words, capture_output=True, text=True, env=environment, check=True)
    told: list[str] = json.loads(finished.stdout)
    return told


def test_there_is_one_for_training_and_one_for_fine_tuning() -> None:
    assert {path.stem for path in SWEEPS} >= {"train", "finetune"}


@pytest.mark.parametrize("path", SWEEPS, ids=[path.name for path in SWEEPS])
def test_every_draw_is_a_valid_command(path: Path, tmp_path: Path) -> None:
    sweep = read(path)
    for drawn in draws(sweep["parameters"]):
        command, *words = llmrl_words(agent_command(sweep, drawn), tmp_path)
        assert command == path.stem
        options = {"--config": "", "--wandb": "", "--output": "", "--policy": ""}
        while words and words[0].startswith("--"):
            option, value, *words = words
            assert option in options
            options[option] = value
        assert options["--wandb"] == "online"
        assert options["--output"] == f"runs/sweeps/{path.stem}-abc123", "a directory for every run"
        overrides = dict(word.split("=", 1) for word in words)
        assert {name: str(value) for name, value in drawn.items()}.items() <= overrides.items()
        load_config(command, ROOT / options["--config"], words)  # type: ignore[call-overload]


@pytest.mark.parametrize("path", SWEEPS, ids=[path.name for path in SWEEPS])
def test_it_follows_a_metric_that_the_command_logs(path: Path) -> None:
    sweep = read(path)
    assert sweep["metric"]["name"] == METRICS[path.stem]
    assert sweep["method"] in ("grid", "random", "bayes")
    if sweep["method"] == "grid":
        assert all("values" in entry for entry in sweep["parameters"].values())
