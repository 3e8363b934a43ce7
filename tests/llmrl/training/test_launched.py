"""`accelerate launch -m llmrl train` with two processes that fine-tune, as a person types it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmrl.run_directory import read_jsonl

pytestmark = pytest.mark.slow

# A batch of one example cannot be shared, so each process must run jobs of its own.
TASK = {"data": "builtin:json", "steps": 12, "batch_size": 1, "max_length": 24, "validation_examples": 4}
CONFIG: dict[str, Any] = {
    "env": {"tasks": {"tasks": [TASK], "num_seeds": 2}},
    "agent": {"hidden_sizes": [16], "learning_starts": 8, "batch_size": 8, "epsilon_start": 1.0, "epsilon_end": 1.0},
    "training": {"decisions": 100, "checkpoint_period_episodes": 4, "evaluation_episodes": 1},
    "tracking": {"wandb": "disabled"},
}
KINDS = {
    "single": (),
    "population": ("env.population=4", "training.decisions=200"),
    "workers": ("env.population=4", "env.population_workers=2", "training.decisions=200"),
}
LAUNCH = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2"]
TRAIN = ["-m", "llmrl", "train"]


def start(folder: Path, name: str, *arguments: str) -> subprocess.Popen[str]:
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return subprocess.Popen(
        [*LAUNCH, *TRAIN, "--config", str(path), "--output", str(folder / name), *arguments],
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_checkpoint(run: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not list(run.glob("checkpoints/0*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children(process: subprocess.Popen[str]) -> list[int]:
    tasks = Path(f"/proc/{process.pid}/task")
    return sorted(int(pid) for task in tasks.iterdir() for pid in (task / "children").read_text().split())


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("overrides", KINDS.values(), ids=KINDS)
def test_two_processes_from_beginning_to_end(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    whole = start(tmp_path, "whole", *overrides)
    _, told = whole.communicate(timeout=240)
    assert whole.returncode == 0, told
    torn = start(tmp_path, "torn", *overrides)
    wait_for_checkpoint(tmp_path / "torn", torn)
    os.killpg(torn.pid, signal.SIGKILL)
    torn.communicate(timeout=60)
    resumed = start(tmp_path, "torn", "--resume", *overrides)
    _, told = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, told
    assert files(tmp_path / "whole" / "policy") == files(tmp_path / "torn" / "policy")
    rows = read_jsonl(tmp_path / "whole" / "metrics.jsonl")
    assert rows == read_jsonl(tmp_path / "torn" / "metrics.jsonl")

    # Actions are random throughout, so the first process meets what a process alone meets.
    command = [sys.executable, *TRAIN, "--config", str(tmp_path / "train.yaml"), "--output", str(tmp_path / "alone")]
    subprocess.run([*command, *overrides], check=True, capture_output=True, timeout=240)
    alone = [row["return"] for row in read_jsonl(tmp_path / "alone" / "metrics.jsonl") if row["kind"] == "episode"]
    first = [row["return"] for row in rows if row["kind"] == "episode" and row["process"] == 0]
    assert len(first) > 5
    assert first == alone[: len(first)]


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_process_ends_the_launcher_with_a_clear_message(tmp_path: Path, lost: int) -> None:
    process = start(tmp_path, "run", "training.decisions=100000")
    wait_for_checkpoint(tmp_path / "run", process)
    os.kill(children(process)[lost], signal.SIGKILL)
    _, told = process.communicate(timeout=30)
    assert process.returncode not in (0, None)
    assert f"process {1 - lost} of 2 lost another one" in told
    assert "--resume" in told
