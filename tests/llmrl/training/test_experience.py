"""Learning from logs: what earlier runs saw, taken into a new run and learned from, as a user of `llmrl train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from llmrl_envs.errors import UserError
from llmrl_envs.grid_world import NUM_STATES, optimal_q

from llmrl.cli import main
from llmrl.config import TrainConfig
from llmrl.dqn.agent import DQNAgent
from llmrl.dqn.network_file import load_network
from llmrl.run_directory import read_jsonl
from llmrl.training.experience import replay_folders
from llmrl.training.loop import train

GRID = {"id": "llmrl/GridWorld-v0"}
QUIET = {"wandb": "disabled"}
# One-step returns: longer ones would carry the random actions of the logs into the values.
LEARNER: dict[str, Any] = {
    "hidden_sizes": [32], "gamma": 0.9, "batch_size": 32, "learning_rate": 0.003, "n_step": 1, "target_ema": 0.02
}  # fmt: skip
LOGS_ALONE = {"decisions": 0, "evaluation_episodes": 1}


def make_config(**changes: Any) -> TrainConfig:
    values = {"env": GRID, "agent": LEARNER, "tracking": QUIET}
    return TrainConfig.model_validate(values | changes)


def rows(output: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in read_jsonl(output / "metrics.jsonl") if row["kind"] == kind]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def random_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose agent acted at random and learned nothing."""
    output = tmp_path_factory.mktemp("random") / "run"
    agent = {"epsilon_start": 1.0, "epsilon_end": 1.0, "learning_starts": 5_000}
    training = {"decisions": 3_000, "checkpoint_period_episodes": 20, "evaluation_episodes": 1}
    training["evaluation_period_episodes"] = 0
    train(config=make_config(agent=agent, training=training), output=output)
    return output


REACHABLE = (1, 2, 3, 4, 5, 7)  # states that are not final and that some way from the start passes


def test_a_policy_learned_only_from_logs_of_a_random_agent_is_optimal(random_run: Path, tmp_path: Path) -> None:
    """Through the command line, without one step in the environment."""
    agent = {**LEARNER, "experience": [str(random_run)], "pretrain_updates": 2_000}
    path, output = tmp_path / "train.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump({"env": GRID, "agent": agent, "training": LOGS_ALONE, "tracking": QUIET}))
    assert main(["train", "--config", str(path), "--output", str(output)]) == 0
    network = load_network(output / "policy" / "model.safetensors")
    for state in REACHABLE:
        obs = torch.eye(NUM_STATES)[state - 1][None]
        values = optimal_q()[state - 1]
        assert values[int(network.values(network(obs)).argmax())] == pytest.approx(values.max()), state
    final = rows(output, "final_evaluation")[0]
    assert (final["decisions"], final["episode_return"]) == (0, 1.0)
    (taken,) = rows(output, "experience")
    assert taken["transitions"] == taken["stored"] > 2_500
    assert [row["learner_steps"] for row in rows(output, "pretraining")] == list(range(200, 2_001, 200))


def test_interrupted_and_resumed_equals_undisturbed(
    random_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = {**LEARNER, "experience": [str(random_run)], "pretrain_updates": 60, "learning_starts": 10}
    agent |= {"sampling": "prioritized", "normalize_obs": True, "conservative_weight": 0.1}
    training = {"decisions": 150, "checkpoint_period_episodes": 2, "evaluation_episodes": 1}
    config = make_config(agent=agent, training=training)
    train(config=config, output=tmp_path / "whole")
    original, updates = DQNAgent._update, 0

    def interrupted(self: DQNAgent) -> Any:
        nonlocal updates
        updates += 1
        if updates in (3, 40, 130):
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(DQNAgent, "_update", interrupted)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            train(config=config, output=tmp_path / "torn", resume=True)
    train(config=config, output=tmp_path / "torn", resume=True)
    assert files(tmp_path / "whole" / "policy") == files(tmp_path / "torn" / "policy")
    whole, torn = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("whole", "torn"))
    assert whole == torn
    assert len(rows(tmp_path / "torn", "pretraining")) == 10


