"""`llmrl train` as its user meets it: what it writes, and that a killed run ends like an undisturbed one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from llmrl_envs.errors import UserError

from llmrl.cli import main
from llmrl.config import TrainConfig
from llmrl.config_loading import config_to_yaml
from llmrl.policy import SchedulePolicy
from llmrl.run_directory import read_jsonl
from llmrl.training.loop import train

TASK: dict[str, Any] = {
    "data": "builtin:json",
    "steps": 12,
    "batch_size": 2,
    "max_length": 24,
    "validation_examples": 4,
}


def make_config(**changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "env": {"tasks": {"tasks": [TASK], "num_seeds": 2}},
        "agent": {"hidden_sizes": [16], "learning_starts": 8, "batch_size": 8, "gamma": 1.0, "n_step": 2},
        "training": {"decisions": 40, "checkpoint_period_episodes": 2, "evaluation_episodes": 2},
        "tracking": {"wandb": "disabled"},
    }
    return TrainConfig.model_validate(values | changes)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def rows(output: Path) -> list[dict[str, Any]]:
    return read_jsonl(output / "metrics.jsonl")


def test_a_run_leaves_a_policy_and_its_story(tmp_path: Path) -> None:
    final = train(config=make_config(), output=tmp_path / "run")
    output = tmp_path / "run"
    policy = SchedulePolicy.from_pretrained(output / "policy")
    assert policy.provenance["decisions"] == 40
    assert policy.provenance["results"]["score"] == pytest.approx(final["score"], abs=1e-6)
    kinds = [row["kind"] for row in rows(output)]
    assert kinds[0] == "start"
    assert kinds[-1] == "final_evaluation"
    assert kinds.count("episode") == rows(output)[-2]["episode"]
    assert (output / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "config.yaml").is_file()


def test_interrupted_anywhere_and_resumed_equals_undisturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(config=make_config(), output=tmp_path / "whole")
    from llmrl.dqn.collector import Collector

    original = Collector.step
    steps = 0

    def interrupted(self: Collector, **named: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps in (17, 31):
            raise KeyboardInterrupt
        return original(self, **named)

    monkeypatch.setattr(Collector, "step", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(config=make_config(), output=tmp_path / "torn", resume=True)
    train(config=make_config(), output=tmp_path / "torn", resume=True)
    assert files(tmp_path / "whole" / "policy") == files(tmp_path / "torn" / "policy")
    assert rows(tmp_path / "whole") == rows(tmp_path / "torn")


@pytest.mark.slow
def test_killed_and_resumed_equals_undisturbed(tmp_path: Path) -> None:
    config = tmp_path / "train.yaml"
    config.write_text(config_to_yaml(make_config()))
    command = [sys.executable, "-m", "llmrl", "train", "--config", str(config), "--output"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    process = subprocess.Popen([*command, str(tmp_path / "torn")], stderr=subprocess.DEVNULL)
    metrics = tmp_path / "torn" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not metrics.exists() or metrics.read_text().count('"episode"') < 4):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run([*command, str(tmp_path / "torn"), "--resume"], check=True, capture_output=True)
    assert files(tmp_path / "whole" / "policy") == files(tmp_path / "torn" / "policy")


def test_a_finished_run_resumes_to_the_same_policy(tmp_path: Path) -> None:
    train(config=make_config(), output=tmp_path / "run")
    before = files(tmp_path / "run" / "policy")
    train(config=make_config(), output=tmp_path / "run", resume=True)
    assert files(tmp_path / "run" / "policy") == before


def test_another_configuration_does_not_resume(tmp_path: Path) -> None:
    train(config=make_config(), output=tmp_path / "run")
    with pytest.raises(UserError, match="changes in seed"):
        train(config=make_config(seed=1), output=tmp_path / "run", resume=True)


def test_ctrl_c_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(config_to_yaml(make_config()))

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llmrl.training.loop.TrainingRun.run", interrupt)
    assert main(["train", "--config", str(path), "--output", str(tmp_path / "run")]) == 130
    assert "--resume" in capsys.readouterr().err


def test_a_full_disk_ends_with_a_message_and_keeps_the_last_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmrl.dqn.agent import DQNAgent

    path = tmp_path / "train.yaml"
    path.write_text(config_to_yaml(make_config()))
    original = DQNAgent.save
    saved = 0

    def save(self: DQNAgent, directory: Path) -> None:
        nonlocal saved
        saved += 1
        if saved == 2:
            raise OSError(28, "No space left on device", str(directory))
        original(self, directory)

    monkeypatch.setattr(DQNAgent, "save", save)
    assert main(["train", "--config", str(path), "--output", str(tmp_path / "run")]) == 2
    assert "space" in capsys.readouterr().err
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()] == ["000000002"]


@pytest.mark.parametrize("name", ["tabular", "reinforce"])
def test_other_agents_train_too(tmp_path: Path, name: str) -> None:
    config = make_config(
        env={"id": "llmrl/GridWorld-v0"},
        agent={"name": name},
        training={"decisions": 200, "evaluation_episodes": 2, "checkpoint_period_episodes": 5},
    )
    train(config=config, output=tmp_path / "run")
    assert any((tmp_path / "run" / "policy").iterdir())


def test_demonstrations_come_first(tmp_path: Path) -> None:
    training = {"decisions": 16, "demonstrations": 2, "evaluation_episodes": 1, "checkpoint_period_episodes": 1}
    train(config=make_config(training=training), output=tmp_path / "run")
    assert len([row for row in rows(tmp_path / "run") if row["kind"] == "episode"]) >= 2


def test_a_population_trains(tmp_path: Path) -> None:
    env = {"tasks": {"tasks": [TASK], "num_seeds": 1}, "population": 2}
    training = {"decisions": 16, "evaluation_episodes": 1, "checkpoint_period_episodes": 1}
    train(config=make_config(env=env, training=training), output=tmp_path / "run")
    assert SchedulePolicy.from_pretrained(tmp_path / "run" / "policy").network is not None


def test_an_unknown_environment_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="NoSuch-v0"):
        train(config=make_config(env={"id": "NoSuch-v0"}), output=tmp_path / "run")