def test_experience_is_a_warm_start(random_run: Path, tmp_path: Path) -> None:
    """The replay holds it from the first decision on, and a checkpoint holds both."""
    agent = {**LEARNER, "experience": [str(random_run), str(random_run)], "learning_starts": 1}
    training = {"decisions": 60, "checkpoint_period_episodes": 1, "evaluation_episodes": 1}
    train(config=make_config(agent=agent, training=training), output=tmp_path / "run")
    taken = rows(tmp_path / "run", "experience")
    assert len(taken) == 2
    (folder,) = replay_folders(tmp_path / "run")
    stored = json.loads((folder / "manifest.json").read_text())["tables"]["rows"]["num_rows"]
    steps = rows(tmp_path / "run", "episode")[-1]["decisions"]
    assert stored == sum(row["transitions"] for row in taken) + steps


def test_a_replay_folder_and_a_checkpoint_are_experience_too(random_run: Path, tmp_path: Path) -> None:
    (folder,) = replay_folders(random_run)
    assert replay_folders(folder) == [folder]
    assert replay_folders(folder.parent) == [folder]
    assert replay_folders(folder.parent.parent) == [folder]


def quadratic_run(output: Path, **env: Any) -> None:
    env = {"id": "llmrl/NoisyQuadratic-v0", "kwargs": {"distribution": {"total_steps": [12, 20]}}, **env}
    training = {"decisions": 20, "checkpoint_period_episodes": 1, "evaluation_episodes": 1}
    train(config=make_config(env=env, training=training), output=output)


@pytest.mark.parametrize(
    ("env", "told"),
    [
        ({"actions": "levels"}, "another actions hash"),
        ({"observation": {"stack": 1}}, "another observation hash"),
        (GRID, "another actions hash"),
    ],
)
def test_experience_that_means_something_else_is_refused_by_name(
    tmp_path: Path, env: dict[str, Any], told: str
) -> None:
    quadratic_run(tmp_path / "old")
    agent = {**LEARNER, "experience": [str(tmp_path / "old")]}
    base = {"id": "llmrl/NoisyQuadratic-v0"} if env is not GRID else {}
    with pytest.raises(UserError, match=told) as raised:
        train(config=make_config(env={**base, **env}, agent=agent), output=tmp_path / "new")
    assert raised.value.expected != raised.value.got
    assert str(tmp_path / "old") in str(raised.value)


def test_experience_of_another_shape_is_refused_by_name(random_run: Path, tmp_path: Path) -> None:
    agent = {**LEARNER, "experience": [str(random_run)]}
    with pytest.raises(UserError, match=r"another (num_actions|obs_shape)"):
        train(config=make_config(env={"id": "CartPole-v1"}, agent=agent), output=tmp_path / "new")


@pytest.mark.parametrize("kind", ["missing", "empty", "no checkpoint", "tabular", "damaged"])
def test_what_holds_no_experience_is_told(random_run: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "old"
    told = "no stored experience"
    if kind == "empty":
        path.mkdir()
    elif kind == "no checkpoint":
        (path / "checkpoints").mkdir(parents=True)
        told = "no whole checkpoint"
    elif kind == "tabular":
        training = {"decisions": 300, "checkpoint_period_episodes": 1, "evaluation_episodes": 1}
        train(config=make_config(agent={"name": "tabular"}, training=training), output=path)
    elif kind == "damaged":
        path.mkdir()
        (path / "manifest.json").write_text("{}")
        told = "cannot be read"
    with pytest.raises(UserError, match=told):
        train(config=make_config(agent={**LEARNER, "experience": [str(path)]}), output=tmp_path / "new")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"agent": {"pretrain_updates": 10}}, "needs agent.experience"),
        ({"training": {"decisions": 0}}, "needs agent.pretrain_updates"),
        ({"agent": {"name": "tabular", "experience": ["x"]}}, "does not read agent.experience"),
    ],
)
def test_contradictions_are_told(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make_config(**changes)
